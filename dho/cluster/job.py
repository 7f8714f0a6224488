"""What a launch asks for, and what a kind of job is.

    launch = Launch(nodes=64, gpus=8)
    kind = job_kind(launch.kind)
    kind.refuse(launch)          # ClusterError where this kind cannot do what the launch asks for

A new kind of job is a subclass of `JobKind` in a file of its own, a folder of k8s/ and a row of `dho.catalogue.jobs`;
the rest of this room renders, checks, submits and follows jobs of any kind.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dho.catalogue import implementation
from dho.catalogue.jobs import DEFAULT_KIND, JOB_KINDS
from dho.cluster.revision import REMOTE_PATTERN, REVISION_PATTERN
from dho.core.errors import ClusterError, ConfigError

MAX_NODES = 1024
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
FEATURES = ("nodes", "gpus", "elastic", "queue", "teach")
"""What a launch may ask for and a kind may be unable to do: many nodes, GPUs, a number of nodes that changes, Kueue,
stage `teach`."""
Document = dict[str, Any]


@dataclass(frozen=True)
class Launch:
    """What one launch chooses; raises `ClusterError` on values that contradict each other."""

    nodes: int = 2
    gpus: int | None = None
    """GPUs per node, and as many processes; None trains on CPUs with one process per node."""
    elastic: tuple[int, int] | None = None
    """Fewest and most nodes with which training continues; None needs all of them all the time."""
    queue: str | None = None
    """Kueue's LocalQueue."""
    image: str | None = None
    """None takes that of k8s/."""
    name: str | None = None
    """Of the job and of its ConfigMap; None takes those of k8s/."""
    stage: str = "train"
    revision: str | None = None
    """64 hex digits as `dho publish` prints them; None takes that of k8s/."""
    remote: str | None = None
    """s3://bucket/prefix that holds the revision; None takes that of k8s/."""
    kind: str = DEFAULT_KIND
    """Row of `dho.catalogue.jobs`, or "module:Class"."""

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= MAX_NODES:
            raise ClusterError(f"nodes is {self.nodes}; expected 1 to {MAX_NODES}")
        if self.gpus is not None and not 1 <= self.gpus <= 16:
            raise ClusterError(f"gpus is {self.gpus}; expected 1 to 16 per node, or leave it out to train on CPUs")
        if self.elastic is not None:
            low, high = self.elastic
            if not 1 <= low <= high <= MAX_NODES:
                raise ClusterError(f"elastic is {low}:{high}; expected MIN:MAX with 1 <= MIN <= MAX <= {MAX_NODES}")
            if not low <= self.nodes <= high:
                raise ClusterError(f"nodes is {self.nodes}; expected {low} to {high}, as elastic says")
        if self.stage not in ("train", "teach"):
            raise ClusterError(f"stage is {self.stage!r}; expected train or teach")
        if self.revision is not None and not REVISION_PATTERN.fullmatch(self.revision):
            raise ClusterError(f"revision is {self.revision!r}; expected 64 hex digits, as `dho publish` prints them")
        if self.remote is not None and not REMOTE_PATTERN.fullmatch(self.remote):
            raise ClusterError(f"remote is {self.remote!r}; expected s3://bucket/prefix")
        if self.queue is not None and not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", self.queue):
            raise ClusterError(
                f"queue is {self.queue!r}; expected the name of a LocalQueue: small letters, digits and -"
            )

    def overlays(self) -> list[str]:
        """Name the overlays in the order of their application; `elastic` removes what those before it still patch."""
        chosen = ["cpu" if self.gpus is None else "gpu"]
        chosen += ["teach"] if self.stage == "teach" else []
        chosen += ["elastic"] if self.elastic else []
        return chosen + (["kueue"] if self.queue else [])

    def features(self) -> dict[str, str]:
        """Feature of `FEATURES` -> the option that asks for it, in a user's words."""
        asked: dict[str, str] = {}
        if self.nodes > 1:
            asked["nodes"] = f"nodes {self.nodes}"
        if self.gpus is not None:
            asked["gpus"] = f"gpus {self.gpus}"
        if self.elastic is not None:
            asked["elastic"] = f"elastic {self.elastic[0]}:{self.elastic[1]}"
        if self.queue is not None:
            asked["queue"] = f"queue {self.queue}"
        if self.stage == "teach":
            asked["teach"] = "stage teach"
        return asked


