"""Kinds of job on a cluster, by the name that `launch.kubernetes.kind` gives."""

from __future__ import annotations

from dho.catalogue import Row

JOB_KINDS = {
    "PyTorchJob": Row("dho.cluster.pytorchjob:PyTorchJob", "Kubeflow's training operator"),
}
"""Each is a subclass of `dho.cluster.job.JobKind`."""
DEFAULT_KIND = "PyTorchJob"
