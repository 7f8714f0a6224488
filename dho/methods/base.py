"""What is trained: a student, what the teacher says of each image, and the losses of a method.

    task = create_task(config.train.method, student, text_weights, logit_scale, config.train)
    losses = task(batch, counts)                  # {"loss": ..., "ce": ..., "kd_labelled": ..., "kd_unlabelled": ...}
    losses["loss"].backward()

A task owns the student, the frozen teacher's text weights and the losses, in the manner of timm's and open_clip's tasks; `forward` returns
named losses; only the student is wrapped for DDP. One small class a method: which heads, which streams, how the parts add up.
"""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from dho.config import StudentConfig, TrainConfig
from dho.data.streams import Batch
from dho.student.model import Student


class DistillationTask(nn.Module, abc.ABC):
    """Base of all methods.

    Args:
        student: the trainable part.
        text_weights: float32 [classes, dim], the teacher's zero-shot weights.
        logit_scale: 1 / zeta.
        config: eta and lambda_ce.

    Attributes:
        heads: heads of the student that the method trains.
        streams: streams that the method needs.
    """

    heads: tuple[str, ...]
    streams: tuple[str, ...]
    text_weights: Tensor

    def __init__(self, student: Student, text_weights: Tensor, logit_scale: float, config: TrainConfig) -> None:
        super().__init__()
        self.student = student
        self.register_buffer("text_weights", text_weights, persistent=False)
        self.logit_scale = logit_scale
        self.eta, self.lambda_ce, self.channels_last = config.eta, config.lambda_ce, config.channels_last
        # What forward calls: the student, or the student compiled and wrapped. In a list, so that its weights are not listed twice.
        self._callable: list[nn.Module] = [student]

    def prepare(self, compile_student: bool, distributed: bool) -> None:
        """Compile and wrap the student for training; its own weights stay reachable as `self.student`."""
        module: nn.Module = self.student
        if compile_student:
            module = torch.compile(module)  # type: ignore[assignment]
        if distributed:
            device = self.text_weights.device
            module = DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None)
        self._callable = [module]

    @property
    def trainable(self) -> nn.Module:
        """The wrapped student (has `no_sync` when distributed)."""
        return self._callable[0]

    def forward(self, batch: Batch, counts: dict[str, float]) -> dict[str, Tensor]:
        """Losses of one (micro-)batch: scalars, with gradients.

        Args:
            batch: by stream: pixels uint8 [n, size, size, 3], embedding float16 [n, dim], label int64 [n] (labelled only).
            counts: by stream, what the sum over images is divided by. With (images over all ranks) / (ranks) the mean of the ranks'
                gradients is that of the global mean, however unequal the ranks' shares and micro-batches are.

        Returns:
            "loss" and its named parts, as the method has them.
        """
        pixels = torch.cat([batch[name]["pixels"] for name in self.streams])
        sizes = [len(batch[name]["pixels"]) for name in self.streams]
        images = self.student.normalise(pixels)
        # One forward pass over both batches, so that BatchNorm sees them together.
        outputs = self.trainable(images if self.channels_last else images.contiguous())
        split = {head: dict(zip(self.streams, outputs[head].float().split(sizes), strict=True)) for head in self.heads}
        return self.losses(split, batch, counts)

    @abc.abstractmethod
    def losses(self, logits: dict[str, dict[str, Tensor]], batch: Batch, counts: dict[str, float]) -> dict[str, Tensor]:
        """Losses from head logits ([head][stream] -> float32 [n, classes])."""

    def ce(self, logits: dict[str, Tensor], batch: Batch, counts: dict[str, float]) -> Tensor:
        """L_CE: cross-entropy with the labels."""
        return (
            functional.cross_entropy(logits["labelled"], batch["labelled"]["label"], reduction="sum")
            / counts["labelled"]
        )

    def kd(self, stream: str, logits: dict[str, Tensor], batch: Batch, counts: dict[str, float]) -> Tensor:
        """One stream's part of L_KD: eta^2 * KL(softmax(teacher / eta) || softmax(logits / eta))."""
        teacher = self.logit_scale * batch[stream]["embedding"].float() @ self.text_weights.T
        target, answer = (teacher / self.eta).log_softmax(-1), (logits[stream] / self.eta).log_softmax(-1)
        return self.eta**2 * functional.kl_div(answer, target, reduction="sum", log_target=True) / counts[stream]


class DualHead(DistillationTask):
    """DHO: L = lambda L_CE + (1 - lambda) L_KD, each on a head of its own."""

    heads: tuple[str, ...] = ("ce", "kd")
    streams = ("labelled", "unlabelled")

    def losses(self, logits: dict[str, dict[str, Tensor]], batch: Batch, counts: dict[str, float]) -> dict[str, Tensor]:
        kd_logits = logits[self.heads[-1]]
        parts = {
            "ce": self.ce(logits["ce"], batch, counts),
            "kd_labelled": self.kd("labelled", kd_logits, batch, counts),
            "kd_unlabelled": self.kd("unlabelled", kd_logits, batch, counts),
        }
        loss = self.lambda_ce * parts["ce"] + (1 - self.lambda_ce) * (parts["kd_labelled"] + parts["kd_unlabelled"])
        return {"loss": loss, **parts}


class SingleHead(DualHead):
    """The CE + KD baseline: both losses of DHO on one head."""

    heads = ("ce",)


class LabelledOnly(DistillationTask):
    """The CE baseline: the few labels alone."""

    heads = ("ce",)
    streams = ("labelled",)

    def losses(self, logits: dict[str, dict[str, Tensor]], batch: Batch, counts: dict[str, float]) -> dict[str, Tensor]:
        ce = self.ce(logits["ce"], batch, counts)
        return {"loss": ce, "ce": ce}


class TeacherOnly(DistillationTask):
    """The KD baseline: the teacher alone, no labels."""

    heads = ("kd",)
    streams = ("unlabelled",)

    def losses(self, logits: dict[str, dict[str, Tensor]], batch: Batch, counts: dict[str, float]) -> dict[str, Tensor]:
        kd = self.kd("unlabelled", logits["kd"], batch, counts)
        return {"loss": kd, "kd_unlabelled": kd}


METHODS: dict[str, type[DistillationTask]] = {
    "dho": DualHead,
    "ce": LabelledOnly,
    "kd": TeacherOnly,
    "ce_kd": SingleHead,
}
"""Value of `train.method` -> its class."""


def create_task(
    train: TrainConfig, student: StudentConfig, text_weights: Tensor, logit_scale: float
) -> DistillationTask:
    """The task of `train.method`, with a new student whose weights follow from `train.seed`."""
    method = METHODS[train.method]
    torch.manual_seed(train.seed)
    return method(Student(student, len(text_weights), method.heads), text_weights, logit_scale, train)