class JobKind(abc.ABC):
    """A kind of job: what is particular to the operator that runs it. Instances hold no state.

    `documents` are those of one job as k8s/ describes it; `job` is one document of this kind, as rendered or as the API
    server has it. A replica is one pod of a job, known by role and number: `worker-3`.
    """

    name: ClassVar[str]
    """`kind` of its document."""
    group: ClassVar[str]
    version: ClassVar[str]
    plural: ClassVar[str]
    """As in the API server's addresses."""
    folder: ClassVar[str]
    """In k8s/: it holds base/<folder>.yaml, and overlays/ with a folder per name of `Launch.overlays`."""
    container: ClassVar[str]
    """The container of each pod that trains."""
    job_label: ClassVar[str]
    """Label of a pod that holds its job's name."""
    processes_field: ClassVar[str]
    """Where the document has the number of processes per node, for messages."""
    operator: ClassVar[str]
    """What to install where the API server does not know this kind."""
    schema: ClassVar[Path]
    """Gzipped JSON file: the `openAPIV3Schema` of this kind's CustomResourceDefinition."""
    values: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Field -> values that the operator knows, where the schema lists none."""
    cannot: ClassVar[Mapping[str, str]] = {}
    """Feature of `FEATURES` -> why this kind cannot do it. A launch that asks for one is refused before any work."""

    @property
    def api_version(self) -> str:
        """`apiVersion` of its document."""
        return f"{self.group}/{self.version}"

    @property
    def base(self) -> str:
        """The file that holds every document of a job, relative to k8s/."""
        return f"{self.folder}/base/{self.folder}.yaml"

    @property
    def overlays(self) -> str:
        """The folder of the overlays, relative to k8s/."""
        return f"{self.folder}/overlays"

    def selector(self, name: str) -> str:
        """Label selector of a job's pods."""
        return f"{self.job_label}={name}"

    def job(self, documents: list[Document]) -> Document:
        """The one document of this kind; raises `ClusterError`."""
        return of_kind(documents, self.name, f"k8s/{self.base}")

    def environment(self, documents: list[Document]) -> Document:
        """The one ConfigMap, which holds what pods have in their environment; raises `ClusterError`."""
        return of_kind(documents, "ConfigMap", f"k8s/{self.base}")

    def refuse(self, launch: Launch) -> None:
        """Raise `ClusterError` where the launch asks for something that this kind cannot do."""
        for feature, asked in launch.features().items():
            if feature in self.cannot:
                raise ClusterError(
                    f"{self.name} cannot do {asked}: {self.cannot[feature]}; leave it out, or choose another "
                    "launch.kubernetes.kind"
                )

    @abc.abstractmethod
    def size(self, documents: list[Document], launch: Launch) -> None:
        """Set nodes, bounds of an elastic job, processes per node and the restarts that so many nodes may take."""

    @abc.abstractmethod
    def pods(self, documents: list[Document]) -> dict[str, Document]:
        """Role -> pod spec, the role of rank 0 first. A spec is a part of the documents: changing it changes them."""

    @abc.abstractmethod
    def processes(self, documents: list[Document]) -> str:
        """Processes per node as `processes_field` has them."""

    @abc.abstractmethod
    def problems(self, documents: list[Document]) -> Iterator[str]:
        """Yield one line for each thing that this kind's operator would accept and that is wrong all the same.

        Lines say where in the job it is; `dho.cluster.checks` puts the kind's name before them. The job keeps its
        schema, and each of its pods has a container. Rules that hold for the pods of every kind are not repeated here.
        """

    @abc.abstractmethod
    def replicas(self, job: Document) -> int:
        """Number of pods that a job asks for."""

    @abc.abstractmethod
    def min_replicas(self, job: Document) -> int:
        """Number of running pods with which a job counts as started."""

    @abc.abstractmethod
    def phase(self, job: Document) -> str:
        """The phase in one word: Succeeded or Failed at the end, Suspended in a queue, else what the operator says."""

    @abc.abstractmethod
    def rank_zero(self, job: Document) -> str:
        """The replica whose first process is rank 0."""

    @abc.abstractmethod
    def replica_of(self, pod: Document) -> str:
        """The replica that a pod is."""

    def failure(self, job: Document) -> str:
        """What the operator says about a job that has failed."""
        conditions = job.get("status", {}).get("conditions", [])
        return next((str(one.get("message", "")) for one in conditions if one["type"] == "Failed"), "")


def job_kind(name: str) -> JobKind:
    """The kind that the catalogue has under a name, or the class that "module:Class" names.

    Raises:
        ConfigError: there is no such row or class, or the class is not a complete kind of job.
    """
    if name not in JOB_KINDS and ":" not in name:
        raise ConfigError(f"kind of job is {name!r}; expected one of {', '.join(JOB_KINDS)}, or module:Class")
    cls = implementation(name, JOB_KINDS, JobKind)  # type: ignore[type-abstract]
    missing = sorted(cls.__abstractmethods__) + [key for key in JobKind.__annotations__ if not hasattr(cls, key)]
    if missing:
        raise ConfigError(f"{name}: it lacks {', '.join(missing)} of dho.cluster.job.JobKind")
    if unknown := sorted(set(cls.cannot) - set(FEATURES)):
        raise ConfigError(f"{name}: cannot names {', '.join(unknown)}; expected some of {', '.join(FEATURES)}")
    kind: JobKind = cls()
    return kind


def elastic_range(text: str) -> tuple[int, int]:
    """`1:4` as numbers; raises `ClusterError`."""
    if not (match := re.fullmatch(r"(\d+):(\d+)", text)):
        raise ClusterError(f"elastic is {text!r}; expected MIN:MAX, the fewest and the most nodes, as in 1:4")
    return int(match[1]), int(match[2])


def of_kind(documents: list[Document], name: str, where: str = "the manifests") -> Document:
    """The one document of a kind.

    Args:
        documents: where it is looked for.
        name: its `kind`.
        where: file that they come from, for the message.

    Raises:
        ClusterError: there is none, or more than one.
    """
    matches = [document for document in documents if document.get("kind") == name]
    if len(matches) != 1:
        raise ClusterError(f"{where}: {len(matches)} documents of kind {name}; expected one")
    return matches[0]


def containers(pod: Document) -> list[Document]:
    """All containers of a pod spec, the init containers first."""
    return [*pod.get("initContainers", []), *pod["containers"]]
