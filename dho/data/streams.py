"""The two streams of Algorithm 1: labelled batches that cycle, unlabelled batches that make the epochs.

    streams = Streams(index, store, config, process)
    for step, batch in streams.from_step(0):
        batch["labelled"]       # "pixels": uint8 [n, size, size, 3], "label": int64 [n], "embedding": float16 [n, dim]
        batch["unlabelled"]     # the same without "label"

Everything is a function of (seed, step, rank): the position of the streams is the step number, so resuming needs
nothing else. Every image of an epoch is used exactly once, on exactly one rank: an epoch is cut into equal steps (sizes
differ by at most one image), and a step into equal shares. Nothing is padded and nothing is lost.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dho.config import Config
from dho.core.errors import ConfigError
from dho.core.partition import partition
from dho.core.process import Process, loading_processes
from dho.data.index import Index
from dho.data.loader import loader
from dho.data.pixels import KEEP_BYTES, Pixels

ALIGNMENT = 16
"""Bytes; a packed tensor begins at a multiple of it, as the largest dtype asks."""

Batch = dict[str, dict[str, Tensor]]
Layout = list[tuple[str, str, torch.dtype, tuple[int, ...], int]]
"""Stream, name, dtype, shape and first byte of every tensor of a packed batch."""
Rows = npt.NDArray[np.int64]


class Embeddings(Protocol):
    """The teacher's embeddings by rows of the index, as a teacher store has them; instances go to worker processes."""

    def embeddings(self, rows: Rows, views: Rows) -> npt.NDArray[np.float16]:
        """Return the embedding of one view of each row: float16 [n, dim]."""


