"""The command line: one command a stage, in the order of the story, and `predict`.

Stages read `params.yaml` and the folders of the stage before, as `dvc.yaml` names them; `dvc repro` runs all that is out of date.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import sys
import typing
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dho import __version__
from dho.cli import models as cli_registry
from dho.config import Config, KubernetesConfig, load
from dho.core.errors import DhoError
from dho.core.workspace import Workspace

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

app = typer.Typer(
    name="dho",
    help="Dual-Head Optimization: a vision-language teacher, few labels and many unlabelled images make a small, fast classifier.\n\n"
    "The stages, in order: fetch, prepare, pretrain, teach, train, evaluate, register. `dvc repro` runs those that are out of date.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
job = typer.Typer(
    help="What the pods of a PyTorchJob run; `dho launch` and k8s/ start these, people do not.", no_args_is_help=True
)
app.add_typer(job, name="job")
Params = Annotated[Path, typer.Option("--params", help="Parameter file.")]
PARAMS = Path("params.yaml")


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"dho {__version__}")
        raise typer.Exit


@app.command()
def fetch(params: Params = PARAMS) -> None:
    """Bring the raw files of the data set here, by whichever way works, and check them."""
    from dho.data.fetch import fetch

    fetch(load(params), Workspace())


@app.command()
def prepare(params: Params = PARAMS) -> None:
    """Check every image, draw the splits, write tar shards and the index."""
    from dho.data.prepare import prepare

    prepare(load(params), Workspace())


@app.command()
def pretrain(params: Params = PARAMS) -> None:
    """Train the stand-in teacher on images and captions (nothing to do with a real CLIP)."""
    from dho.teacher.pretrain import pretrain

    pretrain(load(params), Workspace())


@app.command()
def teach(
    params: Params = PARAMS,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Replace a store that was made from something else.")
    ] = False,
) -> None:
    """Run the teacher once over every (image, view) and write the teacher store."""
    if _on_cluster(params, "teach", Workspace().teacher):
        return
    config = _in_torchrun(params, "teach", *(["--rebuild"] if rebuild else []))
    from dho.core.process import process_group
    from dho.teacher.teach import teach

    with process_group() as process:
        teach(config, Workspace(), process, rebuild)


@app.command()
def train(params: Params = PARAMS) -> None:
    """Train the student on both streams; interrupted, it goes on where it stopped."""
    if _on_cluster(params, "train", Workspace().trained):
        return
    config = _in_torchrun(params, "train")
    from dho.core.process import process_group
    from dho.training.train import STOPPED, train

    with process_group() as process:
        finished = train(config, Workspace(), process)
    if not finished:
        raise typer.Exit(STOPPED)


@app.command()
def evaluate(params: Params = PARAMS) -> None:
    """Choose alpha and beta on val, measure both heads, their combination and the teacher, draw the plots."""
    from dho.evaluation import evaluate as report

    metrics = report.evaluate(load(params), Workspace())
    _print_metrics(metrics)


@app.command()
def register(params: Params = PARAMS) -> None:
    """Put the student into MLflow's model registry as a version with the alias `candidate`."""
    from dho.registry.register import register

    register(load(params), Workspace())


@app.command()
def results() -> None:
    """Print the table of accuracies that `evaluate` measured on test."""
    import json

    from dho.core.errors import DataError

    try:
        _print_metrics(json.loads(Workspace().metrics.read_text()))
    except OSError as error:
        raise DataError(f"{Workspace().metrics}: {error.strerror}; run the evaluate stage") from error


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files; with --model also folders.")],
    top: Annotated[int, typer.Option(help="Labels to print for each image.", min=1)] = 3,
    alpha: Annotated[float | None, typer.Option(help="Weight of the CE head; default: as tuned.", min=0, max=1)] = None,
    beta: Annotated[
        float | None, typer.Option(help="Temperature of the KD head; default: as tuned.", min=0.001)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Registered model, models:/NAME@ALIAS, instead of the student here.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Parquet file for the answers of --model.")] = None,
    params: Params = PARAMS,
) -> None:
    """Label images with the trained student: labels and probabilities, most likely first; or with a registered model, into a file."""
    if (model is None) != (out is None):
        raise typer.BadParameter("--model and --out go together")
    if model is not None and out is not None:
        from dho.registry.batch_predict import batch_predict

        good, unread = batch_predict(load(params).tracking, model, images, out, top)
        print(f"predict: {out} holds {good} images" + (f", and {unread} that cannot be read" if unread else ""))
        return
    from dho.evaluation.predict import predict

    bad = 0
    for path, answer in predict(Workspace(), images, alpha, beta):
        if isinstance(answer, str):
            print(f"dho: {path}: {answer}", file=sys.stderr)
            bad += 1
        else:
            print(f"{path}\t" + "\t".join(f"{label} {probability:.3f}" for label, probability in answer[:top]))
    if bad:
        raise typer.Exit(1)


