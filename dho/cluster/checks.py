"""What no schema forbids and yet cannot run, or should not: one line each, before anything is sent.

    from dho.cluster.job import Launch, job_kind
    from dho.cluster.manifest import render
    check(render(Launch()), job_kind("PyTorchJob"))          # ClusterError with a line for each problem

An operator takes a wrong policy without a word, asks for pods that PodSecurity `restricted` then refuses, or gives up
on a 64-node job after its first fault. These rules say so at once. Rules for one kind of job are in `JobKind.problems`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from dho.cluster.job import Document, JobKind, containers
from dho.cluster.revision import REMOTE_PATTERN, REVISION_PATTERN
from dho.cluster.schema import schema_problems
from dho.core.errors import ClusterError

VALUES = {
    "imagePullPolicy": ("IfNotPresent", "Always", "Never"),
    "whenUnsatisfiable": ("ScheduleAnyway", "DoNotSchedule"),
}
"""Field of a pod -> values that the API server knows; no operator's schema lists them."""
MAX_NAME = 50
"""Characters: a pod's name is that of its job with the replica behind it, and has to fit a DNS label of 63."""
TORCHRUN_GRACE_S = 30
"""Seconds that torchrun gives its processes after SIGTERM."""
MAX_LOST_NODE_S = 120
"""Longest time that a lost node's pods may be kept, seconds."""
GPU = "nvidia.com/gpu"
_SECRET_NAME = re.compile(r"PASSWORD|PASSWD|SECRET|TOKEN|CREDENTIAL|ACCESS_KEY|API_?KEY|PRIVATE_KEY", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\bA(KI|SI)A[0-9A-Z]{16}\b|://[^/\s:@]+:[^/\s@]+@|-----BEGIN [A-Z ]*PRIVATE KEY-----")
_UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def check(documents: list[Document], kind: JobKind) -> None:
    """Raise `ClusterError` with one line for each thing that is wrong."""
    if lines := problems(documents, kind):
        raise ClusterError("\n".join(lines))


def problems(documents: list[Document], kind: JobKind) -> list[str]:
    """List what is wrong with a job's documents, one line each; raises `ClusterError` where there is no job at all."""
    job = kind.job(documents)
    if violations := list(schema_problems(job, kind.schema)):
        # The other rules read fields that may be missing or of another type here.
        return [f"{kind.name}: {line}" for line in violations]
    pods = kind.pods(documents)
    for role, pod in pods.items():
        if not pod.get("containers"):
            return [f"{kind.name}: {role} has no containers"]

    lines = list(_environment(kind.environment(documents)))
    lines += [f"{kind.name}: {line}" for line in _values(job, "", {**VALUES, **kind.values})]
    lines += _identity(job, kind)
    lines += [f"{kind.name}: {line}" for line in kind.problems(documents)]
    for role, pod in pods.items():
        in_pod = [*_pod(pod, kind), *_volumes(pod), *_references(pod, documents, kind.replicas(job))]
        lines += [f"{role}'s pod: {line}" for line in in_pod]
        for container in containers(pod):
            in_container = [*_container(container, pod), *_secrets(container)]
            if container["name"] == kind.container and container in pod["containers"]:
                in_container += _processes(container, pod, kind.processes(documents), kind.processes_field)
            lines += [f"{role}'s container {container['name']}: {line}" for line in in_container]
    return list(dict.fromkeys(lines))


def _values(node: Any, where: str, values: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            place = f"{where}.{key}" if where else key
            if key in values and isinstance(value, str) and value not in values[key]:
                yield f"{place} is {value}; expected one of {', '.join(values[key])}"
            yield from _values(value, place, values)
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _values(value, f"{where}[{i}]", values)


def _identity(job: Document, kind: JobKind) -> Iterator[str]:
    if job.get("apiVersion") != kind.api_version:
        yield f"{kind.name}: apiVersion is {job.get('apiVersion')}; expected {kind.api_version}"
    name = str(job["metadata"].get("name", ""))
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"the job's name is {name!r}; expected small letters, digits and -, the first a letter and the last no -"
    elif len(name) > MAX_NAME:
        yield (
            f"the job's name {name} has {len(name)} characters; expected at most {MAX_NAME}, as its pods' names are "
            "longer"
        )


def _environment(config: Document) -> Iterator[str]:
    data = config.get("data", {})
    if not REVISION_PATTERN.fullmatch(str(data.get("DHO_REVISION", ""))):
        revision = data.get("DHO_REVISION")
        yield f"ConfigMap: DHO_REVISION is {revision!r}; expected 64 hex digits, as `dho publish` prints them"
    if not REMOTE_PATTERN.fullmatch(str(data.get("DHO_REMOTE", ""))):
        remote = data.get("DHO_REMOTE")
        yield f"ConfigMap: DHO_REMOTE is {remote!r}; expected s3://bucket/prefix, the project's DVC remote"
    for name, value in data.items():
        if not isinstance(value, str):
            yield f"ConfigMap: {name} is {value!r}; expected text in quotes"
        if _SECRET_NAME.search(name) or _SECRET_VALUE.search(str(value)):
            yield f"ConfigMap: {name} looks like a secret; put it into a Secret that is mounted as a file"


def _pod(pod: Document, kind: JobKind) -> Iterator[str]:
    security = pod.get("securityContext", {})
    if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
        yield "securityContext lets it run as root; expected runAsNonRoot: true and a runAsUser other than 0"
    if security.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "securityContext has no seccompProfile; expected type RuntimeDefault (PodSecurity restricted)"
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(key):
            yield f"{key} is true; expected false (PodSecurity restricted)"
    if pod.get("automountServiceAccountToken") is not False:
        yield "automountServiceAccountToken is not false; a training has no business with the API server"
    if (grace := pod.get("terminationGracePeriodSeconds", 30)) <= TORCHRUN_GRACE_S:
        yield (
            f"terminationGracePeriodSeconds is {grace}; expected more than {TORCHRUN_GRACE_S}, which torchrun needs "
            "to let its processes write a checkpoint"
        )
    for key in ("not-ready", "unreachable"):
        seconds = [
            t.get("tolerationSeconds", 0)
            for t in pod.get("tolerations", [])
            if t.get("key") == f"node.kubernetes.io/{key}"
        ]
        if not seconds or not 0 < seconds[0] <= MAX_LOST_NODE_S:
            yield (
                f"no toleration of node.kubernetes.io/{key} for 1 to {MAX_LOST_NODE_S} s; by default a lost node's pod "
                "stays for 300 s"
            )
    if not pod.get("initContainers"):
        yield "no init container; expected one that runs `dho job pull`, which brings the data"
    if not any(container["name"] == kind.container for container in pod["containers"]):
        name = pod["containers"][0]["name"]
        yield f"container {name!r} is not named {kind.container}; the operator looks for that name"


def _volumes(pod: Document) -> Iterator[str]:
    defined = {volume["name"]: volume for volume in pod.get("volumes", [])}
    mounted = set()
    for container in containers(pod):
        places: set[str] = set()
        for mount in container.get("volumeMounts", []):
            mounted.add(mount["name"])
            if mount["name"] not in defined:
                yield f"container {container['name']} mounts volume {mount['name']!r}, which is not under volumes"
            if mount["mountPath"] in places:
                yield f"container {container['name']} mounts two volumes at {mount['mountPath']}"
            places.add(mount["mountPath"])
    for name in sorted(set(defined) - mounted):
        yield f"volume {name!r} is defined and no container mounts it"
    for name, volume in defined.items():
        if "hostPath" in volume:
            yield (
                f"volume {name!r} is a hostPath; expected a PersistentVolumeClaim or emptyDir (PodSecurity restricted)"
            )
    for container in pod["containers"]:
        name, limit = container["name"], _limit(container, "memory")
        shm = [
            defined.get(mount["name"], {})
            for mount in container.get("volumeMounts", [])
            if mount["mountPath"] == "/dev/shm"
        ]
        if not shm or shm[0].get("emptyDir", {}).get("medium") != "Memory":
            yield f"container {name} has no memory-backed /dev/shm; expected emptyDir: {{medium: Memory}} mounted there"
        elif (size := quantity(shm[0]["emptyDir"].get("sizeLimit", "0"))) > limit > 0:
            yield f"/dev/shm may take {size / 2**30:g} GiB of container {name}'s memory limit of {limit / 2**30:g} GiB"


def _references(pod: Document, documents: list[Document], nodes: int) -> Iterator[str]:
    """What the pod names must be among the documents; Secrets are not, they are made by hand."""
    existing = {(document["kind"], document["metadata"]["name"]): document for document in documents}
    claims = [v["persistentVolumeClaim"]["claimName"] for v in pod.get("volumes", []) if "persistentVolumeClaim" in v]
    references = [("ServiceAccount", pod.get("serviceAccountName", "default"))]
    references += [("PersistentVolumeClaim", claim) for claim in claims]
    for container in containers(pod):
        for source in container.get("envFrom", []):
            if "configMapRef" in source:
                references.append(("ConfigMap", source["configMapRef"]["name"]))
    for kind, name in dict.fromkeys(references):
        if (kind, name) not in existing:
            yield f"it uses {kind} {name!r}, which is not among the documents"
        elif kind == "PersistentVolumeClaim":
            shared = "ReadWriteMany" in existing[kind, name]["spec"]["accessModes"]
            if nodes > 1 and not shared:
                yield f"PersistentVolumeClaim {name!r} is not ReadWriteMany; {nodes} nodes share it"


def _container(container: Document, pod: Document) -> Iterator[str]:
    image = container.get("image", "")
    name, _, digest = image.partition("@")
    tag = name.rsplit("/", 1)[-1].partition(":")[2]
    if not image or re.search(r"\s", image):
        yield f"image is {image!r}; expected registry/name:tag"
    elif not digest and tag in ("", "latest"):
        yield (
            f"image {image} has no fixed tag; expected name:version or name@sha256:..., so that every node runs the "
            "same"
        )
    resources = container.get("resources", {})
    for key in ("requests", "limits"):
        for amount in ("cpu", "memory"):
            if amount not in resources.get(key, {}):
                yield f"resources.{key} has no {amount}"
    for amount, value in resources.get("requests", {}).items():
        if amount in resources.get("limits", {}) and quantity(value) > quantity(resources["limits"][amount]):
            yield f"it requests {amount} {value}, more than its limit {resources['limits'][amount]}"
    security = container.get("securityContext", {})
    if security.get("allowPrivilegeEscalation") is not False or security.get("privileged"):
        yield "securityContext.allowPrivilegeEscalation is not false (PodSecurity restricted)"
    if "ALL" not in security.get("capabilities", {}).get("drop", []):
        yield "securityContext does not drop ALL capabilities (PodSecurity restricted)"
    if security.get("readOnlyRootFilesystem") is not True:
        yield "securityContext.readOnlyRootFilesystem is not true"
    if security.get("runAsUser", pod.get("securityContext", {}).get("runAsUser")) == 0:
        yield "securityContext.runAsUser is 0, root"


def _secrets(container: Document) -> Iterator[str]:
    for variable in container.get("env", []):
        name, value = variable["name"], str(variable.get("value", ""))
        if _SECRET_VALUE.search(value) or (value and _SECRET_NAME.search(name) and not value.startswith("/")):
            yield (
                f"env {name} has what looks like a secret as its value; put it into a Secret that is mounted as a file"
            )
        if "secretKeyRef" in variable.get("valueFrom", {}):
            yield (
                f"env {name} takes a Secret into the environment, where every child process has it; mount it as a file"
            )


def _processes(container: Document, pod: Document, processes: str, field: str) -> Iterator[str]:
    resources = container.get("resources", {})
    gpus = resources.get("limits", {}).get(GPU)
    if not re.fullmatch(r"[1-9]\d*", processes):
        yield f"{field} is {processes!r}; expected a number of processes in quotes"
    elif gpus is not None and str(gpus) != processes:
        yield f"{gpus} GPUs for {field} {processes}; expected one process per GPU"
    if resources.get("requests", {}).get(GPU, gpus) != gpus:
        yield f"it requests {resources['requests'][GPU]} GPUs with a limit of {gpus}; Kubernetes wants both the same"
    if gpus is not None and not any(t.get("key") == GPU for t in pod.get("tolerations", [])):
        yield f"no toleration of {GPU}, with which GPU nodes keep other pods away"


def quantity(amount: str | int) -> float:
    """A Kubernetes quantity as a number: `500m` is 0.5, `2Gi` is 2 * 2**30; raises `ClusterError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([A-Za-z]*)", str(amount))
    if match is None or match[2] not in _UNITS:
        raise ClusterError(f"quantity {amount!r}; expected a number and a unit, as in 500m or 2Gi")
    return float(match[1]) * _UNITS[match[2]]


def _limit(container: Document, amount: str) -> float:
    return quantity(container.get("resources", {}).get("limits", {}).get(amount, "0"))
