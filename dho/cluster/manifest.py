"""The manifests that `dho launch` sends: base and overlays of k8s/ as kustomize puts them together, with this launch's numbers and names.

    documents = render(Launch(nodes=64, gpus=8, name="dho-train-1", revision=revision))

Nothing else about a job is decided here: what pods look like stands in k8s/ alone.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonpatch
import yaml

from dho.core.errors import ClusterError

FAULTS = 10
"""Lost processes or nodes that a job survives; the operator's backoffLimit is this many for each replica (see k8s/base/pytorchjob.yaml)."""
LARGEST_JOB = 1024
"""Nodes."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
Document = dict[str, Any]


@dataclass(frozen=True)
class Launch:
    """What one launch chooses; raises `ClusterError` on values that contradict each other."""

    nodes: int = 2
    gpus: int | None = None
    """GPUs, and processes, a node; None trains on CPUs with one process a node."""
    elastic: tuple[int, int] | None = None
    """Fewest and most nodes with which training goes on; None needs all of them all the time."""
    queue: str | None = None
    """Kueue's LocalQueue."""
    image: str | None = None
    """None takes that of k8s/base."""
    name: str | None = None
    """Of the job and of its ConfigMap; None takes those of k8s/."""
    stage: str = "train"
    revision: str | None = None
    """64 hex digits as `dho publish` prints them; None takes that of k8s/base."""
    remote: str | None = None
    """s3://bucket/prefix that holds the revision; None takes that of k8s/base."""

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= LARGEST_JOB:
            raise ClusterError(f"nodes is {self.nodes}; expected 1 to {LARGEST_JOB}")
        if self.gpus is not None and not 1 <= self.gpus <= 16:
            raise ClusterError(f"gpus is {self.gpus}; expected 1 to 16 a node, or leave it out to train on CPUs")
        if self.elastic is not None:
            low, high = self.elastic
            if not 1 <= low <= high <= LARGEST_JOB:
                raise ClusterError(f"elastic is {low}:{high}; expected MIN:MAX with 1 <= MIN <= MAX <= {LARGEST_JOB}")
            if not low <= self.nodes <= high:
                raise ClusterError(f"nodes is {self.nodes}; expected {low} to {high}, as elastic says")
        if self.stage not in ("train", "teach"):
            raise ClusterError(f"stage is {self.stage!r}; expected train or teach")
        if self.revision is not None and not re.fullmatch(r"[0-9a-f]{64}", self.revision):
            raise ClusterError(f"revision is {self.revision!r}; expected 64 hex digits, as `dho publish` prints them")
        if self.remote is not None and not re.fullmatch(r"s3://[^/]+(/.*)?", self.remote):
            raise ClusterError(f"remote is {self.remote!r}; expected s3://bucket/prefix")
        if self.queue is not None and not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", self.queue):
            raise ClusterError(
                f"queue is {self.queue!r}; expected the name of a LocalQueue: small letters, digits and -"
            )

    def overlays(self) -> list[str]:
        """Folders of k8s/overlays in the order in which they are applied; `elastic` takes the Master away that the others still patch."""
        chosen = ["cpu" if self.gpus is None else "gpu"]
        chosen += ["teach"] if self.stage == "teach" else []
        chosen += ["elastic"] if self.elastic else []
        return chosen + (["kueue"] if self.queue else [])


def elastic_range(text: str) -> tuple[int, int]:
    """`1:4` as numbers; raises `ClusterError`."""
    if not (match := re.fullmatch(r"(\d+):(\d+)", text)):
        raise ClusterError(f"elastic is {text!r}; expected MIN:MAX, the fewest and the most nodes, as in 1:4")
    return int(match[1]), int(match[2])


def folder() -> Path:
    """The k8s folder: that of the project one stands in, else of this checkout, else the installed package's."""
    package = Path(__file__).parent.parent
    for place in (Path("k8s"), package.parent / "k8s", package / "k8s"):
        if (place / "base/pytorchjob.yaml").is_file():
            return place
    raise ClusterError(
        "no folder k8s with base/pytorchjob.yaml here; install the package again, or run this in the project's folder"
    )


def render(launch: Launch) -> list[Document]:
    """Every document that the job needs, the PyTorchJob last.

    Raises:
        ClusterError: a file of k8s/ is missing or cannot be read, or a patch does not fit the base.
    """
    documents = kustomized(launch.overlays())
    job, environment = kind(documents, "PyTorchJob"), kind(documents, "ConfigMap")
    _size(job, launch)
    if launch.name is not None:
        _rename(job, environment, launch.name)
    if launch.image is not None:
        for pod in pod_specs(job):
            for container in containers(pod):
                container["image"] = launch.image
    if launch.queue is not None:
        job["metadata"]["labels"][QUEUE_LABEL] = launch.queue
    if launch.revision is not None:
        environment["data"]["DHO_REVISION"] = launch.revision
    if launch.remote is not None:
        environment["data"]["DHO_REMOTE"] = launch.remote
    return documents


