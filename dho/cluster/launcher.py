"""`dho launch`: render, check, submit, follow; and how a stage runs where `launch.target` is kubernetes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dho.cluster.checks import check
from dho.cluster.job import Document, Launch, elastic_range, job_kind
from dho.cluster.manifest import render
from dho.cluster.revision import Remote, collect, publish
from dho.config import Config, KubernetesConfig
from dho.core.errors import INTERRUPTED, NOT_STARTED, SUCCEEDED, ClusterError
from dho.core.workspace import Workspace


def launch_of(config: KubernetesConfig, stage: str = "train") -> Launch:
    """Make a launch of `launch.kubernetes` in params.yaml; raises `ClusterError`."""
    return Launch(
        nodes=config.nodes,
        gpus=config.gpus,
        elastic=elastic_range(config.elastic) if config.elastic is not None else None,
        queue=config.queue,
        image=config.image,
        stage=stage,
        kind=config.kind,
    )


def prepare(launch: Launch) -> list[Document]:
    """Render the documents of a launch and check them.

    Raises:
        ClusterError: one line for each rule that they break, or what `dho.cluster.manifest.render` raises.
        ConfigError: there is no such kind of job.
    """
    kind = job_kind(launch.kind)
    documents = render(launch, kind)
    check(documents, kind)
    return documents


def published(launch: Launch, root: Path) -> Launch:
    """Publish what is in the project's folder now, where the launch names no revision.

    Returns:
        The launch with a revision, and named after it where it had no name.

    Raises:
        DhoError: as `dho.cluster.revision.publish`.
    """
    if launch.revision is None:
        revision = publish(root, launch.stage)
        launch = replace(launch, revision=revision, remote=Remote.of_project(root).url)
    return replace(launch, name=launch.name or f"dho-{launch.stage}-{(launch.revision or '')[:8]}")


def run_stage(stage: str, config: Config, workspace: Workspace, **_: Any) -> None:
    """Run a stage as a job on the cluster, wait for its end and bring its outputs here.

    A job that does so already is followed, not started twice.

    Raises:
        DhoError: nothing could be published, the job is not one that could run, or it did not end as Succeeded.
    """
    from dho.cluster.api import connect
    from dho.cluster.follow import follow

    settings = config.launch.kubernetes
    launch = launch_of(settings, stage)
    prepare(launch)  # before minutes of upload
    launch = published(launch, workspace.root)
    documents = prepare(launch)
    kind = job_kind(launch.kind)
    name = kind.job(documents)["metadata"]["name"]
    cluster = connect(settings.namespace, kind)
    existing = cluster.job(name)
    if existing is not None and kind.phase(existing) == "Failed":
        cluster.delete(name)
        cluster.wait_until_gone(name)
        existing = None
    if existing is None:
        cluster.submit(documents)
    print(f"launch: {name} in namespace {settings.namespace}", flush=True)
    status = follow(cluster, name)
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    if status != SUCCEEDED:
        ended = "has not started" if status == NOT_STARTED else "failed"
        raise ClusterError(f"{stage} on the cluster {ended}: `dho logs {name} --namespace {settings.namespace}`")
    collect(workspace, str(launch.revision), stage)
