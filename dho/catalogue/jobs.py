"""Kinds of job on a cluster, by the name that `launch.kubernetes.kind` gives."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class JobKindRow:
    """One kind of job."""

    implementation: str
    """A subclass of `dho.cluster.job.JobKind`, as "module:Class"."""
    doc: str


JOB_KINDS = {
    "PyTorchJob": JobKindRow("dho.cluster.pytorchjob:PyTorchJob", "Kubeflow's training operator"),
}
DEFAULT_KIND = "PyTorchJob"
