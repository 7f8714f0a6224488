"""Export the student to one ONNX file, which runs where there is no torch.

    from dho.core.workspace import Workspace
    from dho.student.saved import load_student
    student, _ = load_student(Workspace().student)
    export_onnx(student, Path("student.onnx"))

Input `images`, float32 [n, 3, size, size], normalised; outputs `ce` and `kd`, float32 [n, classes], the heads the
student has. The same weights give the same bytes, on whatever path and day, so that a file's SHA-256 can tell whether
two packages are the same.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from dho.core.errors import ConfigError, DhoError
from dho.core.files import replacing
from dho.student.model import Student

OPSET = 18
TOLERANCE = 1e-4
"""Largest allowed difference of a logit, as a share of the largest logit where that is above 1, as float32 rounds."""


class _Logits(nn.Module):
    """A student without z: the tuple of its heads' logits, in the order of `student.heads`."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.student(images)
        return tuple(outputs[head] for head in self.student.heads)


def export_onnx(student: Student, path: Path) -> None:
    """Write a student to one ONNX file and check that it answers like torch.

    Args:
        student: on any device and in any mode, and left so; a copy is exported in eval mode.
        path: file to write, weights included; it appears only once the check has passed.

    Raises:
        ConfigError: the backbone cannot be exported.
        DhoError: ONNX Runtime's logits differ from torch's by more than `TOLERANCE` on random images, in batches of 1
            or 5.
    """
    module = _Logits(copy.deepcopy(student).cpu()).eval()
    size = student.config.input_size
    try:
        program: Any = torch.onnx.export(
            module,
            # A batch of 1 would be taken for a constant.
            (torch.zeros(2, 3, size, size),),
            dynamo=True,
            input_names=["images"],
            output_names=list(student.heads),
            dynamic_shapes=({0: torch.export.Dim("n")},),
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ConfigError(
            f"student.model is {student.config.model!r}, which cannot be exported to ONNX: {reason}"
        ) from error

    proto = program.model_proto
    _strip(proto)
    with replacing(path) as temporary:
        temporary.write_bytes(proto.SerializeToString(deterministic=True))
        difference, largest = _compare(module, temporary, size)
        if not difference <= TOLERANCE * max(1.0, largest):
            raise DhoError(
                f"{path}: ONNX Runtime's logits differ from torch's by {difference:.2g} (logits up to {largest:.2g}, "
                f"allowed {TOLERANCE * max(1.0, largest):.2g}); student.model {student.config.model!r} cannot be "
                "served as it is"
            )


def _strip(proto: onnx.ModelProto) -> None:
    """Remove the exporter's notes: code paths and stack traces, which differ between machines."""
    graph = proto.graph
    for node in (proto, graph, *graph.node, *graph.initializer, *graph.value_info, *graph.input, *graph.output):
        node.ClearField("metadata_props")
        node.ClearField("doc_string")


@torch.inference_mode()
def _compare(module: _Logits, path: Path, size: int) -> tuple[float, float]:
    """The largest difference between both runtimes' logits, and the largest logit."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    difference, largest = 0.0, 0.0
    for n in (1, 5):
        images = torch.randn(n, 3, size, size, generator=generator)
        expected = torch.stack(module(images)).numpy()
        answers = np.stack(session.run(list(module.student.heads), {"images": images.numpy()}))
        # maximum keeps a NaN, which max() would drop.
        difference = float(np.maximum(difference, np.abs(answers - expected).max()))
        largest = float(np.maximum(largest, np.abs(expected).max()))
    return difference, largest