class Stage(StrEnum):
    """Stages that also run on a cluster."""

    teach = "teach"
    train = "train"


@app.command()
def publish(
    stage: Annotated[Stage, typer.Option("--for", help="The stage that pods are to run.")] = Stage.train,
    pin: Annotated[
        Path | None, typer.Option("--pin", help="A manifest to write the revision into, e.g. k8s/base/pytorchjob.yaml.")
    ] = None,
) -> None:
    """Push data, parameters and lock to the DVC remote as a pinned revision that pods of a cluster can work from; print it."""
    from dho.cluster.revision import pin_manifest
    from dho.cluster.revision import publish as publish_revision

    revision = publish_revision(Path(), stage.value)
    if pin is not None:
        pin_manifest(pin, revision)
    print(revision)


Namespace = Annotated[
    str | None, typer.Option("--namespace", "-n", help="Namespace of the jobs; default: launch.kubernetes.namespace.")
]


@app.command()
def launch(
    params: Params = PARAMS,
    stage: Annotated[Stage, typer.Option(help="What the job runs.")] = Stage.train,
    nodes: Annotated[int | None, typer.Option(help="Pods, each on a node of its own where there are enough.")] = None,
    gpus: Annotated[
        int | None, typer.Option(help="GPUs, and processes, a node; without it: CPUs, one process a node.")
    ] = None,
    elastic: Annotated[str | None, typer.Option(help="MIN:MAX nodes with which training goes on.")] = None,
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
    """Run a stage as a PyTorchJob on Kubernetes and follow it; options win over launch.kubernetes in params.yaml.

    Exit status: 0 as the job succeeds, 1 as it fails or is refused, 4 when it did not start in time, 130 on Ctrl-C; then it goes on.
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

    cluster = connect(settings.namespace)
    wanted = published(wanted, Path())
    cluster.submit(prepare(wanted))
    print(f"launch: {wanted.name} in namespace {settings.namespace}, revision {wanted.revision}", flush=True)
    raise typer.Exit(follow(cluster, str(wanted.name), start_timeout))


@app.command()
def jobs(params: Params = PARAMS, namespace: Namespace = None) -> None:
    """List the jobs of this project on the cluster."""
    from dho.cluster.api import phase, replicas

    table = Table("job", "phase", "nodes", "since")
    for found in _cluster(params, namespace).jobs():
        metadata = found["metadata"]
        table.add_row(metadata["name"], phase(found), str(replicas(found)), metadata["creationTimestamp"])
    Console().print(table)


@app.command()
def logs(
    name: Annotated[str, typer.Argument(help="Of the job.")],
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job ends, as `dho launch` does.")
    ] = False,
    pod: Annotated[str | None, typer.Option(help="master-0, worker-3, ...; default: the one with rank 0.")] = None,
    params: Params = PARAMS,
    namespace: Namespace = None,
) -> None:
    """Print the log of a job's rank 0."""
    from dho.cluster.api import rank_zero
    from dho.cluster.follow import follow as follow_job

    cluster = _cluster(params, namespace)
    if (found := cluster.job(name)) is None:
        raise cluster.no_job(name)
    if follow:
        raise typer.Exit(follow_job(cluster, name))
    print(cluster.log(f"{name}-{pod}" if pod else rank_zero(found)), end="")


@app.command()
def stop(
    name: Annotated[str, typer.Argument(help="Of the job.")], params: Params = PARAMS, namespace: Namespace = None
) -> None:
    """Delete a job; its pods write a checkpoint first, and the same job launched again goes on from there."""
    _cluster(params, namespace).delete(name)
    print(f"stop: {name} is being deleted; its checkpoints stay")


def _cluster(params: Path, namespace: str | None) -> Any:
    from dho.cluster.api import connect

    return connect(namespace or _kubernetes(params).namespace)


def _kubernetes(params: Path) -> KubernetesConfig:
    """`launch.kubernetes`; its defaults in a folder without params.yaml, where jobs can be looked at as well."""
    return load(params).launch.kubernetes if params.exists() or params != PARAMS else KubernetesConfig()


@job.command("pull")
def job_pull(stage: Annotated[Stage, typer.Option("--for", help="The stage that will run.")] = Stage.train) -> None:
    """Bring parameters and data of revision DHO_REVISION from the DVC remote DHO_REMOTE into this folder."""
    from dho.cluster.revision import Remote, fetch

    fetch(Remote.of_environment(), os.environ.get("DHO_REVISION", ""), Path(), stage.value)


@job.command("train")
def job_train(params: Params = PARAMS) -> None:
    """Train under torchrun; rank 0 then evaluates, registers and pushes the results to the DVC remote."""
    config = _in_torchrun(params, "job", "train")
    from dho.cluster.pod import train_in_pod
    from dho.core.process import process_group
    from dho.training.train import STOPPED

    with process_group() as process:
        finished = train_in_pod(config, process)
    if not finished:
        raise typer.Exit(STOPPED)


@job.command("teach")
def job_teach(params: Params = PARAMS) -> None:
    """Write the teacher store under torchrun, each rank its shards; rank 0 then pushes it to the DVC remote."""
    config = _in_torchrun(params, "job", "teach")
    from dho.cluster.pod import teach_in_pod
    from dho.core.process import process_group

    with process_group() as process:
        teach_in_pod(config, process)


for command in (cli_registry.promote, cli_registry.rollback, cli_registry.registry, cli_registry.lineage):
    app.command()(command)


@app.command()
def params() -> None:
    """Print every setting of params.yaml with its default and its meaning."""
    table = Table("setting", "default", "meaning")
    for key, field in _settings(Config, ""):
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        choices = field.metadata.get("choices")
        meaning = field.metadata["doc"] + (f" One of {', '.join(map(str, choices))}." if choices else "")
        table.add_row(key, _short(default), meaning)
    Console().print(table)


def _settings(cls: Any, prefix: str) -> typing.Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _settings(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field


def _short(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) < 40 else text[:36] + " ..."


def _on_cluster(params: Path, stage: str, out: Path) -> bool:
    """Whether params.yaml sends a stage to a cluster; it has then run there, and its outputs are in `out`."""
    config = load(params)
    if config.launch.target != "kubernetes":
        return False
    from dho.cluster.launcher import run_stage
    from dho.cluster.revision import collect

    collect(Path(), run_stage(config, stage), stage, out)
    return True


def _in_torchrun(params: Path, *command: str) -> Config:
    """The config, read in a process of torchrun; when torchrun has not started this process, start it and never return."""
    from dho.training.torchrun import exec_torchrun, under_torchrun

    config = load(params)
    if not under_torchrun():
        exec_torchrun(config, [*command, "--params", str(params)])
    return config


def _print_metrics(metrics: dict[str, Any]) -> None:
    from dho.evaluation.metrics import table

    columns, rows = table(metrics)
    shown = Table(*columns)
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)


def main(*arguments: str) -> None:
    """Entry point; an error the user can mend is one line on standard error and exit code 1.

    Args:
        arguments: what to run instead of the command line's words (pipelines/).
    """
    from dho.training.torchrun import under_torchrun

    try:
        app(list(arguments) or None)
    except (DhoError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NO_ROOM:
            raise
        # In a pod RANK is the node's number until torchrun has started: only then do other ranks leave the word to rank 0.
        if not under_torchrun() or os.environ["RANK"] == "0":
            print(
                f"dho: {error}" + ("; make room, then run it again" if isinstance(error, OSError) else ""),
                file=sys.stderr,
            )
        sys.exit(1)


if __name__ == "__main__":
    main()
