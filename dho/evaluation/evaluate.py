"""Choose alpha and beta on val, measure every source on val and test, draw the plots: stage `evaluate`.

    dho evaluate

Reads the head outputs that training saved and the teacher store; runs neither student nor teacher, so another grid
takes seconds.
"""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dho.config import Config
from dho.core.files import write_atomically
from dho.core.workspace import Workspace
from dho.data.index import Index
from dho.evaluation import plots
from dho.evaluation.head_outputs import HeadOutputs
from dho.evaluation.metrics import COMBINED, confusion, measure, per_class, reliability, sources, table
from dho.evaluation.tuning import search
from dho.student.saved import load_student
from dho.teacher.classifier import open_classifier
from dho.teacher.store import TeacherStore
from dho.tracking.run import Tracker


def evaluate(config: Config, workspace: Workspace) -> dict[str, Any]:
    """Write `metrics.json` and `plots/` to `workspace.evaluated`, and record them in the run that trained the student.

    Args:
        config: the grid and the bins.
        workspace: `prepared`, `teacher` and `trained` are read, `evaluated` is written.

    Returns:
        The content of `metrics.json`: alpha, beta, and {split: {source: {metric: number}}} for val and test; a source
        on test also has `per_class`, {class name: accuracy, or None where the class has no test images}.

    Raises:
        DataError: there is no trained student.
        StoreMismatch: the store is not of this data.
        TrackingError: MLflow cannot be reached.
    """
    _, info = load_student(workspace.student)
    index = Index.load(workspace.prepared)
    store = TeacherStore.open(workspace.teacher, index, config)
    classifier = open_classifier(config.teacher.classifier, store)
    outputs = {split: HeadOutputs.load(workspace.head_outputs / f"{split}.npz") for split in ("val", "test")}
    best, surface = search(outputs["val"], config.evaluate)
    bins = config.evaluate.ece_bins

    metrics: dict[str, Any] = {"alpha": best.alpha, "beta": best.beta}
    reliabilities: dict[str, list[dict[str, float]]] = {}
    for split, heads in outputs.items():
        teacher_logits = classifier.logits(store.embeddings(index.rows(split), part_name="eval"))
        metrics[split] = {}
        for source, probabilities in sources(heads, best.alpha, best.beta, teacher_logits).items():
            metrics[split][source] = measure(probabilities, heads.labels, bins)
            if split == "test":
                metrics[split][source]["per_class"] = per_class(probabilities, heads.labels, info.class_names)
                reliabilities[source] = reliability(probabilities, heads.labels, bins)
                if source == COMBINED:
                    guesses, counts = probabilities.argmax(1), confusion(probabilities, heads.labels)

    write_atomically(workspace.metrics, json.dumps(metrics, indent=2) + "\n")
    names = info.class_names
    _write_csv(
        workspace.plots / "confusion.csv",
        [{"actual": names[t], "predicted": names[g]} for t, g in zip(heads.labels, guesses, strict=True)],
    )
    _write_csv(
        workspace.plots / "reliability.csv",
        [{"source": s, **point} for s, points in reliabilities.items() for point in points],
    )
    _write_csv(workspace.plots / "surface.csv", [asdict(point) for point in surface])
    plots.surface(workspace.plots / "surface.png", surface, best)
    plots.confusion(workspace.plots / "confusion.png", counts, names)
    plots.reliability(workspace.plots / "reliability.png", reliabilities)
    with workspace.history.open(newline="") as file:
        plots.curves(workspace.plots / "curves.png", list(csv.DictReader(file)))

    with Tracker.open(config.tracking, workspace.unsent, run_id=info.run_id) as tracker:
        flat = {
            # val/* are the curves of training, at a fixed alpha and beta.
            f"{'val_tuned' if split == 'val' else split}/{source}/{metric}": value
            for split in outputs
            for source, values in metrics[split].items()
            for metric, value in values.items()
            if isinstance(value, float) and np.isfinite(value)
        }
        tracker.log_metrics(flat | {"combined/alpha": best.alpha, "combined/beta": best.beta}, step=info.steps)
        tracker.log_artifacts(workspace.evaluated, "evaluate")
        tracker.log_artifacts(workspace.history, "train")
    print_results(metrics)
    return metrics


def print_results(metrics: dict[str, Any]) -> None:
    """Print the table of test metrics."""
    from rich.console import Console
    from rich.table import Table

    columns, rows = table(metrics)
    results = Table(*columns)
    for row in rows:
        results.add_row(*row)
    Console().print(results)


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
