"""Head outputs: the logits of every head for every image of a split, made once after training and read by everything that follows.

File `<split>.npz`: `ce`, `kd` float32 [images, classes] (the heads the student has), `labels` int64 [images], `keys` text [images], in the
order of the index. alpha, beta and all metrics come from these files, so evaluating never runs the student.
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
    """Logits of one split; a head that the student does not have is None."""

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
        """Read the file; raises `DataError` when it is not there or not whole."""
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
    """Run the student over the centre view of rows of the index, in full precision; every rank must call, rank 0 gets the result.

    Each rank takes its part of the rows; none is counted twice.

    Args:
        student: on the rank's device; left in the mode (train or eval) it was in.
        rows: int64 [images].
        batch_size: images a forward pass.
        workers: loading processes; 0 when already close to the data.
    """
    was_training = student.training
    student.eval()
    mine = partition(len(rows), process.rank, process.world_size)
    batches = [rows[start : min(start + batch_size, mine.stop)] for start in range(mine.start, mine.stop, batch_size)]
    pixels = Pixels(index, ViewsConfig(), student.config.input_size, student.config.interpolation)
    made: dict[str, list[torch.Tensor]] = {head: [torch.empty(0, student.classes)] for head in student.heads}
    for batch in loader(
        functools.partial(_centre, pixels, batches), 0, len(batches), workers if len(batches) > 1 else 0
    ):
        images = student.normalise(batch.to(process.device))
        outputs = student(images if channels_last else images.contiguous())
        for head in student.heads:
            made[head].append(outputs[head].float().cpu())
    student.train(was_training)
    gathered = {head: gather_rows(torch.cat(parts), process) for head, parts in made.items()}
    if not process.is_main:
        return None
    logits = {head: rows.numpy() for head, rows in gathered.items() if rows is not None}
    return HeadOutputs(logits.get("ce"), logits.get("kd"), index.labels[rows], index.keys[rows])


def _centre(pixels: Pixels, batches: list[npt.NDArray[np.int64]], number: int) -> torch.Tensor:
    return pixels.batch(batches[number], view=None)
