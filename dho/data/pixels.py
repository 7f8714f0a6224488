"""Rows of the index to batches of pixels.

    pixels = Pixels(index, config.views, size=224, interpolation="bicubic")
    pixels.batch(rows, view=0)          # uint8 [n, 224, 224, 3], view 0 of every row
    pixels.batch(rows, view=None)       # the plain centre view

`rendering_fingerprint` says by which pixels something was made that was computed from views.
"""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dho.config import ViewsConfig
from dho.core.errors import DataError
from dho.data.index import Index
from dho.data.views import random_view
from dho.runtime.dho_runtime import ImageRejected, centre_box, decode, render

KEEP_BYTES = 256 * 2**20
"""So much for each: decoded images that a process keeps for the next epoch, and views of the few labelled images, which
come again in every other step."""
EXIF_ORIENTATION = 0x0112


@dataclass
class Pixels:
    """Renders views of an index at one model's input size.

    Args:
        index, views, size, interpolation: what is rendered, and how.
        keep_bytes: memory for decoded images that a process keeps, first come first kept; useful where images recur.
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
        """Render one view of each row: uint8 [n, size, size, 3].

        Args:
            rows: of the index.
            view: number of the view, one for all rows or one for each; None for the plain centre view.
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
        """Render views 0 to count - 1 of each row, each image decoded once: uint8 [n, count, size, size, 3].

        With None for `count`, the plain centre view alone is rendered: uint8 [n, 1, size, size, 3].

        Raises:
            DataError: an image cannot be decoded although `prepare` could (the shard was changed).
        """
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
                f"image {self.index.keys[row]} of {self.index.folder} cannot be decoded ({reason}); "
                "run the prepare stage"
            ) from reason
        size = 4 * image.width * image.height  # Pillow keeps RGB in 4 bytes
        if size <= self.keep_bytes:
            self.keep_bytes -= size
            self._images[row] = image
        return image

    def _render(self, row: int, numbers: Sequence[int | None], out: np.ndarray[Any, Any]) -> None:
        image = self._decode(row)
        for i, number in enumerate(numbers):
            out[i] = _view(image, self.index.sha256(row), number, self.views, self.size, self.interpolation)


def _view(
    image: Image.Image, sha256: bytes, number: int | None, views: ViewsConfig, size: int, interpolation: str
) -> np.ndarray[Any, Any]:
    """Render view `number` of an image, or the plain centre view for None: uint8 [size, size, 3]."""
    if number is None:
        box, flip = centre_box(image.width, image.height), False
    else:
        box, flip = random_view(views, sha256, int(number), image.width, image.height)
    return render(image, box, size, interpolation, flip)


def rendering_fingerprint(interpolation: str, size: int, views: ViewsConfig) -> str:
    """Return the SHA-256 (hex) over the pixels of a few fixed images and of views of them.

    It changes with what `decode`, `random_view`, `centre_box` or `render` answer, and with nothing else: what was
    computed from views can say by which pixels it was made.

    Args:
        interpolation, size: as for `Pixels`.
        views: seed, scale and flip; `count` does not matter.
    """
    digest = hashlib.sha256()
    for number, data in enumerate(_sample_images()):
        image = decode(data)
        name = hashlib.sha256(str(number).encode()).digest()  # not of `data`, whose compression is zlib's affair
        for pixels in (image, *(_view(image, name, view, views, size, interpolation) for view in (0, 1, None))):
            values = np.ascontiguousarray(pixels)
            digest.update(f"{values.shape}{values.dtype}".encode() + values.tobytes())
    return digest.hexdigest()


def _sample_images() -> list[bytes]:
    """Return fixed images as PNG: wide RGB, grey, a palette with a clear colour, 16-bit grey, and tall but rotated."""
    generator = np.random.default_rng(0)
    wide, tall = (generator.integers(0, 256, shape, dtype=np.uint8) for shape in ((40, 56, 3), (61, 37, 3)))
    grey, indices = (generator.integers(0, top, (48, 48), dtype=np.uint8) for top in (256, 16))
    deep = generator.integers(0, 65536, (33, 47), dtype=np.uint16)
    palette = Image.fromarray(indices).convert("P")
    palette.putpalette(generator.integers(0, 256, 3 * 256, dtype=np.uint8).tobytes())
    rotation = Image.Exif()
    rotation[EXIF_ORIENTATION] = 6  # a quarter turn

    files = []
    for image, options in (
        (Image.fromarray(wide), {}),
        (Image.fromarray(grey), {}),
        (palette, {"transparency": 3}),
        (Image.fromarray(deep), {}),
        (Image.fromarray(tall), {"exif": rotation}),
    ):
        buffer = io.BytesIO()
        image.save(buffer, "PNG", **options)
        files.append(buffer.getvalue())
    return files
