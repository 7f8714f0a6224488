"""Head outputs: the logits of every head for every image of a split, made once after training.

File `<split>.npz` holds `ce` and `kd`, float32 [images, classes] (the heads that the student has), `labels` int64
[images] and `keys`, text [images], in the order of the index. alpha, beta and all metrics come from these files, so
evaluation never runs the student.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from dho.config import ViewsConfig
from dho.core.errors import DataError
from dho.core.files import replacing
from dho.core.partition import partition
from dho.core.process import Process, gather_rows
from dho.data.index import Index
from dho.data.loader import loader
from dho.data.pixels import Pixels
from dho.student.model import Student


@dataclass(frozen=True)
class HeadOutputs:
    """Logits of one split, in the order of the index.

    Attributes:
        ce, kd: [images, classes]; None for a head that the student does not have.
        labels: [images].
        keys: of the images, [images].
    """

    ce: npt.NDArray[np.float32] | None
    kd: npt.NDArray[np.float32] | None
    labels: npt.NDArray[np.int64]
    keys: npt.NDArray[np.str_]

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        arrays = {"ce": self.ce, "kd": self.kd, "labels": self.labels, "keys": self.keys}
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **{name: value for name, value in arrays.items() if value is not None})

    @classmethod
    def load(cls, path: Path) -> HeadOutputs:
        """Read the file; raises `DataError` where it is missing or not whole."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(arrays.get("ce"), arrays.get("kd"), arrays["labels"], arrays["keys"])
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path}: no head outputs here ({error}); run the train stage") from error


@torch.inference_mode()
def head_outputs(
    student: Student,
    index: Index,
    rows: npt.NDArray[np.int64],
    process: Process,
    batch_size: int,
    workers: int,
    channels_last: bool = True,
) -> HeadOutputs | None:
    """Run the student on the centre view of images, in full precision; every rank must call.

    Each rank takes its share of the rows; no row is counted twice.

    Args:
        student: on the rank's device; its mode (train or eval) is restored.
        index: of the images.
        rows: of the index, int64 [images].
        process: this rank.
        batch_size: images per forward pass.
        workers: loading processes of this rank; 0 loads in this one.
        channels_last: memory order of the images.

    Returns:
        The head outputs in the order of `rows` on rank 0, None elsewhere.
    """
    was_training = student.training
    student.eval()

    share = partition(len(rows), process.rank, process.world_size)
    starts = range(share.start, share.stop, batch_size)
    batches = [rows[start : min(start + batch_size, share.stop)] for start in starts]
    pixels = Pixels(index, ViewsConfig(), student.config.input_size, student.config.interpolation)
    make = functools.partial(_centre_views, pixels, batches)
    logits: dict[str, list[torch.Tensor]] = {head: [torch.empty(0, student.classes)] for head in student.heads}
    for batch in loader(make, 0, len(batches), workers if len(batches) > 1 else 0):
        images = student.normalise(batch.to(process.device))
        outputs = student(images if channels_last else images.contiguous())
        for head in student.heads:
            logits[head].append(outputs[head].float().cpu())
    student.train(was_training)

    gathered = {head: gather_rows(torch.cat(pieces), process) for head, pieces in logits.items()}
    if not process.is_main:
        return None
    arrays = {head: tensor.numpy() for head, tensor in gathered.items() if tensor is not None}
    return HeadOutputs(arrays.get("ce"), arrays.get("kd"), index.labels[rows], index.keys[rows])


def _centre_views(pixels: Pixels, batches: list[npt.NDArray[np.int64]], number: int) -> torch.Tensor:
    return pixels.batch(batches[number], view=None)
