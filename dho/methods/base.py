"""A method: what is trained, from which losses, and how they become gradients; the training loop knows no more of it.

One step on one (micro-)batch:

    terms = method(batch, counts)              # unweighted: {"ce": ..., "kd_labelled": ..., "kd_unlabelled": ...}
    objectives = method.weigh(terms)           # weighted: {"ce": ..., "kd": ...}; their sum is the loss
    method.backward(objectives)

`method.trainable` is the student with whatever the method trains beside it (a projection, say): the optimizer, DDP and
the checkpoints take all of it; the results take `method.student`.
"""

from __future__ import annotations

import abc
import functools
import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dho.catalogue import implementation
from dho.catalogue.methods import METHODS
from dho.config import Config, TrainConfig
from dho.config.checks import method_args
from dho.data.streams import Batch
from dho.student.model import Student
from dho.teacher.classifier import Classifier

ByStream = dict[str, Tensor]
"""Stream -> tensor [n, ...]."""


class Trainable(nn.Module):
    """The student and the modules that a method trains beside it.

    Args:
        student: returns z and the heads' logits.
        extras: name -> module over z; `forward` adds its output under its name.
    """

    def __init__(self, student: Student, extras: dict[str, nn.Module]) -> None:
        super().__init__()
        self.student = student
        self.extras = nn.ModuleDict(extras)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the student's outputs and one [n, ...] per extra, for normalised images [n, 3, size, size]."""
        outputs: dict[str, Tensor] = self.student(images)
        return outputs | {name: extra(outputs["z"]) for name, extra in self.extras.items()}


class Method(nn.Module, abc.ABC):
    """Base of all methods.

    Args:
        student: a new student with this method's `heads`.
        classifier: the teacher, over the embeddings in the batches.
        config: eta, lambda_ce and the memory layout.
        arguments: the method's own settings: an instance of `arguments`, or None.

    Attributes:
        heads: heads of the student that the method trains.
        streams: streams that the method needs; the others are not loaded.
        arguments: frozen dataclass of the method's own settings (`train.method_args`), for a method that has some.
        reduces_gradients: whether `backward` averages the gradients over the ranks itself, in place of DDP.
    """

    heads: tuple[str, ...]
    streams: tuple[str, ...]
    arguments: type[Any] | None = None
    reduces_gradients = False

    def __init__(self, student: Student, classifier: Classifier, config: TrainConfig, arguments: Any = None) -> None:
        super().__init__()
        self.classifier = classifier.requires_grad_(False)
        self.config, self.settings = config, arguments
        self.trainable = Trainable(student, self.extras(student))
        # What forward calls: `trainable`, or `trainable` compiled and wrapped. A list hides it from nn.Module, which
        # would otherwise list its weights twice.
        self._callable: list[nn.Module] = [self.trainable]

    @property
    def student(self) -> Student:
        """Return the student, unwrapped."""
        return self.trainable.student

    @property
    def wrapped(self) -> nn.Module:
        """Return what `forward` calls; it has `no_sync` when training is distributed."""
        return self._callable[0]

    def extras(self, student: Student) -> dict[str, nn.Module]:
        """Build the modules over z that are trained beside the student.

        Returns:
            Name of the output -> module, z [n, width] -> [n, ...]; none by default.
        """
        del student
        return {}

    def wrap(self, compiled: bool, distributed: bool) -> None:
        """Compile and distribute `trainable`; its own weights stay reachable."""
        module: nn.Module = self.trainable
        if compiled:
            module = torch.compile(module)  # type: ignore[assignment]
        if distributed:
            device = next(self.trainable.parameters()).device
            module = DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None)
        self._callable = [module]

    def forward(self, batch: Batch, counts: dict[str, float]) -> dict[str, Tensor]:
        """Compute the named, unweighted losses of one (micro-)batch: scalars with gradients.

        Args:
            batch: per stream pixels uint8 [n, size, size, 3], embedding float16 [n, dim] and, labelled only, label
                int64 [n].
            counts: per stream, by what the sum over images is divided. With (images over all ranks) / (ranks) the mean
                of the ranks' gradients is that of the global mean, however unequal the shares of ranks and
                micro-batches are.
        """
        pixels = torch.cat([batch[name]["pixels"] for name in self.streams])
        sizes = [len(batch[name]["pixels"]) for name in self.streams]
        images = self.student.normalise(pixels)

        # One forward pass over both batches, so that BatchNorm sees them together.
        joined = self.wrapped(images if self.config.channels_last else images.contiguous())
        outputs = {
            name: dict(zip(self.streams, value.float().split(sizes), strict=True)) for name, value in joined.items()
        }
        return self.terms(outputs, batch, counts)

    @abc.abstractmethod
    def terms(self, outputs: dict[str, ByStream], batch: Batch, counts: dict[str, float]) -> dict[str, Tensor]:
        """Compute the named, unweighted losses.

        Args:
            outputs: z, the heads and the extras: [name][stream] -> float32 [n, ...].
            batch, counts: as `forward`.
        """

    @abc.abstractmethod
    def weigh(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weigh and group the terms into objectives, whose sum is the loss."""

    def backward(self, objectives: dict[str, Tensor], last: bool = True) -> None:
        """Add the gradients of one micro-batch to those of `trainable`; by default those of the objectives' sum.

        Args:
            objectives: as `weigh` returns them.
            last: whether this is the last micro-batch of the step.
        """
        del last
        total(objectives).backward()  # type: ignore[no-untyped-call]

    def teacher_logits(self, stream: str, batch: Batch) -> Tensor:
        """Return the teacher's logits, float32 [n, classes], for the images of one stream."""
        logits: Tensor = self.classifier(batch[stream]["embedding"])
        return logits


def total(objectives: dict[str, Tensor]) -> Tensor:
    """Return the loss: the sum of the objectives, a scalar."""
    return functools.reduce(operator.add, objectives.values())


def create_method(config: Config, classifier: Classifier) -> Method:
    """Build the method that `train.method` names, with a new student whose weights follow from `train.seed`.

    Raises:
        ConfigError: there is no such class, or the student cannot be built.
    """
    train = config.train
    method = implementation(train.method, METHODS, Method)  # type: ignore[type-abstract]
    torch.manual_seed(train.seed)
    student = Student(config.student, classifier.classes, method.heads)
    return method(student, classifier, train, method_args(config))
