"""Heads of the student: from z to logits (Eq. 5, 6)."""

from __future__ import annotations

from torch import nn

from dho.runtime.dho_runtime import HEADS

__all__ = ["HEADS", "create_head"]


def create_head(width: int, classes: int) -> nn.Module:
    """Build a linear head, z [n, width] -> logits [n, classes]."""
    return nn.Linear(width, classes)
