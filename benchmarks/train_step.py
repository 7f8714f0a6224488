"""Measure how much of the bare student's speed the real training loop keeps.

    python benchmarks/train_step.py

In one process, in turns, for as many epochs as `train.epochs` says: an epoch of the real loop (index, shards, decoding,
views, store, losses, optimizer, logging interval, checkpoints, val) and half as many steps of the bare student on
synthetic tensors that are already in memory. Prints images per second of both in every epoch; the last line is the
ratio real / bare of all of them. Needs the data of `make repro`.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from dho.config import Config, load
from dho.core.process import process_group
from dho.core.workspace import Workspace
from dho.student.model import Student
from dho.training.train import Trainer


class Measured(Trainer):
    """A training that lets the bare student run between its epochs."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.bare = Bare(self.config, self.process.device, len(self.index.class_names))
        self.bare.seconds(20)  # warm-up
        self.since = time.perf_counter()
        self.real_seconds, self.bare_seconds = 0.0, 0.0

    def end_epoch(self) -> None:
        super().end_epoch()
        real = time.perf_counter() - self.since
        steps = self.streams.plan.steps_per_epoch
        bare = self.bare.seconds(steps // 2) * steps / (steps // 2)
        images = sum(sum(self.streams.sizes(step).values()) for step in range(steps))
        rates = f"real loop {images / real:,.0f} images/s, bare student {images / bare:,.0f}"
        print(f"epoch {len(self.state.history)}: {rates}", flush=True)
        self.real_seconds += real
        self.bare_seconds += bare
        self.since = time.perf_counter()


class Bare:
    """The student's step and nothing else: one batch of synthetic images, forward, backward, AdamW."""

    def __init__(self, config: Config, device: torch.device, classes: int) -> None:
        self.device = device
        self.bf16 = config.train.precision == "bf16" or (config.train.precision == "auto" and device.type == "cuda")
        size, count = config.student.input_size, config.train.batch_labelled + config.train.batch_unlabelled
        memory = torch.channels_last if config.train.channels_last else torch.contiguous_format
        self.student: Any = Student(config.student, classes).to(device, memory_format=memory).train()  # type: ignore[call-overload]
        self.optimizer = torch.optim.AdamW(self.student.parameters(), fused=device.type == "cuda" or None)
        self.images = torch.randn(count, 3, size, size, device=device).to(memory_format=memory)
        self.labels = torch.randint(classes, (count,), device=device)

    def seconds(self, steps: int) -> float:
        """Take that many steps and return the seconds they took."""
        start = time.perf_counter()
        for _ in range(steps):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                outputs = self.student(self.images)
                loss = functional.cross_entropy(outputs["ce"], self.labels) + functional.cross_entropy(
                    outputs["kd"], self.labels
                )
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def main() -> None:
    with process_group() as process, tempfile.TemporaryDirectory() as folder:
        trainer = Measured(
            load(), Workspace(trained=Path(folder) / "out", checkpoints=Path(folder) / "checkpoints"), process
        )
        trainer.loop()
    print(f"ratio {trainer.bare_seconds / trainer.real_seconds:.2f}")


if __name__ == "__main__":
    main()
