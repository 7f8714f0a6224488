"""The losses of the paper as sums over global counts, so that means over unequal shares of ranks and micro-batches add up."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def cross_entropy(logits: Tensor, labels: Tensor, count: float) -> Tensor:
    """L_CE: cross-entropy of logits [n, classes] with labels int64 [n], summed and divided by `count`; a scalar."""
    return functional.cross_entropy(logits, labels, reduction="sum") / count


def distillation(logits: Tensor, teacher: Tensor, eta: float, count: float) -> Tensor:
    """One stream's share of L_KD: eta^2 * KL(softmax(teacher / eta) || softmax(logits / eta)); a scalar.

    Args:
        logits, teacher: float32 [n, classes].
        eta: distillation temperature.
        count: what the sum over the images is divided by.
    """
    target, answer = (teacher / eta).log_softmax(-1), (logits / eta).log_softmax(-1)
    return eta**2 * functional.kl_div(answer, target, reduction="sum", log_target=True) / count
