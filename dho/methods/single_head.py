"""The baselines with one head: labels alone, teacher alone, and both losses on the same head."""

from __future__ import annotations

from torch import Tensor

from dho.data.streams import Batch
from dho.methods.base import ByStream, Method
from dho.methods.dual_head import DualHead
from dho.methods.losses import cross_entropy, distillation


class SingleHead(DualHead):
    """CE + KD: both losses of DHO on one head."""

    heads = ("ce",)


class LabelledOnly(Method):
    """CE: the few labels alone."""

    heads = ("ce",)
    streams = ("labelled",)

    def terms(self, outputs: dict[str, ByStream], batch: Batch, counts: dict[str, float]) -> dict[str, Tensor]:
        return {"ce": cross_entropy(outputs["ce"]["labelled"], batch["labelled"]["label"], counts["labelled"])}

    def weigh(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        return terms


class TeacherOnly(Method):
    """KD: the teacher alone, no labels."""

    heads = ("kd",)
    streams = ("unlabelled",)

    def terms(self, outputs: dict[str, ByStream], batch: Batch, counts: dict[str, float]) -> dict[str, Tensor]:
        teacher = self.teacher_logits("unlabelled", batch)
        logits = outputs["kd"]["unlabelled"]
        return {"kd_unlabelled": distillation(logits, teacher, self.config.eta, counts["unlabelled"])}

    def weigh(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        return terms
