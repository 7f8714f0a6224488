"""PyTorchJob of Kubeflow's training operator: a Master and Workers, or Workers alone where a job is elastic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from dho.cluster.job import Document, JobKind, Launch

FAULTS = 10
"""Lost processes or nodes that a job survives; backoffLimit is this many per replica (k8s/pytorchjob/base)."""


class PyTorchJob(JobKind):
    """Kubeflow's PyTorchJob, API version 1 (training operator 1.9)."""

    name = "PyTorchJob"
    group, version, plural = "kubeflow.org", "v1", "pytorchjobs"
    folder = "pytorchjob"
    container = "pytorch"  # the operator adds the rendezvous to the container of this name
    job_label = "training.kubeflow.org/job-name"
    processes_field = "spec.nprocPerNode"
    operator = "install Kubeflow's training operator (docs/platform.md)"
    schema = Path(__file__).with_name("pytorchjob-v1.9.4.json.gz")
    values: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "cleanPodPolicy": ("All", "Running", "None"),
        "restartPolicy": ("OnFailure", "Always", "ExitCode", "Never"),
        "rdzvBackend": ("c10d", "etcd-v2", "etcd"),
    }

    def size(self, documents: list[Document], launch: Launch) -> None:
        spec = self.job(documents)["spec"]
        replicas = spec["pytorchReplicaSpecs"]
        if launch.elastic is not None:
            replicas["Worker"]["replicas"] = launch.nodes
            spec["elasticPolicy"]["minReplicas"], spec["elasticPolicy"]["maxReplicas"] = launch.elastic
        elif launch.nodes == 1:
            del replicas["Worker"]
        else:
            replicas["Worker"]["replicas"] = launch.nodes - 1
        spec["runPolicy"]["backoffLimit"] = backoff_limit(launch.elastic[1] if launch.elastic else launch.nodes)
        if launch.gpus is not None:
            spec["nprocPerNode"] = str(launch.gpus)

    def pods(self, documents: list[Document]) -> dict[str, Document]:
        replicas = self.job(documents)["spec"]["pytorchReplicaSpecs"]
        return {role: replica.get("template", {}).get("spec", {}) for role, replica in replicas.items()}

    def processes(self, documents: list[Document]) -> str:
        return str(self.job(documents)["spec"].get("nprocPerNode", "auto"))

    def replicas(self, job: Document) -> int:
        return sum(int(replica.get("replicas", 1)) for replica in job["spec"]["pytorchReplicaSpecs"].values())

    def min_replicas(self, job: Document) -> int:
        return int((job["spec"].get("elasticPolicy") or {}).get("minReplicas", self.replicas(job)))

    def phase(self, job: Document) -> str:
        """The newest condition that holds: Created, Running, Restarting, ...; Pending before the first."""
        conditions = job.get("status", {}).get("conditions", [])
        holding: list[str] = [condition["type"] for condition in conditions if condition["status"] == "True"]
        for last in ("Succeeded", "Failed"):
            if last in holding:
                return last
        return holding[-1] if holding else "Pending"

    def rank_zero(self, job: Document) -> str:
        """The Master; where there is none, the first Worker, which hosts the rendezvous."""
        return "master-0" if "Master" in job["spec"]["pytorchReplicaSpecs"] else "worker-0"

    def replica_of(self, pod: Document) -> str:
        labels = pod["metadata"].get("labels", {})
        role = labels.get("training.kubeflow.org/replica-type", "pod")
        return f"{role}-{labels.get('training.kubeflow.org/replica-index', '?')}"

    def problems(self, documents: list[Document]) -> Iterator[str]:
        job = self.job(documents)
        yield from _run_policy(job["spec"].get("runPolicy", {}))
        yield from _replicas(job["spec"]["pytorchReplicaSpecs"])
        yield from self._elastic(job)

    def _elastic(self, job: Document) -> Iterator[str]:
        spec, total = job["spec"], self.replicas(job)
        most = total
        if (elastic := spec.get("elasticPolicy")) is not None:
            low, most = elastic.get("minReplicas", total), elastic.get("maxReplicas", total)
            if "Master" in spec["pytorchReplicaSpecs"]:
                yield "an elastic job has a Master; expected Workers only, any of which may be lost"
            if not 1 <= low <= most:
                yield (
                    f"spec.elasticPolicy has minReplicas {low} and maxReplicas {most}; expected 1 <= minReplicas <= "
                    "maxReplicas"
                )
            elif not low <= total <= most:
                yield f"{total} replicas; expected {low} to {most}, as spec.elasticPolicy says"
        elif "Master" not in spec["pytorchReplicaSpecs"]:
            yield "no Master and no elasticPolicy; expected one of them, else the nodes do not find each other"

        limit = spec.get("runPolicy", {}).get("backoffLimit", backoff_limit(most))
        if limit < backoff_limit(most):
            yield (
                f"spec.runPolicy.backoffLimit is {limit}; expected {backoff_limit(most)} or more, since the "
                f"operator adds up the restarts of all {most} pods and one fault restarts each of them"
            )


def backoff_limit(replicas: int) -> int:
    """Restarts, summed over all pods, after which the operator gives up on a job."""
    return FAULTS * replicas


def _run_policy(policy: Document) -> Iterator[str]:
    for key, meaning in (
        ("cleanPodPolicy", "what becomes of pods that have ended"),
        ("ttlSecondsAfterFinished", "when an ended job is removed"),
        ("activeDeadlineSeconds", "how long a job may take"),
        ("backoffLimit", "how many restarts it may take"),
    ):
        if key not in policy:
            yield f"spec.runPolicy has no {key}: {meaning} must be said"
    for key in ("ttlSecondsAfterFinished", "activeDeadlineSeconds"):
        if policy.get(key, 1) < 1:
            yield f"spec.runPolicy.{key} is {policy[key]}; expected 1 or more seconds"


def _replicas(replicas: Document) -> Iterator[str]:
    if set(replicas) - {"Master", "Worker"}:
        yield f"replicas are {', '.join(replicas)}; expected Master and Worker"
    if replicas.get("Master", {}).get("replicas", 1) != 1:
        yield f"Master has {replicas['Master']['replicas']} replicas; expected 1, the others are Workers"
    if replicas.get("Worker", {}).get("replicas", 1) < 1:
        yield f"Worker has {replicas['Worker']['replicas']} replicas; expected 1 or more, or no Worker at all"
    for role, replica in replicas.items():
        if replica.get("restartPolicy") == "Never":
            yield f"{role}'s restartPolicy is Never; expected OnFailure, so that a lost process does not end the job"
