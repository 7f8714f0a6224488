"""CE + feature distillation: the labels teach the head, and a projection of z follows the teacher's embedding."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from dho.data.streams import Batch
from dho.methods.base import ByStream, Method
from dho.methods.losses import cross_entropy
from dho.student.model import Student


class FeatureDistillation(Method):
    """L = lambda L_CE + (1 - lambda) L_FD; L_FD is the squared error to the embedding, summed over its width."""

    heads = ("ce",)
    streams = ("labelled", "unlabelled")

    def extras(self, student: Student) -> dict[str, nn.Module]:
        return {"projection": nn.Linear(student.width, self.classifier.dim)}

    def terms(self, outputs: dict[str, ByStream], batch: Batch, counts: dict[str, float]) -> dict[str, Tensor]:
        terms = {"ce": cross_entropy(outputs["ce"]["labelled"], batch["labelled"]["label"], counts["labelled"])}
        for stream in self.streams:
            target = batch[stream]["embedding"].float()
            error = functional.mse_loss(outputs["projection"][stream], target, reduction="sum")
            terms[f"fd_{stream}"] = error / counts[stream]
        return terms

    def weigh(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = self.config.lambda_ce
        return {"ce": weight * terms["ce"], "fd": (1 - weight) * (terms["fd_labelled"] + terms["fd_unlabelled"])}
