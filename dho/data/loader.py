"""Values made ahead of time by loading processes, in order.

    for batch in loader(make_batch, 0, steps, workers=2):
        ...

The result is a function of `make` alone: neither the number of processes nor their speed changes it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


class _Batches(Dataset[Any]):
    def __init__(self, make: Callable[[int], Any], count: int) -> None:
        self.make, self.count = make, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Any:
        return self.make(number)


def loader(
    make: Callable[[int], Any], first: int, count: int, workers: int, pin_memory: bool = False
) -> DataLoader[Any]:
    """Iterate over `make(first), ..., make(count - 1)`, in order, made ahead of time by `workers` processes.

    Args:
        make: picklable, and a function of its argument alone.
        first, count: the numbers that `make` is given, `range(first, count)`.
        workers: processes; with 0, everything happens in this one.
        pin_memory: whether tensors are put into page-locked memory, for copies to a GPU.
    """
    return DataLoader(
        _Batches(make, count),
        batch_size=None,
        sampler=range(first, count),
        num_workers=workers,
        worker_init_fn=_outlive_signals,
        prefetch_factor=4 if workers else None,
        pin_memory=pin_memory,
    )


def _outlive_signals(_: int) -> None:
    # torchrun signals the whole process group. A worker that died at once would take the step away from under the
    # trainer, which is still to finish it and write a checkpoint; workers end when the trainer does.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
