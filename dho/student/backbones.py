"""Backbones of the student: a name with the library it comes from, as in `timm:resnet18`; a bare name is timm's."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from dho.config import StudentConfig
from dho.core.errors import ConfigError


def create_backbone(config: StudentConfig) -> tuple[nn.Module, int]:
    """Build `student.model` without a classifier of its own.

    Returns:
        The backbone, images [n, 3, size, size] -> z [n, width], and the width.

    Raises:
        ConfigError: there is no such library or model, or the model refuses `student.model_args`.
    """
    library, _, name = config.model.rpartition(":")
    if library not in ("", "timm"):
        raise ConfigError(f"student.model is {config.model!r}; expected a timm model, as in resnet18 or timm:resnet18")
    try:
        backbone: Any = timm.create_model(name, pretrained=config.pretrained, num_classes=0, **config.model_args)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"student.model is {config.model!r} with student.model_args {config.model_args}: {error}"
        ) from error
    # Some timm models widen their features before the classifier; elsewhere z has num_features.
    return backbone, int(getattr(backbone, "head_hidden_size", backbone.num_features))
