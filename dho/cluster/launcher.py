"""`dho launch`: render, check, submit, follow; and what `dho train` and `dho teach` do where `launch.target` is kubernetes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dho.cluster.checks import check
from dho.cluster.manifest import Document, Launch, elastic_range, kind, render
from dho.cluster.revision import collect
from dho.config import Config, KubernetesConfig
from dho.core.errors import ClusterError
from dho.core.workspace import Workspace


def launch_of(config: KubernetesConfig, stage: str = "train") -> Launch:
    """`launch.kubernetes` of params.yaml as a launch; raises `ClusterError`."""
    elastic = elastic_range(config.elastic) if config.elastic is not None else None
    return Launch(
        nodes=config.nodes, gpus=config.gpus, elastic=elastic, queue=config.queue, image=config.image, stage=stage
    )


def prepare(launch: Launch) -> list[Document]:
    """Documents that keep every rule; raises `ClusterError` with one line for each that one breaks."""
    documents = render(launch)
    check(documents)
    return documents


def published(launch: Launch, root: Path) -> Launch:
    """The same launch of what is in the project's folder now, sent to the DVC remote; named after it where it has no name.

    Raises:
        DhoError: as `dho.cluster.revision.publish`.
    """
    if launch.revision is None:
        from dho.cluster.revision import Remote, publish

        revision = publish(root, launch.stage)
        launch = replace(launch, revision=revision, remote=Remote.of_project(root).url)
    return replace(launch, name=launch.name or f"dho-{launch.stage}-{(launch.revision or '')[:8]}")


def run_stage(stage: str, config: Config, workspace: Workspace, **_: Any) -> None:
    """Run a stage as a job on the cluster, wait for its end and bring its outputs here.

    A job that does so already is followed, not started twice.

    Raises:
        DhoError: nothing could be published, the job is not one that could run, or it did not end as Succeeded.
    """
    from dho.cluster.api import connect, phase
    from dho.cluster.follow import INTERRUPTED, NOT_STARTED, SUCCEEDED, follow

    settings = config.launch.kubernetes
    launch = launch_of(settings, stage)
    prepare(launch)  # before minutes of upload
    launch = published(launch, workspace.root)
    documents = prepare(launch)
    name = kind(documents, "PyTorchJob")["metadata"]["name"]
    cluster = connect(settings.namespace)
    there = cluster.job(name)
    if there is not None and phase(there) == "Failed":
        cluster.delete(name)
        cluster.wait_until_gone(name)
        there = None
    if there is None:
        cluster.submit(documents)
    print(f"launch: {name} in namespace {settings.namespace}", flush=True)
    status = follow(cluster, name)
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    if status != SUCCEEDED:
        ended = "has not started" if status == NOT_STARTED else "failed"
        raise ClusterError(f"{stage} on the cluster {ended}: `dho logs {name} --namespace {settings.namespace}`")
    collect(workspace, str(launch.revision), stage)
