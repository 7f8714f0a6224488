"""Rows of the index to batches of pixels, in loader processes.

pixels = Pixels(index, config.views, size=224, interpolation="bicubic")
pixels.batch(rows, view=0)          # uint8 [n, 224, 224, 3], view 0 of every row
pixels.batch(rows, view=None)       # the plain centre view
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dho.config import ViewsConfig
from dho.core.errors import DataError
from dho.data.index import Index
from dho.data.views import random_view
from dho.runtime.dho_runtime import ImageRejected, centre_box, decode, render

KEEP_BYTES = 256 * 2**20
"""Decoded images that a process keeps for the next epoch, and views of the few labelled images, which come again in every other step: so
much for each."""


@dataclass
class Pixels:
    """Renders views of an index at one model's input size.

    Args:
        index, views, size, interpolation: what is rendered, and how.
        keep_bytes: memory for decoded images that a process keeps, first come first kept; of use where images come again.
    """

    index: Index
    views: ViewsConfig
    size: int
    interpolation: str
    keep_bytes: int = 0
    _views: dict[tuple[int, int | None], np.ndarray[Any, Any]] = field(default_factory=dict, repr=False)
    _images: dict[int, Image.Image] = field(default_factory=dict, repr=False)

    def batch(
        self,
        rows: Sequence[int] | np.ndarray[Any, Any],
        view: int | Sequence[int] | np.ndarray[Any, Any] | None,
        keep: bool = False,
    ) -> Tensor:
        """uint8 [n, size, size, 3]: of each row the view with its number (one for all, or one each), or the centre view for None.

        Args:
            rows, view: which.
            keep: remember what is rendered, in this process, for views that come again and again.

        Raises:
            DataError: an image cannot be decoded although `prepare` could (the shard was changed).
        """
        numbers = view if isinstance(view, Sequence | np.ndarray) else [view] * len(rows)
        out = np.empty((len(rows), self.size, self.size, 3), np.uint8)
        for i, (row, number) in enumerate(zip(rows, numbers, strict=True)):
            place = (int(row), number)
            if place in self._views:
                out[i] = self._views[place]
                continue
            self._render(int(row), [number], out[i : i + 1])
            if keep:
                self._views[place] = out[i].copy()
        return torch.from_numpy(out)

    def all_views(self, rows: Sequence[int] | np.ndarray[Any, Any], count: int | None) -> Tensor:
        """uint8 [n, count, size, size, 3]: views 0 to count - 1 of each row, each image decoded once; the centre view alone for None."""
        numbers: list[int | None] = [None] if count is None else list(range(count))
        out = np.empty((len(rows), len(numbers), self.size, self.size, 3), np.uint8)
        for i, row in enumerate(rows):
            self._render(int(row), numbers, out[i])
        return torch.from_numpy(out)

    def _decode(self, row: int) -> Image.Image:
        if row in self._images:
            return self._images[row]
        try:
            image = decode(self.index.read(row), max_pixels=sys.maxsize)  # `prepare` has applied `data.max_pixels`
        except ImageRejected as reason:
            raise DataError(
                f"image {self.index.keys[row]} of {self.index.folder} cannot be decoded ({reason}); run the prepare stage"
            ) from reason
        size = 4 * image.width * image.height  # Pillow keeps RGB in 4 bytes
        if size <= self.keep_bytes:
            self.keep_bytes -= size
            self._images[row] = image
        return image

    def _render(self, row: int, numbers: Sequence[int | None], out: np.ndarray[Any, Any]) -> None:
        image = self._decode(row)
        for i, number in enumerate(numbers):
            if number is None:
                box, flip = centre_box(image.width, image.height), False
            else:
                box, flip = random_view(self.views, self.index.sha256(row), int(number), image.width, image.height)
            out[i] = render(image, box, self.size, self.interpolation, flip)


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

    `make` must be picklable and a function of its argument alone, so the result does not depend on the number of workers.
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
    # torchrun signals the whole process group. A worker that died at once would take the step away from under the trainer,
    # which is still to finish it and write a checkpoint; workers end when the trainer does.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
