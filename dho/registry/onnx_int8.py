"""Quantise the exported student to 8-bit integers: smaller, and on many CPUs faster.

    from dho.core.workspace import Workspace
    from dho.student.saved import load_student
    workspace = Workspace()
    _, info = load_student(workspace.student)
    batches = calibration_batches(Index.load(workspace.prepared), info.student)
    quantise_onnx(Path("student.onnx"), Path("student-int8.onnx"), batches)

What the quantised student answers is measured, never assumed. Static quantisation (ONNX Runtime, QDQ): weights per
channel and activations per tensor, with ranges seen on val images. Those are what alpha and beta were tuned on, and no
test image is among them.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from dho.config import ViewsConfig
from dho.core.errors import ConfigError, DataError
from dho.core.files import replacing
from dho.data.index import Index
from dho.data.pixels import Pixels
from dho.runtime import dho_runtime

MAX_IMAGES = 512
"""Most val images that the ranges are taken from, spread over the whole split."""
BATCH = 64

Rows = npt.NDArray[np.int64]


def seen_by(student: dict[str, Any], index: Index, rows: Rows) -> Iterator[tuple[npt.NDArray[np.float32], Rows]]:
    """Yield images as a student sees them (the centre view), float32 [n, 3, size, size], with their rows, int64 [n].

    Args:
        student: `input_size`, `mean`, `std` and `interpolation` (`StudentInfo.student`).
        index: of the prepared data.
        rows: of the index, int64 [images].
    """
    # Only the centre view is asked for, so the settings of the views do not matter.
    pixels = Pixels(index, ViewsConfig(), student["input_size"], student["interpolation"])
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        yield dho_runtime.normalise(pixels.batch(batch, None).numpy(), student["mean"], student["std"]), batch


def calibration_batches(index: Index, student: dict[str, Any]) -> Iterator[npt.NDArray[np.float32]]:
    """Return batches of val images as the student sees them, float32 [n, 3, size, size]; arguments as `seen_by`.

    Raises:
        DataError: there are no val images.
    """
    rows = index.rows("val")
    if not len(rows):
        raise DataError(f"{index.folder}: there are no val images, which int8 (registry.precision) is calibrated on")
    spread = rows[np.linspace(0, len(rows) - 1, min(MAX_IMAGES, len(rows))).round().astype(int)]
    return (images for images, _ in seen_by(student, index, spread))


class _Batches(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, batches: Iterator[npt.NDArray[np.float32]]) -> None:
        self._batches = batches

    def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
        images = next(self._batches, None)
        return None if images is None else {"images": images}


def quantise_onnx(network: Path, out: Path, batches: Iterator[npt.NDArray[np.float32]]) -> None:
    """Write the int8 form of an exported student, with the same input and outputs.

    Args:
        network: ONNX file in float32.
        out: file to write, whole or not at all; may be `network`.
        batches: images to take the ranges from, float32 [n, 3, size, size].

    Raises:
        ConfigError: ONNX Runtime cannot quantise this network.
    """
    root = logging.getLogger()
    level = root.level
    with tempfile.TemporaryDirectory() as temporary, replacing(out) as written:
        prepared = Path(temporary) / "prepared.onnx"
        root.setLevel(logging.ERROR)  # it warns on the root logger of every tensor that it leaves in float32
        try:
            quant_pre_process(network, prepared)
            quantize_static(
                prepared,
                written,
                _Batches(batches),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                # Without VNNI a CPU adds pairs of 8-bit products in 16 bits, which overflow unless a bit is left free.
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        except DataError:
            raise
        except Exception as error:  # it raises anything
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ConfigError(
                f"registry.precision is 'int8', and ONNX Runtime cannot quantise this network: {reason}"
            ) from error
        finally:
            root.setLevel(level)
