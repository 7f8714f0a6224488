"""DHO: the labels teach one head, the teacher the other, on one backbone."""

from __future__ import annotations

from torch import Tensor

from dho.data.streams import Batch
from dho.methods.base import ByStream, Method
from dho.methods.losses import cross_entropy, distillation
from dho.runtime.dho_runtime import HEADS


class DualHead(Method):
    """L = lambda L_CE + (1 - lambda) L_KD, each on a head of its own (Eq. 7)."""

    heads: tuple[str, ...] = HEADS
    streams = ("labelled", "unlabelled")

    def terms(self, outputs: dict[str, ByStream], batch: Batch, counts: dict[str, float]) -> dict[str, Tensor]:
        ce, kd = outputs[self.heads[0]], outputs[self.heads[-1]]
        terms = {"ce": cross_entropy(ce["labelled"], batch["labelled"]["label"], counts["labelled"])}
        for stream in self.streams:
            teacher = self.teacher_logits(stream, batch)
            terms[f"kd_{stream}"] = distillation(kd[stream], teacher, self.config.eta, counts[stream])
        return terms

    def weigh(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = self.config.lambda_ce
        return {
            "ce": weight * terms["ce"],
            "kd": (1 - weight) * (terms["kd_labelled"] + terms["kd_unlabelled"]),
        }
