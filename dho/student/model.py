"""The student: one backbone g with up to two heads on its output z (Eq. 5, 6).

    student = Student(config.student, classes=10)
    outputs = student(images)                      # {"z": [n, width], "ce": [n, classes], "kd": [n, classes]}
    probabilities = student.predict(images, alpha=0.5, beta=0.3)

The heads return logits; softmax, alpha and beta come at inference only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dho.config import StudentConfig
from dho.student.backbones import create_backbone
from dho.student.heads import HEADS, create_head


class Student(nn.Module):
    """Backbone and heads; `forward` returns the backbone's output and the logits of every head.

    Args:
        config: backbone and input.
        classes: number of classes C.
        heads: which heads exist; a single-head method has one of them.

    Attributes:
        width: of z.

    Raises:
        ConfigError: as `dho.student.backbones.create_backbone`.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, config: StudentConfig, classes: int, heads: tuple[str, ...] = HEADS) -> None:
        super().__init__()
        self.backbone, self.width = create_backbone(config)
        self.config = config
        self.classes = classes
        self.heads = heads
        self.ce_head = create_head(self.width, classes) if "ce" in heads else None
        self.kd_head = create_head(self.width, classes) if "kd" in heads else None
        # (value / 255 - mean) / std = value / scale - shift
        mean, std = torch.tensor(config.mean), torch.tensor(config.std)
        self.register_buffer("scale", 255 * std, persistent=False)
        self.register_buffer("shift", mean / std, persistent=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Run backbone and heads on normalised images, float [n, 3, size, size].

        Returns:
            "z" [n, width], and "ce" and "kd" [n, classes] for the heads that the student has.
        """
        z = self.backbone(images)
        outputs = {"z": z}
        if self.ce_head is not None:
            outputs["ce"] = self.ce_head(z)
        if self.kd_head is not None:
            outputs["kd"] = self.kd_head(z)
        return outputs

    def normalise(self, pixels: Tensor) -> Tensor:
        """Normalise pixels uint8 [n, size, size, 3] to float32 [n, 3, size, size], channels-last in memory."""
        count, height, width, channels = pixels.shape
        # By rows and not by pixels: arithmetic that repeats every 3 values is three times as slow on a CPU.
        scale, shift = self.scale.repeat(width), self.shift.repeat(width)
        rows = pixels.reshape(count, height, width * channels).to(torch.float32) / scale - shift
        return rows.view(pixels.shape).permute(0, 3, 1, 2)

    @torch.inference_mode()
    def predict(self, images: Tensor, alpha: float, beta: float) -> Tensor:
        """Return probabilities float32 [n, classes]: alpha * softmax(ce) + (1 - alpha) * softmax(kd / beta) (Eq. 8).

        Args:
            images: normalised, float [n, 3, size, size].
            alpha, beta: weight of the CE head and temperature of the KD head; a student with one head ignores alpha.
        """
        outputs: dict[str, Tensor] = self(images)
        if self.kd_head is None:
            return outputs["ce"].float().softmax(-1)
        kd = (outputs["kd"].float() / beta).softmax(-1)
        return kd if self.ce_head is None else alpha * outputs["ce"].float().softmax(-1) + (1 - alpha) * kd
