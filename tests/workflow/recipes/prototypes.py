"""A classifier on the teacher's embeddings that is more certain than zero-shot: cosines are scaled twice as much."""

from __future__ import annotations

import torch
from torch import Tensor

from dho.teacher.classifier import Classifier
from dho.teacher.store import TeacherStore


class Prototypes(Classifier):
    """Cosine similarity with one prototype per class."""

    default_alpha = 0.2
    prototypes: Tensor

    def __init__(self, prototypes: Tensor, scale: float) -> None:
        super().__init__()
        self.register_buffer("prototypes", prototypes, persistent=False)
        self.scale, self.temperature = scale, 1 / scale

    @classmethod
    def from_store(cls, store: TeacherStore) -> Prototypes:
        return cls(torch.from_numpy(store.text_weights), 2 * store.logit_scale)

    @property
    def dim(self) -> int:
        return self.prototypes.shape[1]

    @property
    def classes(self) -> int:
        return len(self.prototypes)

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.scale * embeddings.float() @ self.prototypes.T
