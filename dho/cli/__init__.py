"""The command line: `dho --help` lists the commands in four groups.

The commands of a stage read `params.yaml` and the folders of the stages before it, as `dvc.yaml` names them; `dvc
repro` runs all that is out of date.
"""

from __future__ import annotations

from typing import Annotated

import typer

from dho import __version__
from dho.cli import cluster, models, show, stages
from dho.core.errors import one_line_errors

app = typer.Typer(
    name="dho",
    help="Dual-Head Optimization: a vision-language teacher, few labels and many unlabelled images make a small, fast "
    "classifier.\n\n`dvc repro` runs the stages that are out of date.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"dho {__version__}")
        raise typer.Exit


for group in (stages, models, cluster, show):
    group.add_commands(app)


def main(*arguments: str) -> None:
    """Run the command line; an error that the user can fix is one line on standard error and exit status 1.

    Args:
        arguments: what to run instead of the command line's words.
    """
    with one_line_errors():
        app(list(arguments) or None)
