"""The student: one timm backbone g with up to two linear heads (Eq. 5, 6), and its form on disk.

    student = Student(config.student, classes=10)
    outputs = student(images)                      # {"z": [n, d], "ce": [n, classes], "kd": [n, classes]}
    probabilities = student.predict(images, alpha=0.5, beta=0.3)

On disk a student is a folder: `model.safetensors` (weights) and `student.json` (what is needed to build it and to name its classes).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dho.config import StudentConfig
from dho.core.errors import ConfigError, DataError
from dho.core.files import write_atomically
from dho.core.tensors import write_tensors

HEADS = ("ce", "kd")


class Student(nn.Module):
    """Backbone and heads. `forward` gives the backbone's output and the raw logits of every head.

    Args:
        config: backbone and input.
        classes: number of classes C.
        heads: which heads exist; a single-head method has one of them.

    Raises:
        ConfigError: timm knows no such model, or refuses its arguments.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, config: StudentConfig, classes: int, heads: tuple[str, ...] = HEADS) -> None:
        super().__init__()
        try:
            self.backbone = timm.create_model(
                config.model, pretrained=config.pretrained, num_classes=0, **config.model_args
            )
        except (RuntimeError, TypeError) as error:
            raise ConfigError(
                f"student.model is {config.model!r} with student.model_args {config.model_args}: {error}"
            ) from error
        # Some timm models widen their features before the classifier; num_features is what z has otherwise.
        width: Any = getattr(self.backbone, "head_hidden_size", self.backbone.num_features)
        self.config = config
        self.classes = classes
        self.heads = heads
        self.ce_head = nn.Linear(width, classes) if "ce" in heads else None
        self.kd_head = nn.Linear(width, classes) if "kd" in heads else None
        # (value / 255 - mean) / std = value / scale - shift
        mean, std = torch.tensor(config.mean), torch.tensor(config.std)
        self.register_buffer("scale", 255 * std, persistent=False)
        self.register_buffer("shift", mean / std, persistent=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images [n, 3, size, size] -> {"z": [n, d], "ce": [n, classes], "kd": [n, classes]}, the heads it has."""
        z = self.backbone(images)
        outputs = {"z": z}
        if self.ce_head is not None:
            outputs["ce"] = self.ce_head(z)
        if self.kd_head is not None:
            outputs["kd"] = self.kd_head(z)
        return outputs

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [n, size, size, 3] on any device -> float32 [n, 3, size, size], channels-last in memory."""
        count, height, width, channels = pixels.shape
        # By rows and not by pixels: arithmetic that repeats every 3 values is three times as slow on a CPU.
        rows = pixels.reshape(count, height, width * channels).to(torch.float32) / self.scale.repeat(
            width
        ) - self.shift.repeat(width)
        return rows.view(pixels.shape).permute(0, 3, 1, 2)

    @torch.inference_mode()
    def predict(self, images: Tensor, alpha: float, beta: float) -> Tensor:
        """Eq. 8: alpha * softmax(ce) + (1 - alpha) * softmax(kd / beta), float32 [n, classes]; a single head answers alone."""
        outputs: dict[str, Tensor] = self(images)
        if self.kd_head is None:
            return outputs["ce"].float().softmax(-1)
        kd = (outputs["kd"].float() / beta).softmax(-1)
        return kd if self.ce_head is None else alpha * outputs["ce"].float().softmax(-1) + (1 - alpha) * kd


@dataclass(frozen=True)
class StudentCard:
    """What `student.json` holds beside the weights."""

    student: dict[str, Any]
    """The `student` section of the parameters."""
    heads: list[str]
    class_names: list[str]
    method: str
    run_id: str
    """MLflow run that trained it."""
    steps: int
    fingerprints: dict[str, str]
    """SHA-256 of the data set, the teacher store and the parameters it was trained with."""


def save_student(folder: Path, student: Student, card: StudentCard) -> None:
    """Write the two files of a student; the card comes last, so a folder with a card is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(
        folder / "model.safetensors", {name: value.detach().cpu() for name, value in student.state_dict().items()}
    )
    write_atomically(folder / "student.json", json.dumps(dataclasses.asdict(card), indent=2) + "\n")


def load_student(folder: Path) -> tuple[Student, StudentCard]:
    """Read a student back, in eval mode on the CPU; raises `DataError` when the folder holds none."""
    try:
        card = StudentCard(**json.loads((folder / "student.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{folder}: no student here ({error}); run the train stage first") from error
    config = StudentConfig(**{**card.student, "pretrained": False})
    student = Student(config, len(card.class_names), tuple(card.heads))
    student.load_state_dict(load_file(folder / "model.safetensors"))
    return student.eval(), card
