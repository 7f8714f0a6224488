"""Commands that show what is there: results and settings."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator
from typing import Any

import typer

from dho.cli.options import SHOW
from dho.config import Config
from dho.core.errors import DataError
from dho.core.workspace import Workspace


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (results, params):
        app.command(rich_help_panel=SHOW)(command)


def results() -> None:
    """Print the table of accuracies that `evaluate` measured on test."""
    from dho.evaluation.evaluate import print_results

    path = Workspace().metrics
    try:
        metrics = json.loads(path.read_text())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; run the evaluate stage") from error
    print_results(metrics)


def params() -> None:
    """Print every setting of params.yaml with its default and its meaning."""
    from rich.console import Console
    from rich.table import Table

    table = Table("setting", "default", "meaning")
    for key, field in _settings(Config, ""):
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        choices = field.metadata.get("choices")
        meaning = field.metadata["doc"] + (f" One of {', '.join(map(str, choices))}." if choices else "")
        table.add_row(key, _short(default), meaning)
    Console().print(table)


def _settings(cls: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _settings(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field


def _short(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) < 40 else text[:36] + " ..."
