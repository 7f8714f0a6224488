"""Commands of models: predictions, the registry, promotion and lineage."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dho.cli.options import MODELS, PARAMS, Params
from dho.config import load
from dho.core.errors import REFUSED
from dho.core.workspace import Workspace
from dho.registry import CANDIDATE, CHAMPION


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (predict, promote, rollback, registry, lineage):
        app.command(rich_help_panel=MODELS)(command)


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
    """Label images with the trained student, most likely first; or with a registered model, into a file."""
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


def promote(
    candidate: Annotated[str, typer.Option("--from", help="Alias or number of the version.")] = CANDIDATE,
    target: Annotated[str, typer.Option("--to", help="Alias that it gets.")] = CHAMPION,
    params: Params = PARAMS,
) -> None:
    """Check a version by registry.rules of params.yaml and make it champion; exit status 3 when a rule refuses."""
    from dho.registry.lease import LeaseHeld
    from dho.registry.promote import PromotionRefused, print_decision
    from dho.registry.promote import promote as decide

    try:
        decision = decide(load(params), Workspace(), candidate, target)
    except (PromotionRefused, LeaseHeld) as refused:
        print(f"dho: {refused}", file=sys.stderr)
        raise typer.Exit(REFUSED) from refused
    print_decision(decision)
    if not decision.promoted:
        raise typer.Exit(REFUSED)


def rollback(
    reason: Annotated[str, typer.Option(help="Why; kept in the tags.")],
    target: Annotated[str, typer.Option("--to", help="Alias that goes back.")] = CHAMPION,
    params: Params = PARAMS,
) -> None:
    """Give the champion's alias back to the version that had it before."""
    from dho.registry.lease import LeaseHeld
    from dho.registry.promote import PromotionRefused
    from dho.registry.promote import rollback as go_back

    config = load(params)
    try:
        old, new = go_back(config, reason, target)
    except (PromotionRefused, LeaseHeld) as refused:
        print(f"dho: {refused}", file=sys.stderr)
        raise typer.Exit(REFUSED) from refused
    print(f"rollback: models:/{config.registry.name}@{target} is version {new} again, no longer {old}")


def registry(params: Params = PARAMS) -> None:
    """List the versions with their aliases and metrics, and the story of promotions and rollbacks."""
    from dho.registry.listing import listing

    columns, rows, story = listing(load(params))
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in [columns, *rows]:  # as wide as it is: a table that is fitted to 80 columns cannot be read
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for line in story:
        print(line)


def lineage(
    model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION.")], params: Params = PARAMS
) -> None:
    """Print what made a registered version, and the commands that make it again."""
    from dho.registry.lineage import lineage as trace

    facts, commands = trace(load(params).tracking, model)
    for key, value in facts.items():
        print(f"{key}: {value}")
    print("\nTo make it again, in a clone of the repository:")
    for command in commands:
        print(f"    {command}")
