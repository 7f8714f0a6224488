"""The training loop, one process a device, always started by torchrun.

    dho train                                                    # or, by hand:
    torchrun --standalone --nproc-per-node 2 -m dho.training.train

Stopped by SIGTERM or Ctrl-C it ends after the next step with a checkpoint and an exit code other than 0; started again it goes on
as if nothing had happened, in the same MLflow run: on a CPU bit for bit.
"""

from __future__ import annotations

import contextlib
import csv
import io
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dho.config import Config, digest, flatten, to_dict
from dho.core.files import write_atomically
from dho.core.optim import learning_rate_share
from dho.core.partition import partition
from dho.core.process import Process, StopFlag, barrier, loading_processes, mean_over_ranks, others_wait
from dho.core.progress import bar, progress_lines
from dho.core.workspace import Workspace
from dho.data.index import Index
from dho.data.streams import Batch, Streams
from dho.evaluation.head_outputs import HeadOutputs, head_outputs
from dho.evaluation.metrics import quick
from dho.methods.base import create_task
from dho.student.model import StudentCard, save_student
from dho.teacher.store import TeacherStore
from dho.tracking.provenance import source_tags
from dho.tracking.run import Tracker
from dho.training.checkpoint import Checkpoints, State

STOPPED = 143
"""Exit code of a training that was told to stop: 128 + SIGTERM, as a shell would say."""

# Settings that say how a training is run or recorded and not what it computes.
_NOT_THE_RESULT = ("log_every", "checkpoint_every", "keep_checkpoints", "eval_batch_size")


