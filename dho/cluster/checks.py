"""What no schema forbids and yet cannot run, or should not: found before anything is sent, one line each.

    check(documents)          # raises ClusterError

The operator takes `cleanPodPolicy: Sometimes` without a word, asks for pods that PodSecurity `restricted` then refuses, and gives a 64-node
job up after its first fault when `backoffLimit` is a small number. These rules say so at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from dho.cluster.manifest import Document, backoff_limit, containers, kind
from dho.cluster.schema import schema_problems
from dho.core.errors import ClusterError

ENUMS = {
    "cleanPodPolicy": ("All", "Running", "None"),
    "restartPolicy": ("OnFailure", "Always", "ExitCode", "Never"),
    "imagePullPolicy": ("IfNotPresent", "Always", "Never"),
    "whenUnsatisfiable": ("ScheduleAnyway", "DoNotSchedule"),
    "rdzvBackend": ("c10d", "etcd-v2", "etcd"),
}
"""Values that the API server or the operator knows; the CRD lists none of them."""
LONGEST_NAME = 50
"""Characters: pods are called <job>-worker-<number> and have to fit a DNS label of 63."""
TORCHRUN_GRACE_S = 30
"""Seconds that torchrun gives its processes after SIGTERM."""
LOST_NODE_S = 120
"""Seconds after which a lost node's pods must be given up."""
GPU = "nvidia.com/gpu"
_SECRET_NAME = re.compile(r"PASSWORD|PASSWD|SECRET|TOKEN|CREDENTIAL|ACCESS_KEY|API_?KEY|PRIVATE_KEY", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\bA(KI|SI)A[0-9A-Z]{16}\b|://[^/\s:@]+:[^/\s@]+@|-----BEGIN [A-Z ]*PRIVATE KEY-----")
_UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def check(documents: list[Document]) -> None:
    """Raise `ClusterError` with one line for each thing that is wrong."""
    if lines := problems(documents):
        raise ClusterError("\n".join(lines))


def problems(documents: list[Document]) -> list[str]:
    """One line for each thing that is wrong with a job's documents; empty where there is none."""
    job = kind(documents, "PyTorchJob")
    if broken := list(schema_problems(job)):
        return [
            f"PyTorchJob: {line}" for line in broken
        ]  # the other rules read fields that may be missing or of another type here
    for role, replica in job["spec"]["pytorchReplicaSpecs"].items():
        if not replica.get("template", {}).get("spec", {}).get("containers"):
            return [f"PyTorchJob: {role} has no containers"]
    lines = [*_environment(kind(documents, "ConfigMap")), *_enums(job, ""), *_job(job)]
    replicas = job["spec"]["pytorchReplicaSpecs"]
    for role, replica in replicas.items():
        pod, where = replica["template"]["spec"], f"{role}'s pod"
        lines += [
            f"{where}: {line}" for line in [*_pod(pod), *_volumes(pod), *_references(pod, documents, _total(replicas))]
        ]
        for container in containers(pod):
            lines += [
                f"{role}'s container {container['name']}: {line}"
                for line in [*_container(container, pod), *_secrets(container)]
            ]
        if main := [container for container in pod["containers"] if container["name"] == "pytorch"]:
            lines += [
                f"{role}'s container pytorch: {line}"
                for line in _processes(main[0], pod, job["spec"].get("nprocPerNode", "auto"))
            ]
    return list(dict.fromkeys(lines))


def _total(replicas: Document) -> int:
    return sum(int(replica.get("replicas", 1)) for replica in replicas.values())


def _enums(node: Any, where: str) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            place = f"{where}.{key}" if where else key
            if key in ENUMS and isinstance(value, str) and value not in ENUMS[key]:
                yield f"PyTorchJob: {place} is {value}; expected one of {', '.join(ENUMS[key])}"
            yield from _enums(value, place)
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _enums(value, f"{where}[{i}]")


def _job(job: Document) -> Iterator[str]:
    if (job.get("apiVersion"), job.get("kind")) != ("kubeflow.org/v1", "PyTorchJob"):
        yield f"PyTorchJob: apiVersion is {job.get('apiVersion')}; expected kubeflow.org/v1"
    name, spec = str(job["metadata"].get("name", "")), job["spec"]
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"the job's name is {name!r}; expected small letters, digits and -, the first a letter and the last no -"
    elif len(name) > LONGEST_NAME:
        yield f"the job's name {name} has {len(name)} characters; expected at most {LONGEST_NAME}, as pods add -worker-0 to it"
    policy, replicas = spec.get("runPolicy", {}), spec["pytorchReplicaSpecs"]
    for key, meaning in (
        ("cleanPodPolicy", "what becomes of pods that have ended"),
        ("ttlSecondsAfterFinished", "when an ended job is removed"),
        ("activeDeadlineSeconds", "how long a job may take"),
        ("backoffLimit", "how many restarts it may take"),
    ):
        if key not in policy:
            yield f"PyTorchJob: spec.runPolicy has no {key}: {meaning} must be said"
    for key in ("ttlSecondsAfterFinished", "activeDeadlineSeconds"):
        if policy.get(key, 1) < 1:
            yield f"PyTorchJob: spec.runPolicy.{key} is {policy[key]}; expected 1 or more seconds"
    if set(replicas) - {"Master", "Worker"}:
        yield f"PyTorchJob: replicas are {', '.join(replicas)}; expected Master and Worker"
    if replicas.get("Master", {}).get("replicas", 1) != 1:
        yield f"PyTorchJob: Master has {replicas['Master']['replicas']} replicas; expected 1, the others are Workers"
    if replicas.get("Worker", {}).get("replicas", 1) < 1:
        yield f"PyTorchJob: Worker has {replicas['Worker']['replicas']} replicas; expected 1 or more, or no Worker at all"
    for role, replica in replicas.items():
        if replica.get("restartPolicy") == "Never":
            yield f"PyTorchJob: {role}'s restartPolicy is Never; expected OnFailure, so that a lost process does not end the job"
    total, most = _total(replicas), _total(replicas)
    if (elastic := spec.get("elasticPolicy")) is not None:
        low, most = elastic.get("minReplicas", total), elastic.get("maxReplicas", total)
        if "Master" in replicas:
            yield "PyTorchJob: an elastic job has a Master; expected Workers only, any of which may be lost"
        if not 1 <= low <= most:
            yield f"PyTorchJob: spec.elasticPolicy has minReplicas {low} and maxReplicas {most}; expected 1 <= minReplicas <= maxReplicas"
        elif not low <= total <= most:
            yield f"PyTorchJob: {total} replicas; expected {low} to {most}, as spec.elasticPolicy says"
    elif "Master" not in replicas:
        yield "PyTorchJob: no Master and no elasticPolicy; expected one of them, else the nodes do not find each other"
    if policy.get("backoffLimit", backoff_limit(most)) < backoff_limit(most):
        yield (
            f"PyTorchJob: spec.runPolicy.backoffLimit is {policy['backoffLimit']}; expected {backoff_limit(most)} or more, since "
            f"the operator adds up the restarts of all {most} pods and one fault restarts each of them"
        )


def _environment(config: Document) -> Iterator[str]:
    data = config.get("data", {})
    if not re.fullmatch(r"[0-9a-f]{64}", str(data.get("DHO_REVISION", ""))):
        yield f"ConfigMap: DHO_REVISION is {data.get('DHO_REVISION')!r}; expected 64 hex digits, as `dho publish` prints them"
    if not re.fullmatch(r"s3://[^/]+(/.*)?", str(data.get("DHO_REMOTE", ""))):
        yield f"ConfigMap: DHO_REMOTE is {data.get('DHO_REMOTE')!r}; expected s3://bucket/prefix, the project's DVC remote"
    for name, value in data.items():
        if not isinstance(value, str):
            yield f"ConfigMap: {name} is {value!r}; expected text in quotes"
        if _SECRET_NAME.search(name) or _SECRET_VALUE.search(str(value)):
            yield f"ConfigMap: {name} looks like a secret; put it into a Secret that is mounted as a file"


def _pod(pod: Document) -> Iterator[str]:
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
        yield f"terminationGracePeriodSeconds is {grace}; expected more than {TORCHRUN_GRACE_S}, which torchrun gives for a checkpoint"
    for key in ("not-ready", "unreachable"):
        seconds = [
            t.get("tolerationSeconds", 0)
            for t in pod.get("tolerations", [])
            if t.get("key") == f"node.kubernetes.io/{key}"
        ]
        if not seconds or not 0 < seconds[0] <= LOST_NODE_S:
            yield f"no toleration of node.kubernetes.io/{key} for 1 to {LOST_NODE_S} s; by default a lost node's pod is left for 300 s"
    if not pod.get("initContainers"):
        yield "no init container; expected one that runs `dho job pull`, which brings the data"
    if not any(container["name"] == "pytorch" for container in pod["containers"]):
        yield f"container {pod['containers'][0]['name']!r} is not named pytorch; the operator looks for that name"


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
            yield f"volume {name!r} is a hostPath; expected a PersistentVolumeClaim or emptyDir (PodSecurity restricted)"
    for container in pod["containers"]:
        shm = [
            defined.get(mount["name"], {})
            for mount in container.get("volumeMounts", [])
            if mount["mountPath"] == "/dev/shm"
        ]
        if not shm or shm[0].get("emptyDir", {}).get("medium") != "Memory":
            yield f"container {container['name']} has no memory-backed /dev/shm; expected emptyDir: {{medium: Memory}} mounted there"
        elif (size := quantity(shm[0]["emptyDir"].get("sizeLimit", "0"))) > (limit := _limit(container, "memory")) > 0:
            yield f"/dev/shm may take {size / 2**30:g} GiB of container {container['name']}'s memory limit of {limit / 2**30:g} GiB"


def _references(pod: Document, documents: list[Document], nodes: int) -> Iterator[str]:
    """What the pod names must be among the documents; Secrets are not, they are made by hand."""
    there = {(document["kind"], document["metadata"]["name"]): document for document in documents}
    wanted = [("ServiceAccount", pod.get("serviceAccountName", "default"))]
    wanted += [
        ("PersistentVolumeClaim", v["persistentVolumeClaim"]["claimName"])
        for v in pod.get("volumes", [])
        if "persistentVolumeClaim" in v
    ]
    for container in containers(pod):
        wanted += [
            ("ConfigMap", source["configMapRef"]["name"])
            for source in container.get("envFrom", [])
            if "configMapRef" in source
        ]
    for reference in dict.fromkeys(wanted):
        if reference not in there:
            yield f"it uses {reference[0]} {reference[1]!r}, which is not among the documents"
        elif (
            reference[0] == "PersistentVolumeClaim"
            and nodes > 1
            and "ReadWriteMany" not in there[reference]["spec"]["accessModes"]
        ):
            yield f"PersistentVolumeClaim {reference[1]!r} is not ReadWriteMany; {nodes} nodes share it"


def _container(container: Document, pod: Document) -> Iterator[str]:
    image = container.get("image", "")
    name, _, digest = image.partition("@")
    tag = name.rsplit("/", 1)[-1].partition(":")[2]
    if not image or re.search(r"\s", image):
        yield f"image is {image!r}; expected registry/name:tag"
    elif not digest and tag in ("", "latest"):
        yield f"image {image} has no fixed tag; expected name:version or name@sha256:..., so that every node runs the same"
    resources = container.get("resources", {})
    for part in ("requests", "limits"):
        for amount in ("cpu", "memory"):
            if amount not in resources.get(part, {}):
                yield f"resources.{part} has no {amount}"
    for amount, value in resources.get("requests", {}).items():
        if amount in resources.get("limits", {}) and quantity(value) > quantity(resources["limits"][amount]):
            yield f"it requests {amount} {value}, more than its limit {resources['limits'][amount]}"
    security = container.get("securityContext", {})
    if security.get("allowPrivilegeEscalation") is not False or security.get("privileged"):
        yield "securityContext.allowPrivilegeEscalation is not false (PodSecurity restricted)"
    if "ALL" not in security.get("capabilities", {}).get("drop", []):
        yield "securityContext drops not ALL capabilities (PodSecurity restricted)"
    if security.get("readOnlyRootFilesystem") is not True:
        yield "securityContext.readOnlyRootFilesystem is not true"
    if security.get("runAsUser", pod.get("securityContext", {}).get("runAsUser")) == 0:
        yield "securityContext.runAsUser is 0, root"


def _secrets(container: Document) -> Iterator[str]:
    for variable in container.get("env", []):
        name, value = variable["name"], str(variable.get("value", ""))
        if _SECRET_VALUE.search(value) or (value and _SECRET_NAME.search(name) and not value.startswith("/")):
            yield f"env {name} has what looks like a secret as its value; put it into a Secret that is mounted as a file"
        if "secretKeyRef" in variable.get("valueFrom", {}):
            yield f"env {name} takes a Secret into the environment, where every child process has it; mount it as a file"


def _processes(container: Document, pod: Document, processes: str) -> Iterator[str]:
    resources = container.get("resources", {})
    gpus = resources.get("limits", {}).get(GPU)
    if not re.fullmatch(r"[1-9]\d*", processes):
        yield f"spec.nprocPerNode is {processes!r}; expected a number of processes in quotes"
    elif gpus is not None and str(gpus) != processes:
        yield f"{gpus} GPUs for spec.nprocPerNode {processes}; expected one process a GPU"
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
