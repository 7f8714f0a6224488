"""The command line's part about the registry: `dho promote`, `rollback`, `registry`, `lineage`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dho.config import load
from dho.core.workspace import Workspace
from dho.registry import CANDIDATE, CHAMPION

REFUSED = 3
"""Exit code of a promotion or rollback that is refused; nothing was changed then."""
Params = Annotated[Path, typer.Option("--params", help="Parameter file.")]
PARAMS = Path("params.yaml")


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
