"""How much of the bare student's speed the real training loop keeps: `python benchmarks/train_step.py`

In one process, in turns: an epoch of the real loop (index, shards, decoding, views, teacher store, losses, optimizer, logging interval,
checkpoint) and as many steps of the bare student on synthetic tensors that are already in memory. Prints images/s of both in every
round; the last line is the median ratio real / bare. Needs the data of `make repro`.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional

from dho.config import Config, load
from dho.distributed import Process, process_group
from dho.layout import PREPARED, STORE
from dho.student import Student
from dho.trainer import Trainer

ROUNDS = 3


def main() -> None:
    config = load()
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=1))
    with process_group() as process, tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, PREPARED, STORE, Path(folder) / "out", Path(folder) / "checkpoints", process)
        images = sum(sum(trainer.streams.sizes(step).values()) for step in range(trainer.streams.steps))
        bare(config, process, trainer.index.class_names, 20)  # warm-up
        ratios = []
        for number in range(ROUNDS):
            start = time.perf_counter()
            bare(config, process, trainer.index.class_names, trainer.streams.steps)
            bare_rate = images / (time.perf_counter() - start)
            trainer.state.step = 0
            start = time.perf_counter()
            trainer.loop(None)
            real_rate = images / (time.perf_counter() - start)
            ratios.append(real_rate / bare_rate)
            print(f"round {number + 1}: real loop {real_rate:,.0f} images/s, bare student {bare_rate:,.0f} images/s", flush=True)
    print(f"ratio {statistics.median(ratios):.2f}")


def bare(config: Config, process: Process, class_names: list[str], steps: int) -> None:
    """The student's step and nothing else: one batch of synthetic images, forward, backward, AdamW."""
    size, count = config.student.input_size, config.train.batch_labelled + config.train.batch_unlabelled
    memory = torch.channels_last if config.train.channels_last else torch.contiguous_format
    student = Student(config.student, len(class_names)).to(process.device, memory_format=memory).train()
    optimizer = torch.optim.AdamW(student.parameters(), fused=process.device.type == "cuda" or None)
    images = torch.randn(count, 3, size, size, device=process.device).to(memory_format=memory)
    labels = torch.randint(len(class_names), (count,), device=process.device)
    bf16 = config.train.precision == "bf16" or (config.train.precision == "auto" and process.device.type == "cuda")
    for _ in range(steps):
        with torch.autocast(process.device.type, torch.bfloat16, enabled=bf16):
            outputs = student(images)
            loss = functional.cross_entropy(outputs["ce"], labels) + functional.cross_entropy(outputs["kd"], labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    if process.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