def kustomized(overlays: list[str]) -> list[Document]:
    """The documents of k8s/base with the patches of overlays upon them, as `kubectl kustomize` gives them for each overlay alone."""
    place = folder()
    documents: list[Document] = _load(place / "base/pytorchjob.yaml")
    for overlay in overlays:
        documents = _overlaid(documents, place / "overlays" / overlay)
    return documents


def to_yaml(documents: list[Document]) -> str:
    """Text for `kubectl apply -f -`."""
    return yaml.dump_all(documents, Dumper=_NoAliases, sort_keys=False, width=140)


def kind(documents: list[Document], name: str) -> Document:
    """The one document of a kind; raises `ClusterError`."""
    found = [document for document in documents if document.get("kind") == name]
    if len(found) != 1:
        raise ClusterError(f"k8s/base/pytorchjob.yaml: {len(found)} documents of kind {name}; expected one")
    return found[0]


def pod_specs(job: Document) -> list[Document]:
    """The pod specs of a PyTorchJob, Master's first."""
    return [replica["template"]["spec"] for replica in job["spec"]["pytorchReplicaSpecs"].values()]


def containers(pod: Document) -> list[Document]:
    """All containers of a pod spec, those of the initialisation first."""
    return [*pod.get("initContainers", []), *pod["containers"]]


def backoff_limit(replicas: int) -> int:
    """Restarts, summed over all pods, after which the operator gives a job up."""
    return FAULTS * replicas


class _NoAliases(yaml.SafeDumper):
    """Both replicas are written out, so that a person may change one of them."""

    def ignore_aliases(self, _data: Any) -> bool:
        return True


def _load(path: Path) -> list[Any]:
    """The documents of a file. What YAML says once and uses twice comes as two copies, as to kustomize: patches change one of them."""
    try:
        documents = yaml.load_all(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return [json.loads(json.dumps(document)) for document in documents]
    except OSError as error:
        raise ClusterError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ClusterError(f"{path}: {' '.join(str(error).split())}") from error


def _overlaid(documents: list[Document], overlay: Path) -> list[Document]:
    """Apply the JSON6902 patches of an overlay's kustomization; kustomize features that are not ours are refused, never left out."""
    (settings,) = _load(overlay / "kustomization.yaml")
    unknown = set(settings) - {"apiVersion", "kind", "resources", "patches"}
    if unknown:
        raise ClusterError(
            f"{overlay}/kustomization.yaml: dho launch knows no {', '.join(sorted(unknown))}; write it as a patch"
        )
    for patch in settings["patches"]:
        target = patch["target"]
        hits = [i for i, document in enumerate(documents) if document["kind"] == target["kind"]]
        (operations,) = _load(overlay / patch["path"])
        for i in hits:
            try:
                documents[i] = jsonpatch.apply_patch(documents[i], operations)
            except (jsonpatch.JsonPatchException, jsonpatch.JsonPointerException) as error:
                raise ClusterError(
                    f"{overlay / patch['path']} does not fit k8s/base/pytorchjob.yaml: {error}"
                ) from error
    return documents


def _size(job: Document, launch: Launch) -> None:
    """Set nodes, GPUs, what goes with each GPU, and the restarts that so many nodes may take."""
    spec = job["spec"]
    replicas = spec["pytorchReplicaSpecs"]
    if launch.elastic is not None:
        replicas["Worker"]["replicas"] = launch.nodes
        spec["elasticPolicy"]["minReplicas"], spec["elasticPolicy"]["maxReplicas"] = launch.elastic
    elif launch.nodes == 1:
        del replicas["Worker"]
    else:
        replicas["Worker"]["replicas"] = launch.nodes - 1
    most = launch.elastic[1] if launch.elastic else launch.nodes
    spec["runPolicy"]["backoffLimit"] = backoff_limit(most)
    if launch.gpus is not None:
        share = launch.gpus / int(spec["nprocPerNode"])
        spec["nprocPerNode"] = str(launch.gpus)
        for pod in pod_specs(job):
            for amounts in pod["containers"][0]["resources"].values():
                for name, amount in amounts.items():
                    amounts[name] = _scaled(amount, share)
            for volume in pod["volumes"]:
                if volume.get("emptyDir", {}).get("medium") == "Memory":
                    volume["emptyDir"]["sizeLimit"] = _scaled(volume["emptyDir"]["sizeLimit"], share)


def _scaled(amount: str, share: float) -> str:
    """A quantity such as 8, 500m or 64Gi times `share`, rounded up to a whole number of its unit."""
    match = re.fullmatch(r"(\d+)([A-Za-z]*)", str(amount))
    if match is None:
        raise ClusterError(f"k8s/overlays/gpu: quantity {amount!r}; expected a whole number and a unit, as in 64Gi")
    return f"{math.ceil(int(match[1]) * share)}{match[2]}"


def _rename(job: Document, environment: Document, name: str) -> None:
    """Name the job, and give it a ConfigMap of its own: another launch must not change what this one's pods read when they start again."""
    old = environment["metadata"]["name"]
    job["metadata"]["name"] = environment["metadata"]["name"] = name
    for pod in pod_specs(job):
        for container in containers(pod):
            for source in container.get("envFrom", []):
                if source.get("configMapRef", {}).get("name") == old:
                    source["configMapRef"]["name"] = name