class Trainer:
    """One training on this rank.

    Args:
        config: all parameters.
        workspace: `prepared` and `teacher` are read, `trained` is written; below `checkpoints` each training has its own folder.
        process: this rank.

    Raises:
        StoreMismatch: the store is not of this data, these views or this teacher.
        TrackingError: MLflow cannot be reached (rank 0).
    """

    def __init__(self, config: Config, workspace: Workspace, process: Process) -> None:
        self.config, self.workspace, self.process = config, workspace, process
        self.index = Index.load(workspace.prepared)
        self.store = TeacherStore.open(workspace.teacher, self.index, config)
        task = create_task(
            config.train, config.student, torch.from_numpy(self.store.text_weights), self.store.logit_scale
        )
        memory = torch.channels_last if config.train.channels_last else torch.contiguous_format
        self.task = task.to(process.device, memory_format=memory).train()  # type: ignore[call-overload]
        self.student = self.task.student
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(),
            weight_decay=config.train.weight_decay,
            fused=process.device.type == "cuda" or None,
        )
        self.streams = Streams(self.index, self.store, config, process, self.task.streams)
        self.fingerprints = {
            "dataset": self.index.fingerprint,
            "teacher_store": self.store.fingerprint,
            "parameters": digest({"student": to_dict(config.student), "train": _what_counts(config)}),
        }
        self.checkpoints = Checkpoints(
            workspace.checkpoints / digest(self.fingerprints)[:16], config.train.keep_checkpoints
        )
        self.stop = StopFlag(process)
        self.recorded = {"train": -1, "val": -1}
        self.state = self._resume()
        self.task.prepare(config.train.compile, distributed=process.world_size > 1)
        torch.backends.cudnn.benchmark = True
        precision = config.train.precision
        self.bf16 = precision == "bf16" or (precision == "auto" and process.device.type == "cuda")

    def run(self, then: Callable[[], None] | None = None) -> bool:
        """Train to the end, or to the next step after a signal; True when finished.

        Args:
            then: called on rank 0 once the results are written, while the other ranks wait and the last checkpoint still stands.
        """
        with self._signals(), self._tracker() as tracker:
            try:
                finished = self.loop(tracker)
            except BaseException:
                if tracker is not None:
                    tracker.close("FAILED")
                raise
            if not finished:
                if tracker is not None:
                    tracker.close("KILLED")
                return False
            self._checkpoint()
            self._write_results()
        with others_wait(self.process):
            if then is not None and self.process.is_main:
                then()
        if self.process.is_main:
            self.checkpoints.remove()
        return True

    def loop(self, tracker: Tracker | None) -> bool:
        """The steps from `state.step` to the last; True when all are done, False when stopped by a signal."""
        train, state, steps = self.config.train, self.state, self.streams.steps
        meter = _Meter(self.process, state)
        said = progress_lines(self.process.is_main)
        with bar(self.process.is_main) as shown:
            line = shown.add_task(f"train {train.method}", total=steps, completed=state.step, note="")
            for step, batch in meter.timed(self.streams.from_step(state.step)):
                losses = self.step(self.to_device(batch), step)
                state.step = step + 1
                meter.add(losses, sum(self.streams.sizes(step)[name] for name in self.task.streams))
                shown.advance(line)
                ends_epoch = state.step % self.streams.plan.steps_per_epoch == 0
                if state.step % train.log_every == 0 or ends_epoch:
                    rate = self.optimizer.param_groups[0]["lr"]
                    metrics = meter.read() | {
                        "train/learning_rate": rate,
                        "train/epoch": state.step / self.streams.plan.steps_per_epoch,
                    }
                    self._log(tracker, metrics)
                    shown.update(line, note=f"loss {metrics['train/loss/total']:.3f}")
                    said(state.step, steps, metrics["train/loss/total"], metrics["system/images_per_s"])
                if ends_epoch:
                    self.end_epoch(tracker)
                stop = self.stop.agreed()
                if stop or state.step % train.checkpoint_every == 0:
                    meter.save(state)
                    self._checkpoint()
                if stop:
                    return state.step == steps
        return True

    def step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One step on this rank's share of both batches (on its device), in micro-batches; returns this rank's losses, detached."""
        train = self.config.train
        for group in self.optimizer.param_groups:
            group["lr"] = train.learning_rate * learning_rate_share(step, self.streams.steps, train.warmup_steps)
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._backward(batch, step)
        self.optimizer.step()
        return losses

    def _backward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Gradients of one step; returns this rank's losses, detached."""
        pieces = self.config.train.accumulate
        # DDP averages gradients over the ranks; divided by this, that average is the gradient of the mean over all images.
        counts = {name: size / self.process.world_size for name, size in self.streams.sizes(step).items()}
        totals: dict[str, Tensor] = {}
        for piece in range(pieces):
            last = piece == pieces - 1
            trainable: Any = self.task.trainable
            with trainable.no_sync() if self.process.world_size > 1 and not last else contextlib.nullcontext():
                with torch.autocast(self.process.device.type, torch.bfloat16, enabled=self.bf16):
                    losses = self.task(_slice(batch, piece, pieces), counts)
                losses["loss"].backward()
            for name, value in losses.items():
                totals[name] = totals[name] + value.detach() if name in totals else value.detach()
        return totals

    def to_device(self, batch: Batch) -> Batch:
        """This rank's batch on its device."""
        device = self.process.device
        return {
            stream: {key: value.to(device, non_blocking=True) for key, value in entries.items()}
            for stream, entries in batch.items()
        }

    def end_epoch(self, tracker: Tracker | None) -> None:
        """Measure the student on val and write that down."""
        epoch = self.state.step // self.streams.plan.steps_per_epoch
        outputs = self._head_outputs("val")
        if outputs is not None:
            metrics = quick(outputs)
            self._log(tracker, metrics)
            self.state.history.append(
                {"epoch": epoch, "step": self.state.step, **{key.replace("/", "_"): v for key, v in metrics.items()}}
            )

    def _head_outputs(self, split: str) -> HeadOutputs | None:
        # Each rank has kept BatchNorm statistics of its own; those of rank 0 are the student's.
        if self.process.world_size > 1:
            for buffer in self.student.buffers():
                dist.broadcast(buffer, 0)
        train = self.config.train
        return head_outputs(
            self.student,
            self.index,
            self.index.rows(split),
            self.process,
            train.eval_batch_size,
            loading_processes(self.config.launch.workers, self.process.device),
            train.channels_last,
        )

    def _write_results(self) -> None:
        """Student, head outputs and history; the student's card last."""
        for split in ("val", "test"):
            outputs = self._head_outputs(split)
            if outputs is not None:
                outputs.save(self.workspace.head_outputs / f"{split}.npz")
        if self.process.is_main:
            write_atomically(self.workspace.history, _csv(self.state.history))
            card = StudentCard(
                student=to_dict(self.config.student),
                heads=list(self.student.heads),
                class_names=self.index.class_names,
                method=self.config.train.method,
                run_id=self.state.run_id,
                steps=self.state.step,
                fingerprints=self.fingerprints,
            )
            save_student(self.workspace.student, self.student, card)
        barrier()

    def _resume(self) -> State:
        """The newest whole checkpoint of this same training, chosen by rank 0 for all, or a new state."""
        chosen = torch.tensor([-1])
        if self.process.is_main and (path := self.checkpoints.latest()) is not None:
            chosen = torch.tensor([int(path.name.removeprefix("step-"))])
            print(f"train: goes on from {path}")
        if self.process.world_size > 1:
            dist.broadcast(chosen, 0)
        if chosen.item() < 0:
            return State(world_size=self.process.world_size)
        path = self.checkpoints.folder / f"step-{int(chosen):08d}"
        state = self.checkpoints.load(path, self.student, self.optimizer, self.process)
        state.world_size = self.process.world_size
        return state

    def _checkpoint(self, needed: bool = False) -> None:
        self.checkpoints.save(self.state, self.student, self.optimizer, self.process, needed)

    def _log(self, tracker: Tracker | None, metrics: dict[str, float]) -> None:
        """Record metrics at the present step, unless this run did so before it was restarted from an earlier checkpoint."""
        kind = next(iter(metrics)).split("/")[0]
        if tracker is not None and self.state.step > self.recorded[kind]:
            tracker.log_metrics(metrics, self.state.step)

    @contextlib.contextmanager
    def _tracker(self) -> Iterator[Tracker | None]:
        """The MLflow run on rank 0 (None elsewhere); a new run's id goes into a checkpoint before the first step."""
        if self.state.step == 0:
            self._checkpoint(needed=True)  # a disk that takes none is found out before there is a run
        if self.process.is_main:
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
                tags=source_tags(self.workspace.root)
                | {f"fingerprint.{name}": value for name, value in self.fingerprints.items()},
            )
            self.recorded = {kind: tracker.last_recorded(f"{kind}/") for kind in self.recorded}
            new, self.state.run_id = not self.state.run_id, tracker.run_id
            if new:
                tracker.log_input(self.index.name, self.index.fingerprint, str(self.index.folder), "training")
                tracker.log_input("teacher store", self.store.fingerprint, str(self.store.folder), "training")
        if self.state.step == 0:
            self._checkpoint(needed=True)
        if not self.process.is_main:
            yield None
            return
        with tracker:
            yield tracker

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        before = {
            number: signal.signal(number, lambda *_: self.stop.raise_here())
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Meter:
    """Sums of losses on the device, and where the time goes; the device is waited for only in `read`."""

    sums: dict[str, Tensor]

    def __init__(self, process: Process, state: State) -> None:
        self.process = process
        self._reset()
        self.sums = {name: torch.tensor(value, device=process.device) for name, value in state.interval.items()}
        self.steps = state.interval_steps

    def _reset(self) -> None:
        self.sums = {}
        self.steps, self.images, self.waited, self.since = 0, 0, 0.0, time.perf_counter()

    def save(self, state: State) -> None:
        """Put the sums of an interval that is not over into the state; every rank must call."""
        sums = mean_over_ranks(torch.stack(list(self.sums.values())), self.process).tolist() if self.sums else []
        state.interval, state.interval_steps = dict(zip(self.sums, sums, strict=True)), self.steps

    def timed(self, batches: Iterator[tuple[int, Batch]]) -> Iterator[tuple[int, Batch]]:
        """Pass batches on and count the seconds spent waiting for them."""
        while True:
            start = time.perf_counter()
            item = next(batches, None)
            self.waited += time.perf_counter() - start
            if item is None:
                return
            yield item

    def add(self, losses: dict[str, Tensor], images: int) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1
        self.images += images

    def read(self) -> dict[str, float]:
        """Mean losses since the last call (over all ranks), images/s over all ranks, and the share of time spent waiting for data."""
        means = mean_over_ranks(torch.stack(list(self.sums.values())) / self.steps, self.process).tolist()
        seconds = time.perf_counter() - self.since
        metrics = {
            f"train/loss/{'total' if name == 'loss' else name}": value
            for name, value in zip(self.sums, means, strict=True)
        }
        metrics |= {"system/images_per_s": self.images / seconds, "system/data_share": self.waited / seconds}
        self._reset()
        return metrics


def _slice(batch: Batch, piece: int, pieces: int) -> Batch:
    if pieces == 1:
        return batch
    sliced: Batch = {}
    for stream, entries in batch.items():
        mine = partition(len(entries["pixels"]), piece, pieces)
        sliced[stream] = {key: value[mine.start : mine.stop] for key, value in entries.items()}
    return sliced


def _what_counts(config: Config) -> dict[str, Any]:
    return {key: value for key, value in to_dict(config.train).items() if key not in _NOT_THE_RESULT}


def _csv(rows: list[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def train(config: Config, workspace: Workspace, process: Process, then: Callable[[], None] | None = None) -> bool:
    """Train one student (Algorithm 1) and write it, its head outputs and its history; True when it finished."""
    return Trainer(config, workspace, process).run(then)
