"""Draw an evaluation, as PNG files for DVC and MLflow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt

from dho.core.files import replacing
from dho.evaluation.tuning import Point


@contextmanager
def _figure(path: Path, width: float = 5.5, height: float = 4.5) -> Iterator[Any]:
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    try:
        yield axes
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    finally:
        plt.close(figure)


def surface(path: Path, points: list[Point], best: Point) -> None:
    """Draw top-1 on val over alpha and beta, with the chosen pair marked."""
    alphas, betas = sorted({point.alpha for point in points}), sorted({point.beta for point in points})
    values = np.full((len(betas), len(alphas)), np.nan)
    for point in points:
        values[betas.index(point.beta), alphas.index(point.alpha)] = 100 * point.top1
    with _figure(path, width=7) as axes:
        image = axes.imshow(values, origin="lower", aspect="auto", cmap="viridis")
        axes.plot(alphas.index(best.alpha), betas.index(best.beta), "r*", markersize=14)
        axes.set_xticks(
            range(0, len(alphas), max(1, len(alphas) // 10)), [f"{a:g}" for a in alphas[:: max(1, len(alphas) // 10)]]
        )
        axes.set_yticks(range(len(betas)), [f"{b:g}" for b in betas])
        axes.set(xlabel="alpha (weight of the CE head)", ylabel="beta (temperature of the KD head)")
        axes.set_title(f"combined, val: {100 * best.top1:.1f} % at alpha {best.alpha:g}, beta {best.beta:g}")
        axes.figure.colorbar(image, label="top-1, %")


def confusion(path: Path, counts: npt.NDArray[np.int64], class_names: list[str]) -> None:
    """Draw the confusion matrix of the combined student on test, as shares of the true class.

    Args:
        counts: int64 [true class, predicted class].
    """
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = max(5.0, min(0.5 * len(class_names), 14.0))
    with _figure(path, width=side + 1, height=side) as axes:
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        if len(class_names) <= 40:
            axes.set_xticks(range(len(class_names)), class_names, rotation=60, ha="right")
            axes.set_yticks(range(len(class_names)), class_names)
        if len(class_names) <= 15:
            for row, column in np.ndindex(shares.shape):
                if shares[row, column] >= 0.005:
                    color = "white" if shares[row, column] > 0.5 else "black"
                    axes.text(
                        column,
                        row,
                        f"{100 * shares[row, column]:.0f}",
                        ha="center",
                        va="center",
                        fontsize=7,
                        color=color,
                    )
        axes.set(xlabel="predicted", ylabel="true", title="combined, test, % of the true class")
        axes.figure.colorbar(image, shrink=0.8)


def reliability(path: Path, bins: dict[str, list[dict[str, float]]]) -> None:
    """Draw accuracy against confidence on test, one line per source.

    Args:
        bins: source -> what `dho.evaluation.metrics.reliability` returns.
    """
    with _figure(path) as axes:
        axes.plot([0, 1], [0, 1], "k--", linewidth=0.8)
        for source, points in bins.items():
            axes.plot(
                [point["confidence"] for point in points],
                [point["accuracy"] for point in points],
                "o-",
                label=source,
                markersize=3,
            )
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title="reliability, test")
        axes.legend()


def curves(path: Path, history: list[dict[str, str]]) -> None:
    """Draw top-1 on val of every source that training measures, by epoch.

    Args:
        history: rows of `history.csv`.
    """
    with _figure(path) as axes:
        for column in history[0]:
            if column.endswith("_top1"):
                name = column.removeprefix("val_").removesuffix("_top1")
                axes.plot(
                    [int(row["epoch"]) for row in history],
                    [100 * float(row[column]) for row in history],
                    "o-",
                    label=name,
                )
        axes.set(xlabel="epoch", ylabel="top-1, %", title="val, while training (alpha and beta not tuned yet)")
        axes.legend()
