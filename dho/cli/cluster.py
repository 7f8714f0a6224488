"""Commands of a cluster: publish data, launch jobs, look at them; and what the pods of a job run."""

from __future__ import annotations

import dataclasses
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from dho.cli.options import CLUSTER, PARAMS, Namespace, Params
from dho.config import KubernetesConfig, load
from dho.core.environment import under_torchrun
from dho.core.errors import STOPPED
from dho.core.workspace import Workspace
from dho.stages import STAGES

Stage = StrEnum("Stage", {stage.name: stage.name for stage in STAGES.values() if stage.cluster})  # type: ignore[misc]
"""Stages that can be a job on a cluster."""
TRAIN = Stage("train")

job = typer.Typer(
    help="What the pods of a job run; `dho launch` and k8s/ start these, people do not.", no_args_is_help=True
)


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (publish, launch, jobs, logs, stop):
        app.command(rich_help_panel=CLUSTER)(command)
    app.add_typer(job, name="job", rich_help_panel=CLUSTER)


def publish(
    stage: Annotated[Stage, typer.Option("--for", help="The stage that pods are to run.")] = TRAIN,
    pin: Annotated[
        Path | None, typer.Option("--pin", help="A manifest to write the revision into, e.g. k8s/pytorchjob.yaml.")
    ] = None,
) -> None:
    """Push data, parameters and lock to the DVC remote as a pinned revision for the pods of a cluster; print it."""
    from dho.cluster.revision import pin_manifest
    from dho.cluster.revision import publish as publish_revision

    revision = publish_revision(Path(), stage.value)
    if pin is not None:
        pin_manifest(pin, revision)
    print(revision)


def launch(
    params: Params = PARAMS,
    stage: Annotated[Stage, typer.Option(help="What the job runs.")] = TRAIN,
    nodes: Annotated[int | None, typer.Option(help="Pods, each on a node of its own where there are enough.")] = None,
    gpus: Annotated[
        int | None, typer.Option(help="GPUs, and processes, per node; without it: CPUs, one process per node.")
    ] = None,
    elastic: Annotated[str | None, typer.Option(help="MIN:MAX nodes with which training continues.")] = None,
    queue: Annotated[str | None, typer.Option(help="Kueue's LocalQueue.")] = None,
    image: Annotated[str | None, typer.Option(help="Image of the pods.")] = None,
    namespace: Namespace = None,
    name: Annotated[str | None, typer.Option(help="Of the job; default: dho-STAGE-REVISION.")] = None,
    revision: Annotated[
        str | None, typer.Option(help="As `dho publish` printed it; default: publish this folder now.")
    ] = None,
    start_timeout: Annotated[float, typer.Option(help="Seconds in which the job must start.", min=1)] = 600,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the manifests and send nothing.")] = False,
) -> None:
    """Run a stage as a job on Kubernetes and follow it; options win over launch.kubernetes in params.yaml.

    Exit status: 0 as the job succeeds, 1 as it fails or is refused, 4 when it did not start in time, 130 on Ctrl-C;
    which leaves it running.
    """
    from dho.cluster.launcher import launch_of, prepare, published
    from dho.cluster.manifest import to_yaml

    settings = _kubernetes(params)
    given: dict[str, Any] = {
        "nodes": nodes,
        "gpus": gpus,
        "elastic": elastic,
        "queue": queue,
        "image": image,
        "namespace": namespace,
    }
    settings = dataclasses.replace(settings, **{key: value for key, value in given.items() if value is not None})
    wanted = dataclasses.replace(launch_of(settings, stage.value), name=name, revision=revision)
    documents = prepare(wanted)
    if dry_run:
        print(to_yaml(documents), end="")
        return
    from dho.cluster.api import connect
    from dho.cluster.follow import follow
    from dho.cluster.job import job_kind

    cluster = connect(settings.namespace, job_kind(settings.kind))
    wanted = published(wanted, Path())
    cluster.submit(prepare(wanted))
    print(f"launch: {wanted.name} in namespace {settings.namespace}, revision {wanted.revision}", flush=True)
    raise typer.Exit(follow(cluster, str(wanted.name), start_timeout))


def jobs(params: Params = PARAMS, namespace: Namespace = None) -> None:
    """List the jobs of this project on the cluster."""
    from rich.console import Console
    from rich.table import Table

    cluster = _cluster(params, namespace)
    table = Table("job", "phase", "nodes", "since")
    for document in cluster.jobs():
        metadata, nodes = document["metadata"], str(cluster.kind.replicas(document))
        table.add_row(metadata["name"], cluster.kind.phase(document), nodes, metadata["creationTimestamp"])
    Console().print(table)


def logs(
    name: Annotated[str, typer.Argument(help="Of the job.")],
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Follow the job to its end, as `dho launch` does.")
    ] = False,
    pod: Annotated[str | None, typer.Option(help="master-0, worker-3, ...; default: the one with rank 0.")] = None,
    params: Params = PARAMS,
    namespace: Namespace = None,
) -> None:
    """Print the log of a job's rank 0."""
    from dho.cluster.follow import follow as follow_job

    cluster = _cluster(params, namespace)
    if (document := cluster.job(name)) is None:
        raise cluster.no_job(name)
    if follow:
        raise typer.Exit(follow_job(cluster, name))
    print(cluster.log(cluster.pod(name, pod or cluster.kind.rank_zero(document))), end="")


def stop(
    name: Annotated[str, typer.Argument(help="Of the job.")], params: Params = PARAMS, namespace: Namespace = None
) -> None:
    """Delete a job; its pods write a checkpoint first, and the same job launched again resumes from there."""
    _cluster(params, namespace).delete(name)
    print(f"stop: {name} is being deleted; its checkpoints stay")


def _cluster(params: Path, namespace: str | None) -> Any:
    from dho.cluster.api import connect
    from dho.cluster.job import job_kind

    settings = _kubernetes(params)
    return connect(namespace or settings.namespace, job_kind(settings.kind))


def _kubernetes(params: Path) -> KubernetesConfig:
    """`launch.kubernetes`; its defaults in a folder without params.yaml, where jobs can be looked at as well."""
    return load(params).launch.kubernetes if params.exists() or params != PARAMS else KubernetesConfig()


@job.command("pull")
def job_pull(stage: Annotated[Stage, typer.Option("--for", help="The stage that will run.")] = TRAIN) -> None:
    """Bring parameters and data of revision DHO_REVISION from the DVC remote DHO_REMOTE into this folder."""
    from dho.cluster.revision import Remote, fetch

    fetch(Remote.of_environment(), os.environ.get("DHO_REVISION", ""), Path(), stage.value)


@job.command("train")
def job_train(params: Params = PARAMS) -> None:
    """Train under torchrun; rank 0 then evaluates, registers and pushes the results to the DVC remote."""
    if _in_pod("train", params) is False:
        raise typer.Exit(STOPPED)


@job.command("teach")
def job_teach(params: Params = PARAMS) -> None:
    """Write the teacher store under torchrun, each rank its shards; rank 0 then pushes it to the DVC remote."""
    _in_pod("teach", params)


def _in_pod(stage: str, params: Path) -> Any:
    """Run a stage in a process of torchrun; where torchrun has not started this process, start it and never return."""
    from dho.training.torchrun import exec_torchrun

    config = load(params)
    if not under_torchrun():
        exec_torchrun(config, ["job", stage, "--params", str(params)])
    from dho.cluster.pod import run_in_pod
    from dho.core.process import process_group

    with process_group() as process:
        return run_in_pod(stage, config, Workspace(), process)