@dataclass(frozen=True)
class StreamPlan:
    """Which images, in which view, make up every step; sizes are over all ranks.

    Args:
        labelled, unlabelled: rows of the index that each stream draws from.
        batch_labelled, batch_unlabelled: images per step; the latter at most, as an epoch is cut into equal steps.
        views: number of views V.
        seed: of both orders.
    """

    labelled: Rows
    unlabelled: Rows
    batch_labelled: int
    batch_unlabelled: int
    views: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps that one pass over the unlabelled stream takes."""
        return -(-len(self.unlabelled) // self.batch_unlabelled)

    def unlabelled_at(self, step: int) -> tuple[Rows, Rows]:
        """Return rows and views of the unlabelled batch of a step: int64 [n] each. Epoch e uses view e mod V."""
        epoch, place = divmod(step, self.steps_per_epoch)
        chosen = partition(len(self.unlabelled), place, self.steps_per_epoch)
        rows = self.unlabelled[_order(self.seed, 1, epoch, len(self.unlabelled))[chosen.start : chosen.stop]]
        return rows, np.full(len(rows), epoch % self.views)

    def labelled_at(self, step: int) -> tuple[Rows, Rows]:
        """Return rows and views of the labelled batch of a step: int64 [batch_labelled] each.

        Pass p of the cycle uses view p mod V.
        """
        positions = np.arange(step * self.batch_labelled, (step + 1) * self.batch_labelled)
        passes, places = np.divmod(positions, len(self.labelled))
        rows = np.concatenate(
            [self.labelled[_order(self.seed, 0, p, len(self.labelled))[places[passes == p]]] for p in np.unique(passes)]
        )
        return rows, passes % self.views


@functools.lru_cache(maxsize=4)
def _order(seed: int, stream: int, number: int, count: int) -> Rows:
    return np.random.default_rng([seed, stream, number]).permutation(count)


def plan(index: Index, config: Config) -> StreamPlan:
    """Return the streams of a training, from the index and the parameters."""
    train = config.train
    both = ("labelled", "unlabelled") if train.unlabelled_includes_labelled else ("unlabelled",)
    return StreamPlan(
        labelled=index.rows("labelled"),
        unlabelled=index.rows(*both),
        batch_labelled=train.batch_labelled,
        batch_unlabelled=train.batch_unlabelled,
        views=config.views.count,
        seed=train.seed,
    )


class Streams:
    """This rank's share of both streams, loaded by worker processes.

    Args:
        index: the images.
        store: the teacher's embeddings of them.
        config: batch sizes, views, the student's input.
        process: rank and world size.
        uses: the streams that the method needs; the others are not loaded.

    Raises:
        ConfigError: a batch is too small to give every rank and micro-batch an image.
    """

    def __init__(
        self,
        index: Index,
        store: Embeddings,
        config: Config,
        process: Process,
        uses: tuple[str, ...] = ("labelled", "unlabelled"),
    ) -> None:
        self.plan = plan(index, config)
        self.process = process
        self.workers = loading_processes(config.launch.workers, process.device)
        self.epochs = config.train.epochs
        self._make = functools.partial(
            _load,
            self.plan,
            Pixels(index, config.views, config.student.input_size, config.student.interpolation, KEEP_BYTES),
            store,
            index.labels,
            uses,
            process.rank,
            process.world_size,
        )
        smallest = {
            "labelled": self.plan.batch_labelled,
            "unlabelled": len(self.plan.unlabelled) // self.plan.steps_per_epoch,
        }
        for name in uses:
            shares = process.world_size * config.train.accumulate
            if smallest[name] < shares:
                raise ConfigError(
                    f"train.batch_{name} gives steps of {smallest[name]} images; expected at least {shares} "
                    f"({process.world_size} ranks x train.accumulate {config.train.accumulate}), "
                    "so that each has an image"
                )

    @property
    def steps(self) -> int:
        """Number of steps of the whole training."""
        return self.plan.steps_per_epoch * self.epochs

    def from_step(self, step: int) -> Iterator[tuple[int, Batch]]:
        """Yield (step, this rank's batch) from step number `step` to the last."""
        packed = loader(self._make, step, self.steps, self.workers, pin_memory=self.process.device.type == "cuda")
        return zip(range(step, self.steps), itertools.starmap(unpack, packed), strict=True)

    def sizes(self, step: int) -> dict[str, int]:
        """Return the number of images of each stream in a step, over all ranks."""
        place = step % self.plan.steps_per_epoch
        return {
            "labelled": self.plan.batch_labelled,
            "unlabelled": len(partition(len(self.plan.unlabelled), place, self.plan.steps_per_epoch)),
        }


def _load(
    plan: StreamPlan,
    pixels: Pixels,
    store: Embeddings,
    labels: Rows,
    uses: tuple[str, ...],
    rank: int,
    world_size: int,
    step: int,
) -> tuple[Tensor, Layout]:
    batch: Batch = {}
    for name in uses:
        rows, views = plan.labelled_at(step) if name == "labelled" else plan.unlabelled_at(step)
        share = partition(len(rows), rank, world_size)
        rows, views = rows[share.start : share.stop], views[share.start : share.stop]
        keep = name == "labelled" and len(plan.labelled) * plan.views * pixels.size**2 * 3 <= KEEP_BYTES
        entries: dict[str, Any] = {
            "pixels": pixels.batch(rows, views, keep),
            "embedding": torch.from_numpy(store.embeddings(rows, views)),
        }
        if name == "labelled":
            entries["label"] = torch.from_numpy(labels[rows])
        batch[name] = entries
    return pack(batch)


def pack(batch: Batch) -> tuple[Tensor, Layout]:
    """Pack a batch into one tensor of bytes, with where in it everything is.

    Every tensor that leaves a loading process costs a connection; one is cheaper than five.
    """
    pieces: list[Tensor] = []
    layout: Layout = []
    end = 0
    for stream, entries in batch.items():
        for key, value in entries.items():
            layout.append((stream, key, value.dtype, tuple(value.shape), end))
            data = value.contiguous().view(-1).view(torch.uint8)
            padding = -len(data) % ALIGNMENT
            pieces += [data, data.new_zeros(padding)]
            end += len(data) + padding
    return torch.cat(pieces), layout


def unpack(packed: Tensor, layout: Layout) -> Batch:
    """Return what `pack` was given; its tensors share the memory of `packed`."""
    batch: Batch = {}
    for stream, key, dtype, shape, start in layout:
        data = packed[start : start + math.prod(shape) * dtype.itemsize]
        batch.setdefault(stream, {})[key] = data.view(dtype).view(shape)
    return batch
