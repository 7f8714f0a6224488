"""What a pod of a PyTorchJob runs, in its working folder (k8s/base/pytorchjob.yaml).

    dho job pull                # init container: parameters and data of the pinned revision
    dho job train               # main container: torchrun; then rank 0 evaluates, registers and gives the results back
    dho job teach               # the same for the teacher store

Killed, evicted or moved to another node, a pod goes on where the job's checkpoints (or the store's shards) are; they are on the one volume
that all pods share. The exit code is 0 only when all of it is done.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from dho.cluster.revision import Remote, give_back
from dho.config import Config
from dho.core.files import write_atomically
from dho.core.process import Process, others_wait
from dho.core.retry import retry
from dho.core.workspace import Workspace
from dho.teacher.teach import teach
from dho.tracking.server import connect
from dho.training.train import train


def run_in_pod(stage: str, config: Config, workspace: Workspace, process: Process) -> Any:
    """Run a stage and hand its results back; every rank must call. False for a training that a signal ended."""
    return {"train": train_in_pod, "teach": teach_in_pod}[stage](config, workspace, process)


def train_in_pod(config: Config, workspace: Workspace, process: Process) -> bool:
    """Train; on rank 0 then evaluate, register, give back. Every rank must call; False when a signal ended it."""

    def then() -> None:
        # Only here: every rank would otherwise import MLflow, Matplotlib and pandas each time that training starts again.
        from dho.evaluation import evaluate as report
        from dho.registry.lineage import Sources
        from dho.registry.register import register

        metrics = retry(lambda: report.evaluate(config, workspace))
        sources = Sources(workspace.prepared, workspace.teacher, workspace.plots)
        done = retry(lambda: register(config, workspace.student, workspace.metrics, workspace.registered, sources))
        outputs = {name: workspace.trained / name for name in ("student", "head_outputs", "history.csv")}
        give_back(Remote.of_environment(), os.environ["DHO_REVISION"], Path(), "train", outputs)
        top1 = 100 * metrics["test"]["combined"]["top1"]
        print(f"train: models:/{done['name']}/{done['version']}, top-1 {top1:.2f} % on test", flush=True)

    with others_wait(process):
        if process.is_main:
            retry(lambda: connect(config.tracking))  # a node that took MLflow with it gives it back
    return train(config, workspace, process, then)


def teach_in_pod(config: Config, workspace: Workspace, process: Process) -> None:
    """Write the teacher store on the shared volume, each rank its shards; on rank 0 then give it back. Every rank must call.

    Once the remote has it, the volume keeps only the note that it has.
    """
    revision = os.environ["DHO_REVISION"]
    store = workspace.checkpoints / f"teacher-{revision[:16]}"
    note = store.with_suffix(".in-remote")
    if not note.exists():
        teach(config, workspace.at(teacher=store), process)
    with others_wait(process):
        if process.is_main:
            if not note.exists():
                give_back(
                    Remote.of_environment(),
                    revision,
                    Path(),
                    "teach",
                    {path.name: path for path in sorted(store.iterdir())},
                )
                write_atomically(note, f"{sum(path.stat().st_size for path in store.iterdir()) / 1e6:.1f} MB\n")
            shutil.rmtree(store, ignore_errors=True)
            print(f"teach: the store is in the remote, {note.read_text().strip()}", flush=True)
