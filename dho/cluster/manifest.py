"""The manifests that `dho launch` sends: what kustomize makes of k8s/, with one launch's numbers and names.

    from dho.cluster.job import Launch
    documents = render(Launch(nodes=64, gpus=8, name="dho-train-1", revision="0" * 64))

Nothing else about a job is decided here: what pods look like stands in k8s/ alone.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import jsonpatch
import yaml

from dho.cluster.job import QUEUE_LABEL, Document, JobKind, Launch, containers, job_kind
from dho.core.errors import ClusterError


def render(launch: Launch, kind: JobKind | None = None) -> list[Document]:
    """Make every document that the job needs, the job itself last.

    Args:
        launch: what is asked for.
        kind: of the job; None takes the one that `launch.kind` names.

    Raises:
        ClusterError: the kind cannot do what is asked for, a file of k8s/ is missing or cannot be read, or a patch does
            not fit the base.
        ConfigError: there is no such kind.
    """
    kind = kind or job_kind(launch.kind)
    kind.refuse(launch)
    documents = kustomized(kind, launch.overlays())
    job, environment = kind.job(documents), kind.environment(documents)
    processes = kind.processes(documents)
    kind.size(documents, launch)
    if launch.gpus is not None:
        _scale(documents, kind, launch.gpus, processes)
    if launch.name is not None:
        _rename(documents, kind, launch.name)
    if launch.image is not None:
        for pod in kind.pods(documents).values():
            for container in containers(pod):
                container["image"] = launch.image
    if launch.queue is not None:
        job["metadata"]["labels"][QUEUE_LABEL] = launch.queue
    if launch.revision is not None:
        environment["data"]["DHO_REVISION"] = launch.revision
    if launch.remote is not None:
        environment["data"]["DHO_REMOTE"] = launch.remote
    return documents


def kustomized(kind: JobKind, overlays: list[str]) -> list[Document]:
    """Apply overlays to a kind's base, each as `kubectl kustomize` applies it alone; raises `ClusterError`."""
    k8s = folder(kind)
    documents: list[Document] = _load(k8s / kind.base)
    for overlay in overlays:
        documents = _overlaid(documents, k8s / kind.overlays / overlay, kind)
    return documents


def folder(kind: JobKind) -> Path:
    """Find the folder k8s that holds a kind's base: the working folder's, this checkout's or the installed package's.

    Raises:
        ClusterError: there is none.
    """
    package = Path(__file__).parent.parent
    for place in (Path("k8s"), package.parent / "k8s", package / "k8s"):
        if (place / kind.base).is_file():
            return place
    raise ClusterError(
        f"no folder k8s with {kind.base} here; install the package again, or run this in the project's folder"
    )


def to_yaml(documents: list[Document]) -> str:
    """Text for `kubectl apply -f -`."""
    return yaml.dump_all(documents, Dumper=_NoAliases, sort_keys=False, width=140)


class _NoAliases(yaml.SafeDumper):
    """Writes out all replicas, so that a person may change one of them."""

    def ignore_aliases(self, _data: Any) -> bool:
        return True


def _load(path: Path) -> list[Any]:
    """The documents of a file; an alias becomes a copy, as with kustomize, so that a patch changes one of both."""
    try:
        documents = yaml.load_all(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return [json.loads(json.dumps(document)) for document in documents]
    except OSError as error:
        raise ClusterError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ClusterError(f"{path}: {' '.join(str(error).split())}") from error


def _overlaid(documents: list[Document], overlay: Path, kind: JobKind) -> list[Document]:
    """Apply the JSON6902 patches of an overlay's kustomization; its other features are refused, never ignored."""
    (settings,) = _load(overlay / "kustomization.yaml")
    unknown = set(settings) - {"apiVersion", "kind", "resources", "patches"}
    if unknown:
        raise ClusterError(
            f"{overlay}/kustomization.yaml: dho launch knows no {', '.join(sorted(unknown))}; write it as a patch"
        )
    for patch in settings["patches"]:
        targets = [i for i, document in enumerate(documents) if document["kind"] == patch["target"]["kind"]]
        (operations,) = _load(overlay / patch["path"])
        for i in targets:
            try:
                documents[i] = jsonpatch.apply_patch(documents[i], operations)
            except (jsonpatch.JsonPatchException, jsonpatch.JsonPointerException) as error:
                raise ClusterError(f"{overlay / patch['path']} does not fit k8s/{kind.base}: {error}") from error
    return documents


def _scale(documents: list[Document], kind: JobKind, gpus: int, processes: str) -> None:
    """Give each GPU its share of processors, memory and shared memory; overlay gpu has them for `processes` GPUs."""
    place = f"k8s/{kind.overlays}/gpu"
    if not re.fullmatch(r"[1-9]\d*", processes):
        raise ClusterError(
            f"{place}: {kind.processes_field} is {processes!r}; expected a number of processes in quotes"
        )
    share = gpus / int(processes)
    for pod in kind.pods(documents).values():
        for amounts in pod["containers"][0]["resources"].values():
            for name, amount in amounts.items():
                amounts[name] = _scaled(amount, share, place)
        for volume in pod["volumes"]:
            if volume.get("emptyDir", {}).get("medium") == "Memory":
                volume["emptyDir"]["sizeLimit"] = _scaled(volume["emptyDir"]["sizeLimit"], share, place)


def _scaled(amount: str, share: float, place: str) -> str:
    """A quantity such as 8, 500m or 64Gi times `share`, rounded up to a whole number of its unit."""
    match = re.fullmatch(r"(\d+)([A-Za-z]*)", str(amount))
    if match is None:
        raise ClusterError(f"{place}: quantity {amount!r}; expected a whole number and a unit, as in 64Gi")
    return f"{math.ceil(int(match[1]) * share)}{match[2]}"


def _rename(documents: list[Document], kind: JobKind, name: str) -> None:
    """Name the job, and give it a ConfigMap of its own.

    Another launch would otherwise change what the pods of this one read when they restart.
    """
    job, environment = kind.job(documents), kind.environment(documents)
    old = environment["metadata"]["name"]
    job["metadata"]["name"] = environment["metadata"]["name"] = name
    for pod in kind.pods(documents).values():
        for container in containers(pod):
            for source in container.get("envFrom", []):
                if source.get("configMapRef", {}).get("name") == old:
                    source["configMapRef"]["name"] = name
