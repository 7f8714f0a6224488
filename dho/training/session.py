"""What surrounds the loop of a training: its identity, the checkpoint it resumes from, its MLflow run, and signals."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dho.config import Config, digest, flatten, to_dict
from dho.core.process import Process
from dho.core.workspace import Workspace
from dho.data.index import Index
from dho.teacher.store import TeacherStore
from dho.tracking.provenance import provenance_tags
from dho.tracking.run import Tracker
from dho.training.checkpoint import Checkpoints, State

# Settings that say how a training is run or recorded and not what it computes.
_NOT_THE_RESULT = ("log_every", "checkpoint_every", "keep_checkpoints", "eval_batch_size")


class Session:
    """One training, however often it is restarted.

    The same inputs and parameters lead to the same checkpoints and the same MLflow run.

    Args:
        config: all parameters.
        workspace: where checkpoints and unsent metrics are.
        process: this rank.
        index, store: on what the student is trained.
        trainable, optimizer: what a checkpoint holds; restored from the newest one.

    Attributes:
        fingerprints: SHA-256 (hex) of data set, teacher store and parameters.
        state: how far the training is.
    """

    def __init__(
        self,
        config: Config,
        workspace: Workspace,
        process: Process,
        index: Index,
        store: TeacherStore,
        trainable: nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.config, self.workspace, self.process = config, workspace, process
        self.index, self.store = index, store
        self.trainable, self.optimizer = trainable, optimizer
        computed = {key: value for key, value in to_dict(config.train).items() if key not in _NOT_THE_RESULT}
        self.fingerprints = {
            "dataset": index.fingerprint,
            "teacher_store": store.fingerprint,
            "parameters": digest(
                {"student": to_dict(config.student), "train": computed, "classifier": config.teacher.classifier}
            ),
        }
        self.checkpoints = Checkpoints(
            workspace.checkpoints / digest(self.fingerprints)[:16], config.train.keep_checkpoints
        )
        self.recorded = {"train": -1, "val": -1}
        self.tracker: Tracker | None = None
        self.state = self._resume()

    def checkpoint(self, needed: bool = False) -> None:
        """Save the state; every rank must call. Raises `CheckpointError` where a `needed` one cannot be written."""
        self.checkpoints.save(self.state, self.trainable, self.optimizer, self.process, needed)

    def log(self, metrics: dict[str, float]) -> None:
        """Record metrics at the present step.

        After a restart from an earlier checkpoint, steps that this run has already recorded are left out.
        """
        kind = next(iter(metrics)).split("/")[0]
        if self.tracker is not None and self.state.step > self.recorded[kind]:
            self.tracker.log_metrics(metrics, self.state.step)

    @contextlib.contextmanager
    def tracked(self) -> Iterator[None]:
        """Open the MLflow run on rank 0; the id of a new run is in a checkpoint before the first step.

        Raises:
            TrackingError: MLflow cannot be reached (rank 0).
            CheckpointError: the disk takes no checkpoint.
        """
        if self.state.step == 0:
            self.checkpoint(needed=True)  # a disk that takes none shows before there is a run
        if self.process.is_main:
            self.tracker = self._open_run()
        if self.state.step == 0:
            self.checkpoint(needed=True)

        if self.tracker is None:
            yield
            return
        with self.tracker:
            yield

    def close(self, status: str) -> None:
        """End the MLflow run early with a status: FAILED or KILLED."""
        if self.tracker is not None:
            self.tracker.close(status)

    def _open_run(self) -> Tracker:
        train, splits = self.config.train, self.config.data.splits
        labels = (
            "all"
            if splits.shots is None and splits.labelled_fraction is None
            else splits.shots or splits.labelled_fraction
        )
        tracker = Tracker.open(
            self.config.tracking,
            self.workspace.unsent,
            run_id=self.state.run_id or None,
            run_name=f"{train.method} {self.index.name} {labels} labels seed {train.seed}",
            params=flatten(to_dict(self.config)),
            tags=provenance_tags(self.workspace.root)
            | {f"fingerprint.{name}": value for name, value in self.fingerprints.items()},
        )
        self.recorded = {kind: tracker.last_recorded(f"{kind}/") for kind in self.recorded}
        new, self.state.run_id = not self.state.run_id, tracker.run_id
        if new:
            tracker.log_input(self.index.name, self.index.fingerprint, str(self.index.folder), "training")
            tracker.log_input("teacher store", self.store.fingerprint, str(self.store.folder), "training")
        return tracker

    def _resume(self) -> State:
        """Restore the newest whole checkpoint of this training, chosen by rank 0 for all; else return a new state."""
        chosen = torch.tensor([-1])
        if self.process.is_main and (path := self.checkpoints.latest()) is not None:
            chosen = torch.tensor([int(path.name.removeprefix("step-"))])
            print(f"train: resumes from {path}")
        if self.process.world_size > 1:
            dist.broadcast(chosen, 0)
        if chosen.item() < 0:
            return State(world_size=self.process.world_size)
        path = self.checkpoints.folder / f"step-{int(chosen):08d}"
        state = self.checkpoints.load(path, self.trainable, self.optimizer, self.process)
        state.world_size = self.process.world_size
        return state


@contextlib.contextmanager
def signals(handler: Callable[[], Any]) -> Iterator[None]:
    """Call `handler` at SIGTERM and SIGINT instead of ending the process."""
    before = {number: signal.signal(number, lambda *_: handler()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
