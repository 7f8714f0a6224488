"""Stage `train`: the training loop (Algorithm 1), one process per device.

    dho train

If it is stopped by SIGTERM or Ctrl-C, it ends after the next step with a checkpoint and an exit status other than 0.
When it is started again, it resumes in the same MLflow run as if nothing had happened: on a CPU bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dho.config import Config
from dho.core.optim import learning_rate_share
from dho.core.partition import partition
from dho.core.process import Process, StopFlag, others_wait
from dho.core.progress import bar, progress_lines
from dho.core.workspace import Workspace
from dho.data.index import Index
from dho.data.streams import Batch, Streams
from dho.evaluation.metrics import quick
from dho.methods.base import create_method, total
from dho.teacher.classifier import open_classifier
from dho.teacher.store import TeacherStore
from dho.training.meter import Meter
from dho.training.results import measured, write_results
from dho.training.session import Session, signals


class Trainer:
    """One training on this rank.

    Args:
        config: all parameters.
        workspace: `prepared` and `teacher` are read, `trained` is written, as is a folder of `checkpoints`.
        process: this rank.

    Raises:
        StoreMismatch: the store is of other data, other views or another teacher.
        ConfigError: the method or the student cannot be built.
    """

    def __init__(self, config: Config, workspace: Workspace, process: Process) -> None:
        self.config, self.workspace, self.process = config, workspace, process
        self.index = Index.load(workspace.prepared)
        self.store = TeacherStore.open(workspace.teacher, self.index, config)

        method = create_method(config, open_classifier(config.teacher.classifier, self.store))
        memory = torch.channels_last if config.train.channels_last else torch.contiguous_format
        self.method = method.to(process.device, memory_format=memory).train()  # type: ignore[call-overload]
        self.student = self.method.student
        self.optimizer = torch.optim.AdamW(
            self.method.trainable.parameters(),
            weight_decay=config.train.weight_decay,
            fused=process.device.type == "cuda" or None,
        )
        self.streams = Streams(self.index, self.store, config, process, self.method.streams)

        self.session = Session(
            config, workspace, process, self.index, self.store, self.method.trainable, self.optimizer
        )
        self.state = self.session.state
        self.stop = StopFlag(process)
        self.method.wrap(config.train.compile, distributed=process.world_size > 1)
        torch.backends.cudnn.benchmark = True
        precision = config.train.precision
        self.bf16 = precision == "bf16" or (precision == "auto" and process.device.type == "cuda")

    def run(self, then: Callable[[], None] | None = None) -> bool:
        """Train to the end, or to the next step after a signal.

        Args:
            then: called on rank 0 once the results are written, while the other ranks wait and the last checkpoint is
                still there.

        Returns:
            True when the training finished, False when a signal stopped it.

        Raises:
            TrackingError: MLflow cannot be reached (rank 0).
            CheckpointError: the disk takes no checkpoint.
        """
        with signals(self.stop.raise_here), self.session.tracked():
            try:
                finished = self.loop()
            except BaseException:
                self.session.close("FAILED")
                raise
            if not finished:
                self.session.close("KILLED")
                return False
            self.session.checkpoint()
            fingerprints = self.session.fingerprints
            write_results(self.workspace, self.student, self.index, self.config, self.state, fingerprints, self.process)

        with others_wait(self.process):
            if then is not None and self.process.is_main:
                then()
        if self.process.is_main:
            self.session.checkpoints.remove()
        return True

    def loop(self) -> bool:
        """Take the steps from `state.step` to the last; True when all are done, False when a signal stopped them."""
        train, state, steps = self.config.train, self.state, self.streams.steps
        per_epoch = self.streams.plan.steps_per_epoch
        meter = Meter(self.process, state)
        print_progress = progress_lines(self.process.is_main)
        with bar(self.process.is_main) as shown:
            line = shown.add_task(f"train {train.method}", total=steps, completed=state.step, note="")
            for step, batch in meter.timed(self.streams.from_step(state.step)):
                losses = self.step(self.to_device(batch), step)
                state.step = step + 1
                meter.add(losses, sum(self.streams.sizes(step)[name] for name in self.method.streams))
                shown.advance(line)

                ends_epoch = state.step % per_epoch == 0
                if state.step % train.log_every == 0 or ends_epoch:
                    rate = self.optimizer.param_groups[0]["lr"]
                    metrics = meter.read() | {"train/learning_rate": rate, "train/epoch": state.step / per_epoch}
                    self.session.log(metrics)
                    shown.update(line, note=f"loss {metrics['train/loss/total']:.3f}")
                    print_progress(state.step, steps, metrics["train/loss/total"], metrics["system/images_per_s"])
                if ends_epoch:
                    self.end_epoch()

                stop = self.stop.agreed()
                if stop or state.step % train.checkpoint_every == 0:
                    meter.save(state)
                    self.session.checkpoint()
                if stop:
                    return state.step == steps
        return True

    def step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Take one step on this rank's share of both batches, in micro-batches.

        Args:
            batch: on this rank's device.
            step: number of the step, from 0.

        Returns:
            This rank's `loss` and its terms, detached scalars.
        """
        train = self.config.train
        for group in self.optimizer.param_groups:
            group["lr"] = train.learning_rate * learning_rate_share(step, self.streams.steps, train.warmup_steps)
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._backward(batch, step)
        self.optimizer.step()
        return losses

    def _backward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Compute the gradients of one step, and return this rank's losses, detached scalars."""
        pieces = self.config.train.accumulate
        # DDP averages gradients over the ranks; with losses divided by these, the average is that of the global mean.
        counts = {name: size / self.process.world_size for name, size in self.streams.sizes(step).items()}
        totals: dict[str, Tensor] = {}
        for piece in range(pieces):
            last = piece == pieces - 1
            wrapped: Any = self.method.wrapped
            alone = self.process.world_size == 1 or (last and not self.method.reduces_gradients)
            with contextlib.nullcontext() if alone else wrapped.no_sync():
                with torch.autocast(self.process.device.type, torch.bfloat16, enabled=self.bf16):
                    terms = self.method(micro_batch(batch, piece, pieces), counts)
                    objectives = self.method.weigh(terms)
                self.method.backward(objectives, last)
            for name, value in {"loss": total(objectives), **terms}.items():
                totals[name] = totals[name] + value.detach() if name in totals else value.detach()
        return totals

    def to_device(self, batch: Batch) -> Batch:
        """Return this rank's batch on its device."""
        device = self.process.device
        return {
            stream: {key: value.to(device, non_blocking=True) for key, value in entries.items()}
            for stream, entries in batch.items()
        }

    def end_epoch(self) -> None:
        """Measure the student on val, and record the metrics in MLflow and in the history."""
        epoch = self.state.step // self.streams.plan.steps_per_epoch
        outputs = measured(self.student, self.index, "val", self.config, self.process)
        if outputs is not None:
            metrics = quick(outputs, self.method.classifier.default_alpha)
            self.session.log(metrics)
            columns = {key.replace("/", "_"): value for key, value in metrics.items()}
            self.state.history.append({"epoch": epoch, "step": self.state.step, **columns})


def micro_batch(batch: Batch, piece: int, pieces: int) -> Batch:
    """Return micro-batch `piece` (from 0) of the `pieces` into which a batch is cut."""
    if pieces == 1:
        return batch
    sliced: Batch = {}
    for stream, entries in batch.items():
        rows = partition(len(entries["pixels"]), piece, pieces)
        sliced[stream] = {key: value[rows.start : rows.stop] for key, value in entries.items()}
    return sliced


def train(config: Config, workspace: Workspace, process: Process, then: Callable[[], None] | None = None) -> bool:
    """Train one student (Algorithm 1), and write it, its head outputs and its history.

    Args:
        config: all parameters.
        workspace: `prepared` and `teacher` are read, `trained` is written.
        process: this rank; every rank must call.
        then: called on rank 0 at the end, while the other ranks wait.

    Returns:
        True when the training finished, False when a signal stopped it.

    Raises:
        DhoError: as `Trainer` and `Trainer.run`.
    """
    return Trainer(config, workspace, process).run(then)
