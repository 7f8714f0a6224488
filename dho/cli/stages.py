"""Commands of the workflow: one per stage, in the order of the story."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from dho.cli.options import PARAMS, WORKFLOW, Params
from dho.config import load
from dho.core.errors import STOPPED, ConfigError
from dho.core.workspace import FOLDERS, Workspace
from dho.stages import STAGES, run, words

At = Annotated[
    list[str] | None,
    typer.Option("--at", metavar="FOLDER=PATH", help="A folder of the workspace that is elsewhere.", hidden=True),
]


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for stage in STAGES.values():
        command = _teach if stage.name == "teach" else _command(stage.name)
        app.command(stage.name, help=f"{stage.title}.", rich_help_panel=WORKFLOW)(command)


def _command(name: str) -> Callable[..., None]:
    def command(params: Params = PARAMS, at: At = None) -> None:
        _run(name, params, at)

    return command


def _teach(
    params: Params = PARAMS,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Replace a store that was made from something else.")
    ] = False,
    at: At = None,
) -> None:
    _run("teach", params, at, rebuild=rebuild)


def _run(name: str, params: Path, at: list[str] | None, **options: Any) -> None:
    places = [word for place in at or [] for word in ("--at", place)]
    again = [*words(name, options), "--params", str(params), *places]
    if run(name, load(params), _workspace(at), again=again, **options) is False:
        raise typer.Exit(STOPPED)


def _workspace(at: list[str] | None) -> Workspace:
    places = dict(place.partition("=")[::2] for place in at or [])
    if unknown := sorted(set(places) - set(FOLDERS)):
        raise ConfigError(f"--at names {unknown[0]!r}; expected one of {', '.join(FOLDERS)}")
    return Workspace(**places)
