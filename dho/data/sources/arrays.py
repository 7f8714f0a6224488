"""Layout `arrays`: the four raw files of Fashion-MNIST (and of MNIST), whose rows become lossless PNG."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dho.config import DataConfig
from dho.core.errors import DataError
from dho.data.dataset import class_names
from dho.data.sources.base import Record

SIDE = 28
"""Pixels; the images are square and grey."""


class Arrays:
    """Train and test images in raw files, 28 x 28 grey."""

    def __init__(self, config: DataConfig, raw: Path) -> None:
        self.class_names = class_names(config)
        self.records: list[Record] = []
        self._images: list[npt.NDArray[np.uint8]] = []
        for pool, prefix in (("train", "train"), ("test", "t10k")):
            try:
                labels = np.fromfile(raw / f"{prefix}-labels-idx1-ubyte", np.uint8, offset=8)
                pixels = np.fromfile(raw / f"{prefix}-images-idx3-ubyte", np.uint8, offset=16)
            except OSError as error:
                raise DataError(f"{raw}: {error.strerror} ({error.filename}); run the fetch stage") from error
            self._images.append(pixels.reshape(-1, SIDE, SIDE))
            self.records += [Record(f"{prefix}/{row:05d}", pool, int(label)) for row, label in enumerate(labels)]

    @classmethod
    def list_images(cls, config: DataConfig, raw: Path) -> None:
        """Do nothing: the catalogue's files say it all."""

    def read(self, number: int) -> bytes:
        """Return record `number` as PNG."""
        train, test = self._images
        buffer = io.BytesIO()
        Image.fromarray(train[number] if number < len(train) else test[number - len(train)]).save(buffer, "PNG")
        return buffer.getvalue()
