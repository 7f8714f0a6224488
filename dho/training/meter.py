"""Sums of losses on the device, images per second, and the share of time spent waiting for data."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from dho.core.process import Process, mean_over_ranks
from dho.data.streams import Batch
from dho.training.checkpoint import State


class Meter:
    """Mean losses, images per second and the share of time spent waiting for data, over an interval of steps.

    Only `read` waits for the device.

    Args:
        process: this rank.
        state: whose unfinished interval is continued.
    """

    sums: dict[str, Tensor]

    def __init__(self, process: Process, state: State) -> None:
        self.process = process
        self._reset()
        self.sums = {name: torch.tensor(value, device=process.device) for name, value in state.interval.items()}
        self.steps = state.interval_steps

    def _reset(self) -> None:
        self.sums = {}
        self.steps, self.images, self.waited, self.since = 0, 0, 0.0, time.perf_counter()

    def save(self, state: State) -> None:
        """Store the sums of an unfinished interval in the state; every rank must call."""
        sums = mean_over_ranks(torch.stack(list(self.sums.values())), self.process).tolist() if self.sums else []
        state.interval, state.interval_steps = dict(zip(self.sums, sums, strict=True)), self.steps

    def timed(self, batches: Iterator[tuple[int, Batch]]) -> Iterator[tuple[int, Batch]]:
        """Pass batches on and count the seconds spent waiting for them."""
        while True:
            start = time.perf_counter()
            item = next(batches, None)
            self.waited += time.perf_counter() - start
            if item is None:
                return
            yield item

    def add(self, losses: dict[str, Tensor], images: int) -> None:
        """Add the losses of one step (scalars, detached) and its number of images over all ranks."""
        for name, value in losses.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1
        self.images += images

    def read(self) -> dict[str, float]:
        """Return the metrics of the interval and start a new one; every rank must call.

        Returns:
            `train/loss/total` and `train/loss/<term>`, means over steps and ranks; `system/images_per_s` over all
            ranks; `system/data_share`, the share of time spent waiting for data.
        """
        means = mean_over_ranks(torch.stack(list(self.sums.values())) / self.steps, self.process).tolist()
        seconds = time.perf_counter() - self.since
        names = ("total" if name == "loss" else name for name in self.sums)
        metrics = {f"train/loss/{name}": value for name, value in zip(names, means, strict=True)}
        metrics |= {"system/images_per_s": self.images / seconds, "system/data_share": self.waited / seconds}
        self._reset()
        return metrics
