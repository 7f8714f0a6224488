"""A kind of job that runs as a PyTorchJob does and is never elastic."""

from __future__ import annotations

from dho.cluster.pytorchjob import PyTorchJob


class QuietJob(PyTorchJob):
    """What is rendered is a PyTorchJob's manifest."""

    cannot = {"elastic": "its operator keeps the number of nodes"}
