"""The command line: one command a stage, in the order of the story, and `predict`.

Stages read `params.yaml` and the folders of the stage before, as `dvc.yaml` names them; `dvc repro` runs all that is out of date.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import typing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dho import __version__
from dho.config import Config, load
from dho.errors import DhoError

RAW, PREPARED, PRETRAINED, STORE = Path("data/raw"), Path("data/prepared"), Path("data/pretrained"), Path("data/teacher")
TRAINED, EVALUATED, REGISTERED = Path("outputs/train"), Path("outputs/evaluate"), Path("outputs/register.json")
CHECKPOINTS = Path("checkpoints")
REFUSED = 3
"""Exit code of a promotion or rollback that is refused; nothing was changed then."""

app = typer.Typer(
    name="dho",
    help="Dual-Head Optimization: a vision-language teacher, few labels and many unlabelled images make a small, fast classifier.\n\n"
    "The stages, in order: fetch, prepare, pretrain, teach, train, evaluate, register. `dvc repro` runs those that are out of date.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
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

    fetch(load(params).data, RAW)


@app.command()
def prepare(params: Params = PARAMS) -> None:
    """Check every image, draw the splits, write tar shards and the index."""
    from dho.data.prepare import prepare

    prepare(load(params).data, RAW, PREPARED)


@app.command()
def pretrain(params: Params = PARAMS) -> None:
    """Train the stand-in teacher on images and captions (nothing to do with a real CLIP)."""
    from dho.teacher.pretrain import pretrain

    pretrain(load(params), PREPARED, PRETRAINED)


@app.command()
def teach(
    params: Params = PARAMS,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Replace a store that was made from something else.")] = False,
) -> None:
    """Run the teacher once over every (image, view) and write the teacher store."""
    config = _in_torchrun(params, "teach", *(["--rebuild"] if rebuild else []))
    from dho.distributed import process_group
    from dho.teacher.teach import teach

    with process_group() as process:
        teach(config, PREPARED, STORE, process, rebuild)


@app.command()
def train(params: Params = PARAMS) -> None:
    """Train the student on both streams; interrupted, it goes on where it stopped."""
    config = _in_torchrun(params, "train")
    from dho.distributed import process_group
    from dho.trainer import STOPPED, train

    with process_group() as process:
        finished = train(config, PREPARED, STORE, TRAINED, CHECKPOINTS, process)
    if not finished:
        raise typer.Exit(STOPPED)


@app.command()
def evaluate(params: Params = PARAMS) -> None:
    """Choose alpha and beta on val, measure both heads, their combination and the teacher, draw the plots."""
    from dho import report

    metrics = report.evaluate(load(params), PREPARED, STORE, TRAINED, EVALUATED, CHECKPOINTS / "unsent")
    _print_metrics(metrics)


@app.command()
def register(params: Params = PARAMS) -> None:
    """Put the student into MLflow's model registry as a version with the alias `candidate`."""
    from dho.lineage import Sources
    from dho.registry import register

    config = load(params)
    sources = Sources(PREPARED, STORE, EVALUATED / "plots")
    done = register(config, TRAINED / "student", EVALUATED / "metrics.json", REGISTERED, sources)
    print(f"register: models:/{done['name']}@candidate is version {done['version']}")
    if config.registry.promote == "auto":
        from dho.promotion import promote

        _print_decision(promote(config, PREPARED), "champion")


@app.command()
def results() -> None:
    """Print the table of accuracies that `evaluate` measured on test."""
    import json

    from dho.errors import DataError
    from dho.report import METRICS

    try:
        _print_metrics(json.loads((EVALUATED / METRICS).read_text()))
    except OSError as error:
        raise DataError(f"{EVALUATED / METRICS}: {error.strerror}; run the evaluate stage") from error


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files; with --model also folders.")],
    top: Annotated[int, typer.Option(help="Labels to print for each image.", min=1)] = 3,
    alpha: Annotated[float | None, typer.Option(help="Weight of the CE head; default: as tuned.", min=0, max=1)] = None,
    beta: Annotated[float | None, typer.Option(help="Temperature of the KD head; default: as tuned.", min=0.001)] = None,
    model: Annotated[str | None, typer.Option(help="Registered model, models:/NAME@ALIAS, instead of the student here.")] = None,
    out: Annotated[Path | None, typer.Option(help="Parquet file for the answers of --model.")] = None,
    params: Params = PARAMS,
) -> None:
    """Label images with the trained student: labels and probabilities, most likely first; or with a registered model, into a file."""
    if (model is None) != (out is None):
        raise typer.BadParameter("--model and --out go together")
    if model is not None and out is not None:
        from dho.score import score

        good, unread = score(load(params).tracking, model, images, out, top)
        print(f"predict: {out} holds {good} images" + (f", and {unread} that cannot be read" if unread else ""))
        return
    from dho.predict import predict

    bad = 0
    for path, answer in predict(TRAINED / "student", EVALUATED / "metrics.json", images, alpha, beta):
        if isinstance(answer, str):
            print(f"dho: {path}: {answer}", file=sys.stderr)
            bad += 1
        else:
            print(f"{path}\t" + "\t".join(f"{label} {probability:.3f}" for label, probability in answer[:top]))
    if bad:
        raise typer.Exit(1)


