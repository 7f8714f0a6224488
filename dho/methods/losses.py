"""The losses of the paper as sums over global counts, so that unequal shares of ranks and micro-batches add up."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def cross_entropy(logits: Tensor, labels: Tensor, count: float) -> Tensor:
    """Return L_CE, a scalar: cross-entropy summed over images and divided by `count`.

    Args:
        logits: float32 [n, classes].
        labels: int64 [n].
        count: by what the sum over the images is divided.
    """
    return functional.cross_entropy(logits, labels, reduction="sum") / count


def distillation(logits: Tensor, teacher: Tensor, eta: float, count: float) -> Tensor:
    """Return one stream's share of L_KD: eta^2 * KL(softmax(teacher / eta) || softmax(logits / eta)), a scalar.

    Args:
        logits, teacher: float32 [n, classes].
        eta: distillation temperature.
        count: by what the sum over the images is divided.
    """
    target, answer = (teacher / eta).log_softmax(-1), (logits / eta).log_softmax(-1)
    return eta**2 * functional.kl_div(answer, target, reduction="sum", log_target=True) / count
