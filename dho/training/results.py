"""The results of a training: the student, its head outputs on val and test, and one row of history per epoch."""

from __future__ import annotations

import csv
import io
from typing import Any

import torch.distributed as dist

from dho.config import Config, to_dict
from dho.core.files import write_atomically
from dho.core.process import Process, barrier, loading_processes
from dho.core.workspace import Workspace
from dho.data.index import Index
from dho.evaluation.head_outputs import HeadOutputs, head_outputs
from dho.student.model import Student
from dho.student.saved import StudentInfo, save_student
from dho.training.checkpoint import State


def measured(student: Student, index: Index, split: str, config: Config, process: Process) -> HeadOutputs | None:
    """Return the head outputs of a split on rank 0, None elsewhere; every rank must call."""
    # Each rank has BatchNorm statistics of its own; those of rank 0 are the student's.
    if process.world_size > 1:
        for buffer in student.buffers():
            dist.broadcast(buffer, 0)

    train = config.train
    workers = loading_processes(config.launch.workers, process.device)
    rows = index.rows(split)
    return head_outputs(student, index, rows, process, train.eval_batch_size, workers, train.channels_last)


def write_results(
    workspace: Workspace,
    student: Student,
    index: Index,
    config: Config,
    state: State,
    fingerprints: dict[str, str],
    process: Process,
) -> None:
    """Write head outputs, history and, last, the student; every rank must call, rank 0 writes.

    Args:
        workspace: whose `trained` is written.
        student: on the rank's device.
        index: the data it was trained on.
        config: all parameters.
        state: at the end of the training.
        fingerprints: SHA-256 (hex) of data set, teacher store and parameters.
        process: this rank.
    """
    for split in ("val", "test"):
        outputs = measured(student, index, split, config, process)
        if outputs is not None:
            outputs.save(workspace.head_outputs / f"{split}.npz")

    if process.is_main:
        write_atomically(workspace.history, _csv(state.history))
        info = StudentInfo(
            student=to_dict(config.student),
            heads=list(student.heads),
            class_names=index.class_names,
            method=config.train.method,
            run_id=state.run_id,
            steps=state.step,
            fingerprints=fingerprints,
        )
        save_student(workspace.student, student, info)
    barrier()


def _csv(rows: list[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
