"""Progress bars with rate and time left; silent when the output is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

T = TypeVar("T")


class _Rate(ProgressColumn):
    """Items a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "-/s")


def bar(show: bool = True) -> Progress:
    """A bar of description, share, count, rate, time left and the free text field `note`; disabled where nobody would see it."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        disable=not (show and sys.stderr.isatty()),
    )


def progress(items: Iterable[T], description: str, total: int | None = None, unit: int = 1, show: bool = True) -> Iterator[T]:
    """Pass items on while a bar counts them, each for `unit`; `total` is in items and read off `items` when it has a length."""
    count = total if total is not None else len(items) if isinstance(items, Sized) else None
    with bar(show) as shown:
        task = shown.add_task(description, total=None if count is None else count * unit, note="")
        for item in items:
            yield item
            shown.advance(task, unit)
