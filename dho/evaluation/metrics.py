"""Measure predictions: a metric is a row of `METRICS`, and whose predictions they are a row of `SOURCES`.

    values = measure(probabilities, labels)      # {"top1": 0.81, "top5": ..., "nll": ..., "ece": ...}

`metrics.json`, the printed tables, MLflow, the model card and `dho registry` loop over the rows, so a new metric is one
function and one row.

torch and torchmetrics are imported where they are used: reading the rows needs neither, and torchmetrics brings SciPy
and Matplotlib, without which a trainer starts 1.5 s earlier.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dho.catalogue import resolve
from dho.runtime import dho_runtime
from dho.runtime.dho_runtime import HEADS, head_probabilities, head_source, mix, softmax

if TYPE_CHECKING:
    from dho.evaluation.head_outputs import HeadOutputs

Probabilities = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

DEFAULT_ALPHA = 0.4
"""Weight of the CE head where nothing was tuned (method.md: zero-shot teacher)."""
DEFAULT_BETA = 0.5


def top1(probabilities: Probabilities, labels: Labels) -> float:
    """Return the share of images whose most probable class is the right one."""
    return float((probabilities.argmax(1) == labels).mean())


def top5(probabilities: Probabilities, labels: Labels) -> float:
    """Return the share of images whose right class is among the five most probable ones."""
    import torch
    from torchmetrics.functional.classification import multiclass_accuracy

    guesses, truth = torch.from_numpy(np.ascontiguousarray(probabilities)), torch.from_numpy(labels)
    classes = guesses.shape[1]
    return float(multiclass_accuracy(guesses, truth, classes, top_k=min(5, classes), average="micro"))


def nll(probabilities: Probabilities, labels: Labels) -> float:
    """Return the mean negative log-likelihood of the right class, nats per image."""
    return float(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-300)).mean())


def ece(probabilities: Probabilities, labels: Labels, bins: int) -> float:
    """Return the expected calibration error: mean |confidence - accuracy| over bins, weighted by their images."""
    import torch
    from torchmetrics.functional.classification import multiclass_calibration_error

    guesses, truth = torch.from_numpy(np.ascontiguousarray(probabilities)), torch.from_numpy(labels)
    return float(multiclass_calibration_error(guesses, truth, guesses.shape[1], n_bins=bins, norm="l1"))


@dataclass(frozen=True)
class Metric:
    """One number that says how good predictions are.

    Attributes:
        name: key in `metrics.json`, and last part of the MLflow metric `<split>/<source>/<name>`.
        title: what people read.
        function: (probabilities float64 [images, classes], labels int64 [images], and the settings named in `needs`) ->
            float; or its name as "module:function", resolved when it is needed.
        format: how a value is shown, as in `str.format`.
        needs: settings of `measure` that the function takes as keyword arguments.
        higher_is_better: False for errors and losses.
        while_training: whether it is also measured after every epoch, for the curves; such a function must not import
            torchmetrics.
    """

    name: str
    title: str
    function: Callable[..., float] | str
    format: str
    needs: tuple[str, ...] = ()
    higher_is_better: bool = False
    while_training: bool = False

    def __call__(self, probabilities: Probabilities, labels: Labels, **settings: Any) -> float:
        """Measure predictions; the arguments are those of `function`."""
        function = resolve(self.function) if isinstance(self.function, str) else self.function
        value: float = function(probabilities, labels, **settings)
        return value

    def show(self, value: float | None) -> str:
        """Format a value for people, "-" for one that was not measured."""
        # "{:.2%}" puts no space before the sign, which every other unit has.
        return "-" if value is None else self.format.format(value).replace("%", " %")


METRICS = (
    Metric("top1", "top-1", top1, "{:.2%}", higher_is_better=True, while_training=True),
    Metric("top5", "top-5", top5, "{:.2%}", higher_is_better=True),
    Metric("nll", "NLL", nll, "{:.3f}", while_training=True),
    Metric("ece", "ECE", ece, "{:.3f}", needs=("bins",)),
)
"""Every metric, in the order of files and tables; the first one is what a table shows where it has room for one."""


def measure(probabilities: Probabilities, labels: Labels, bins: int = 15) -> dict[str, float]:
    """Measure every metric in `METRICS`, by name.

    Args:
        probabilities: float64 [images, classes].
        labels: int64 [images].
        bins: bins of confidence, for the calibration error.
    """
    settings = {"bins": bins}
    return {
        metric.name: metric(probabilities, labels, **{name: settings[name] for name in metric.needs})
        for metric in METRICS
    }


@dataclass(frozen=True)
class Source:
    """Whose probabilities are measured.

    Attributes:
        name: key in `metrics.json`, and middle part of the MLflow metric `<split>/<name>/<metric>`.
        title: what people read; alpha and beta are filled in.
    """

    name: str
    title: str


COMBINED, TEACHER = "combined", "teacher"
SOURCES = (
    *(Source(head_source(head), f"{head.upper()} head") for head in HEADS),
    Source(COMBINED, "combined (alpha {alpha:g}, beta {beta:g})"),
    Source(TEACHER, "teacher, zero-shot"),
)
"""Every source, in the order of `metrics.json`. `COMBINED` is what a registered student answers."""


def sources(
    outputs: HeadOutputs, alpha: float, beta: float, teacher_logits: npt.NDArray[np.float32] | None = None
) -> dict[str, Probabilities]:
    """Return the probabilities of every source in `SOURCES` that exists, float64 [images, classes] by name.

    The KD head alone answers at the temperature beta that it is mixed with.

    Args:
        outputs: logits of the heads the student has.
        alpha, beta: Eq. 8.
        teacher_logits: float32 [images, classes]; None leaves the teacher out.
    """
    answers = {
        head_source(head): head_probabilities(head, logits, beta)
        for head in HEADS
        if (logits := getattr(outputs, head)) is not None
    }
    answers[COMBINED] = mix(outputs.ce, outputs.kd, alpha, beta)
    if teacher_logits is not None:
        answers[TEACHER] = softmax(teacher_logits)
    return answers


def only_alpha(outputs: HeadOutputs) -> float | None:
    """Return the one alpha that a single-head student can have; None for two heads."""
    return dho_runtime.only_alpha([head for head in HEADS if getattr(outputs, head) is not None])


def quick(outputs: HeadOutputs, default_alpha: float = DEFAULT_ALPHA, prefix: str = "val") -> dict[str, float]:
    """Measure what is cheap, with the default alpha and beta, while alpha and beta are not tuned yet.

    Returns:
        `<prefix>/<source>/<metric>` for the metrics that are measured while training.
    """
    alpha = only_alpha(outputs)
    answers = sources(outputs, default_alpha if alpha is None else alpha, DEFAULT_BETA)
    return {
        f"{prefix}/{name}/{metric.name}": metric(probabilities, outputs.labels)
        for name, probabilities in answers.items()
        for metric in METRICS
        if metric.while_training
    }


def table(metrics: dict[str, Any], split: str = "test") -> tuple[list[str], list[list[str]]]:
    """Lay out the content of `metrics.json` for people.

    Args:
        metrics: {"alpha": ..., "beta": ..., split: {source: {metric: number}}}; a metric that is absent is shown as
            "-".
        split: "val" or "test".

    Returns:
        Column names, and one row per source that was measured.
    """
    # The teacher first: it is what the student is compared with.
    ordered = sorted(SOURCES, key=lambda source: source.name != TEACHER)
    rows = []
    for source in ordered:
        values = metrics[split].get(source.name) or {}
        if any(metric.name in values for metric in METRICS):
            title = source.title.format(alpha=metrics["alpha"], beta=metrics["beta"])
            rows.append([title, *(metric.show(values.get(metric.name)) for metric in METRICS)])
    return [split, *(metric.title for metric in METRICS)], rows


def per_class(probabilities: Probabilities, labels: Labels, class_names: list[str]) -> dict[str, float | None]:
    """Return the accuracy on the images of each class; None for a class that has none."""
    right = probabilities.argmax(1) == labels
    return {
        name: float(right[labels == number].mean()) if (labels == number).any() else None
        for number, name in enumerate(class_names)
    }


def confusion(probabilities: Probabilities, labels: Labels) -> npt.NDArray[np.int64]:
    """Count images by class: int64 [true class, predicted class]."""
    import torch
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    guesses = torch.from_numpy(probabilities.argmax(1))
    counts: npt.NDArray[np.int64] = multiclass_confusion_matrix(
        guesses, torch.from_numpy(labels), probabilities.shape[1]
    ).numpy()
    return counts


def reliability(probabilities: Probabilities, labels: Labels, bins: int) -> list[dict[str, float]]:
    """Return the mean confidence, accuracy and share of the images of each bin of confidence that has any."""
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
