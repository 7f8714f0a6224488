"""What a pod of a job runs, in its working folder.

    dho job pull                # init container: parameters and data of the pinned revision
    dho job train               # main container: torchrun; then rank 0 evaluates, registers and returns the results
    dho job teach               # the same for the teacher store

A pod that was killed, evicted or moved to another node resumes where the job's checkpoints (or the store's shards) are:
on the one volume that all pods share. The exit status is 0 only when all of it is done.

torch, MLflow and what brings them are imported where they are used: the commands of a cluster are light.
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

from dho.cluster.revision import Remote, return_results
from dho.config import Config
from dho.core.files import write_atomically
from dho.core.retry import retry
from dho.core.workspace import Workspace

if TYPE_CHECKING:
    from dho.core.process import Process


def run_in_pod(stage: str, config: Config, workspace: Workspace, process: Process) -> Any:
    """Run a stage and hand its results back; every rank must call. False for a training that a signal ended."""
    return {"train": train_in_pod, "teach": teach_in_pod}[stage](config, workspace, process)


def train_in_pod(config: Config, workspace: Workspace, process: Process) -> bool:
    """Train, and on rank 0 evaluate, register and return the results; every rank must call.

    False where a signal ended the training.
    """
    from dho.core.process import others_wait
    from dho.tracking.server import connect
    from dho.training.train import train

    def then() -> None:
        # Only here: otherwise every rank would import Matplotlib and pandas each time training starts again.
        from dho.evaluation.evaluate import evaluate
        from dho.registry.register import register

        metrics = retry(lambda: evaluate(config, workspace))
        done = retry(lambda: register(config, workspace))
        outputs = {path.name: path for path in (workspace.student, workspace.head_outputs, workspace.history)}
        return_results(Remote.of_environment(), os.environ["DHO_REVISION"], workspace.root, "train", outputs)
        top1 = 100 * metrics["test"]["combined"]["top1"]
        print(f"train: models:/{done['name']}/{done['version']}, top-1 {top1:.2f} % on test", flush=True)

    with others_wait(process):
        if process.is_main:
            # MLflow may have been on a node that was lost, and comes back elsewhere.
            retry(lambda: connect(config.tracking))
    return train(config, workspace, process, then)


def teach_in_pod(config: Config, workspace: Workspace, process: Process) -> None:
    """Write the teacher store on the shared volume, each rank its shards, and return it. Every rank must call.

    Once the remote has it, the volume keeps only a note that says so.
    """
    from dho.core.process import others_wait
    from dho.teacher.teach import teach

    revision = os.environ["DHO_REVISION"]
    store = workspace.checkpoints / f"teacher-{revision[:16]}"
    note = store.with_suffix(".in-remote")
    if not note.exists():
        teach(config, workspace.at(teacher=store), process)
    with others_wait(process):
        if process.is_main:
            if not note.exists():
                return_results(
                    Remote.of_environment(),
                    revision,
                    workspace.root,
                    "teach",
                    {path.name: path for path in sorted(store.iterdir())},
                )
                write_atomically(note, f"{sum(path.stat().st_size for path in store.iterdir()) / 1e6:.1f} MB\n")
            shutil.rmtree(store, ignore_errors=True)
            print(f"teach: the store is in the remote, {note.read_text().strip()}", flush=True)
