"""Progress: bars with rate and time left on a terminal; elsewhere plain lines of the training every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

T = TypeVar("T")


class _Rate(ProgressColumn):
    """Items per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "-/s")


def bar(show: bool = True) -> Progress:
    """Return a bar of description, share, count, rate, time left and the text field `note`.

    Args:
        show: false disables it, as does a standard error that is not a terminal.
    """
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


LINE_EVERY_S = 5.0
"""At least this many seconds lie between two lines."""


def progress_lines(show: bool = True) -> Callable[[int, int, float, float], None]:
    """Return a function that prints for logs what the bar shows on a terminal.

    `dho launch` reads these lines in a pod's log. On a terminal, where there is a bar, nothing is printed.

    Returns:
        A function of step, steps, loss and images per second, which prints at most one line per `LINE_EVERY_S` seconds.
    """
    last = -LINE_EVERY_S

    def line(step: int, steps: int, loss: float, images_per_s: float) -> None:
        nonlocal last
        now = time.monotonic()
        if show and not sys.stderr.isatty() and (now - last >= LINE_EVERY_S or step == steps):
            print(f"train: step {step}/{steps} loss {loss:.3f} {images_per_s:.0f} images/s", flush=True)
            last = now

    return line


def progress(
    items: Iterable[T], description: str, total: int | None = None, unit: int = 1, show: bool = True
) -> Iterator[T]:
    """Pass items on while a bar counts them.

    Args:
        items: whatever is counted.
        description: shown before the bar.
        total: number of items; by default the length of `items`, where it has one.
        unit: how much an item counts for.
        show: as for `bar`.
    """
    count = total if total is not None else len(items) if isinstance(items, Sized) else None
    with bar(show) as shown:
        task = shown.add_task(description, total=None if count is None else count * unit, note="")
        for item in items:
            yield item
            shown.advance(task, unit)
