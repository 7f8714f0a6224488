"""A kind of job that runs as a PyTorchJob does and is never elastic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from dho.cluster.pytorchjob import PyTorchJob


class QuietJob(PyTorchJob):
    """What is rendered is a PyTorchJob's manifest."""

    cannot: ClassVar[Mapping[str, str]] = {"elastic": "its operator keeps the number of nodes"}