@app.command()
def promote(
    source: Annotated[str, typer.Option("--from", help="Alias or number of the version.")] = "candidate",
    target: Annotated[str, typer.Option("--to", help="Alias that it gets.")] = "champion",
    params: Params = PARAMS,
) -> None:
    """Check a version by the rules of params.yaml (registry.rules) and make it champion; exit code 3 when a rule refuses."""
    from dho.promotion import PromotionRefused
    from dho.promotion import promote as decide

    try:
        decision = decide(load(params), PREPARED, source, target)
    except PromotionRefused as refused:
        print(f"dho: {refused}", file=sys.stderr)
        raise typer.Exit(REFUSED) from refused
    _print_decision(decision, target)
    if not decision.promoted:
        raise typer.Exit(REFUSED)


@app.command()
def rollback(
    reason: Annotated[str, typer.Option(help="Why; kept in the tags.")],
    target: Annotated[str, typer.Option("--to", help="Alias that goes back.")] = "champion",
    params: Params = PARAMS,
) -> None:
    """Give the champion's alias back to the version that had it before."""
    from dho.promotion import PromotionRefused
    from dho.promotion import rollback as go_back

    config = load(params)
    try:
        old, new = go_back(config, reason, target)
    except PromotionRefused as refused:
        print(f"dho: {refused}", file=sys.stderr)
        raise typer.Exit(REFUSED) from refused
    print(f"rollback: models:/{config.registry.name}@{target} is version {new} again, no longer {old}")


@app.command()
def registry(params: Params = PARAMS) -> None:
    """List the versions with their aliases and metrics, and the story of promotions and rollbacks."""
    from dho.listing import listing

    columns, rows, story = listing(load(params))
    shown = Table(*columns)
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)
    for line in story:
        print(line)


@app.command()
def lineage(model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION.")], params: Params = PARAMS) -> None:
    """Print what made a registered version, and the commands that make it again."""
    from dho.lineage import lineage as trace

    facts, commands = trace(load(params).tracking, model)
    for key, value in facts.items():
        print(f"{key}: {value}")
    print("\nTo make it again, in a clone of the repository:")
    for command in commands:
        print(f"    {command}")


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


def _in_torchrun(params: Path, *command: str) -> Config:
    """The config, read in a process of torchrun; when torchrun has not started this process, start it and never return."""
    from dho.launch import exec_torchrun, under_torchrun

    config = load(params)
    if not under_torchrun():
        exec_torchrun(config, [*command, "--params", str(params)])
    return config


def _print_decision(decision: Any, target: str) -> None:
    """The table of rules of a promotion, and its outcome."""
    if decision.checks:
        shown = Table("rule", "value", "limit", "verdict")
        for check in decision.checks:
            shown.add_row(check.rule, check.value, check.limit, check.verdict)
        Console().print(shown)
    if decision.promoted:
        print(f"promote: models:/{decision.name}@{target} is version {decision.version}")
    else:
        print(f"promote: version {decision.version} of {decision.name} is refused, nothing was changed: " + "; ".join(decision.reasons))


def _print_metrics(metrics: dict[str, Any]) -> None:
    from dho.report import table

    shown = Table("test", "top-1", "top-5", "NLL", "ECE")
    for row in table(metrics):
        shown.add_row(*row)
    Console().print(shown)


def main(*arguments: str) -> None:
    """Entry point; an error the user can mend is one line on standard error and exit code 1.

    Args:
        arguments: what to run instead of the command line's words (pipelines/).
    """
    try:
        app(list(arguments) or None)
    except DhoError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"dho: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
