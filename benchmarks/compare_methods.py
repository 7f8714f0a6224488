"""Compare DHO with its baselines on the same data, store, schedule and seeds.

    python benchmarks/compare_methods.py --seeds 3

Trains `ce`, `ce_kd` and `dho` once per seed with the parameters of params.yaml (only `train.method` and `train.seed`
differ), chooses alpha and beta on val, and prints the mean and standard deviation over the seeds of top-1 on test.
Needs the data of `make repro`.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

from rich.console import Console
from rich.table import Table

from dho.config import load
from dho.core.process import process_group
from dho.core.workspace import Workspace
from dho.data.index import Index
from dho.evaluation.head_outputs import HeadOutputs
from dho.evaluation.metrics import measure, sources
from dho.evaluation.tuning import search
from dho.teacher.classifier import open_classifier
from dho.teacher.store import TeacherStore
from dho.training.train import train

METHODS = ("ce", "ce_kd", "dho")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="methods to train")
    arguments = parser.parse_args()
    config, workspace = load(), Workspace()
    index = Index.load(workspace.prepared)
    store = TeacherStore.open(workspace.teacher, index, config)
    top1: dict[str, list[float]] = {}
    for seed in range(arguments.seeds):
        for method in arguments.methods:
            start = time.perf_counter()
            changed = dataclasses.replace(
                config,
                train=dataclasses.replace(config.train, method=method, seed=seed),
                tracking=dataclasses.replace(config.tracking, experiment=f"{config.tracking.experiment}-compare"),
            )
            cell = workspace.cell(f"{method}-seed{seed}")
            with process_group() as process:
                if not train(changed, cell, process):
                    raise SystemExit("stopped; run again to continue")
            val, test = (HeadOutputs.load(cell.head_outputs / f"{split}.npz") for split in ("val", "test"))
            best, _ = search(val, config.evaluate)
            scores = {
                name: 100 * measure(answers, test.labels)["top1"]
                for name, answers in sources(test, best.alpha, best.beta).items()
            }
            for name, value in scores.items():
                label = f"dho {name}" if method == "dho" else f"{method} student"
                if method == "dho" or name == "combined":
                    top1.setdefault(label, []).append(value)
            seconds = time.perf_counter() - start
            shown = ", ".join(f"{name} {value:.2f}" for name, value in scores.items())
            print(
                f"seed {seed} {method}: {shown} (alpha {best.alpha:g}, beta {best.beta:g}; {seconds:.0f} s)", flush=True
            )

    rows, classifier = index.rows("test"), open_classifier(config.teacher.classifier, store)
    teacher = classifier.logits(store.embeddings(rows, part_name="eval"))
    table = Table("test top-1, %", "mean", "std", "seeds")
    table.add_row("teacher, zero-shot", f"{100 * float((teacher.argmax(1) == index.labels[rows]).mean()):.2f}", "", "")
    for label, values in top1.items():
        spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""
        table.add_row(label, f"{statistics.mean(values):.2f}", spread, " ".join(f"{value:.2f}" for value in values))
    Console().print(table)
    if {"dho combined", "ce_kd student"} <= set(top1):
        gains = [ours - theirs for ours, theirs in zip(top1["dho combined"], top1["ce_kd student"], strict=True)]
        each = " ".join(f"{gain:+.2f}" for gain in gains)
        print(f"dho combined - ce_kd student: {statistics.mean(gains):+.2f} points on average ({each})")


if __name__ == "__main__":
    main()
