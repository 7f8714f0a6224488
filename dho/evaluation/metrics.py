"""Metrics of predictions, for every source alike: the CE head, the KD head, both combined, and the teacher's zero-shot.

measure(probabilities, labels)      # {"top1": 0.81, "top5": ..., "nll": ..., "ece": ...}

torchmetrics is imported where it is used: it brings SciPy and Matplotlib, and a trainer, which needs neither, begins 1.5 s earlier.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from dho.evaluation.head_outputs import HeadOutputs
from dho.runtime.dho_runtime import mix, softmax

Probabilities = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

DEFAULT_ALPHA = 0.4
"""Weight of the CE head where nothing was tuned (method.md: zero-shot teacher)."""
DEFAULT_BETA = 0.5


def measure(probabilities: Probabilities, labels: Labels, bins: int = 15) -> dict[str, float]:
    """top1, top5 (shares), nll (nats an image) and ece (expected calibration error, L1) of probabilities [images, classes]."""
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

    guesses, truth = torch.from_numpy(np.ascontiguousarray(probabilities)), torch.from_numpy(labels)
    classes = guesses.shape[1]
    return {
        "top1": _top1(probabilities, labels),
        "top5": float(multiclass_accuracy(guesses, truth, classes, top_k=min(5, classes), average="micro")),
        "nll": _nll(probabilities, labels),
        "ece": float(multiclass_calibration_error(guesses, truth, classes, n_bins=bins, norm="l1")),
    }


def _top1(probabilities: Probabilities, labels: Labels) -> float:
    return float((probabilities.argmax(1) == labels).mean())


def _nll(probabilities: Probabilities, labels: Labels) -> float:
    return float(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-300)).mean())


def per_class(probabilities: Probabilities, labels: Labels, class_names: list[str]) -> dict[str, float | None]:
    """Accuracy on the images of each class; None for a class that has none."""
    right = probabilities.argmax(1) == labels
    return {
        name: float(right[labels == number].mean()) if (labels == number).any() else None
        for number, name in enumerate(class_names)
    }


def confusion(probabilities: Probabilities, labels: Labels) -> npt.NDArray[np.int64]:
    """Counts int64 [true class, predicted class]."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    guesses = torch.from_numpy(probabilities.argmax(1))
    counts: npt.NDArray[np.int64] = multiclass_confusion_matrix(
        guesses, torch.from_numpy(labels), probabilities.shape[1]
    ).numpy()
    return counts


def reliability(probabilities: Probabilities, labels: Labels, bins: int) -> list[dict[str, float]]:
    """For each bin of confidence that holds images: its mean confidence, its accuracy and its share of the images."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    number = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return [
        {
            "confidence": float(confidence[inside].mean()),
            "accuracy": float(right[inside].mean()),
            "share": float(inside.mean()),
        }
        for inside in (number == b for b in range(bins))
        if inside.any()
    ]


def sources(
    outputs: HeadOutputs, alpha: float, beta: float, teacher_logits: npt.NDArray[np.float32] | None = None
) -> dict[str, Probabilities]:
    """Probabilities of every source that exists: `ce_head`, `kd_head`, `combined` and `teacher`.

    The KD head alone answers at the temperature beta that it is mixed with.
    """
    found = {}
    if outputs.ce is not None:
        found["ce_head"] = softmax(outputs.ce)
    if outputs.kd is not None:
        found["kd_head"] = softmax(outputs.kd, beta)
    found["combined"] = mix(outputs.ce, outputs.kd, alpha, beta)
    if teacher_logits is not None:
        found["teacher"] = softmax(teacher_logits)
    return found


def only_alpha(outputs: HeadOutputs) -> float | None:
    """The only alpha a single-head student can have; None for two heads."""
    return 0.0 if outputs.ce is None else 1.0 if outputs.kd is None else None


def quick(outputs: HeadOutputs, default_alpha: float = DEFAULT_ALPHA, prefix: str = "val") -> dict[str, float]:
    """`<prefix>/<source>/top1` and `/nll` with the default alpha and beta, while alpha and beta are not tuned yet."""
    alpha = only_alpha(outputs)
    found = sources(outputs, default_alpha if alpha is None else alpha, DEFAULT_BETA)
    values = {
        name: {"top1": _top1(given, outputs.labels), "nll": _nll(given, outputs.labels)}
        for name, given in found.items()
    }
    return {f"{prefix}/{name}/{metric}": value for name, metrics in values.items() for metric, value in metrics.items()}
