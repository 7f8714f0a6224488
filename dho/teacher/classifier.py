"""From the teacher's embeddings to its logits: the classifiers that `teacher.classifier` chooses from.

    classifier = open_classifier(config.teacher.classifier, store)
    classifier(embeddings)                   # Tensor [n, dim] -> Tensor [n, classes]

Methods, evaluation and comparisons call a classifier; nobody else multiplies embeddings with text weights.
"""

from __future__ import annotations

import abc

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dho.catalogue import implementation
from dho.catalogue.teachers import CLASSIFIERS
from dho.teacher.store import TeacherStore


class Classifier(nn.Module, abc.ABC):
    """A frozen module over embeddings.

    Attributes:
        temperature: zeta, by which cosine similarities are divided to become logits.
        default_alpha: weight of the CE head at inference where nothing was tuned (Eq. 8).
    """

    temperature: float
    default_alpha: float

    @classmethod
    @abc.abstractmethod
    def from_store(cls, store: TeacherStore) -> Classifier:
        """Build the classifier from a complete teacher store, without reading an image."""

    @property
    @abc.abstractmethod
    def dim(self) -> int:
        """Return the width of the embeddings."""

    @property
    @abc.abstractmethod
    def classes(self) -> int:
        """Return the number of classes C."""

    @abc.abstractmethod
    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the logits float32 [n, classes] of embeddings, float [n, dim]."""

    def logits(self, embeddings: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return the logits, float32 [n, classes], of embeddings, float [n, dim], as arrays computed on the CPU."""
        with torch.inference_mode():
            result: npt.NDArray[np.float32] = self(torch.from_numpy(np.asarray(embeddings, np.float32))).numpy()
        return result


class ZeroShot(Classifier):
    """Cosine similarity with the text weights, divided by zeta.

    Args:
        text_weights: float32 [classes, dim], L2-normalised.
        logit_scale: 1 / zeta.
    """

    default_alpha = 0.4
    text_weights: Tensor

    def __init__(self, text_weights: Tensor, logit_scale: float) -> None:
        super().__init__()
        self.register_buffer("text_weights", text_weights, persistent=False)
        self.logit_scale = logit_scale
        self.temperature = 1 / logit_scale

    @classmethod
    def from_store(cls, store: TeacherStore) -> ZeroShot:
        return cls(torch.from_numpy(store.text_weights), store.logit_scale)

    @property
    def dim(self) -> int:
        return self.text_weights.shape[1]

    @property
    def classes(self) -> int:
        return len(self.text_weights)

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.logit_scale * embeddings.float() @ self.text_weights.T

    def logits(self, embeddings: npt.ArrayLike) -> npt.NDArray[np.float32]:
        # `forward` scales before the product, this after it: the last bit differs, and recorded figures depend on it.
        cosines = np.asarray(embeddings, np.float32) @ self.text_weights.cpu().numpy().T
        result: npt.NDArray[np.float32] = np.float32(self.logit_scale) * cosines
        return result


def open_classifier(name: str, store: TeacherStore) -> Classifier:
    """Build the classifier that `teacher.classifier` names.

    Args:
        name: a row of the catalogue, or "module:Class".
        store: a complete teacher store.

    Raises:
        ConfigError: there is no such class.
    """
    classifier = implementation(name, CLASSIFIERS, Classifier)  # type: ignore[type-abstract]
    return classifier.from_store(store)
