"""Measure what the teacher store saves.

    python benchmarks/teacher_store.py --teacher ViT-B-32 --steps 40

In one process, in turns: steps of the training loop with embeddings from the store, and the same steps with the
teacher run on every view, rendered at its own input size. The last line is the median ratio of seconds per epoch,
online / store. With `--teacher` any open_clip architecture takes the teacher's place, with random weights: its cost
does not depend on them. Needs the data of `make repro`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch

from dho.config import Config, load
from dho.core.process import process_group
from dho.core.workspace import Workspace
from dho.data.loader import loader
from dho.data.pixels import Pixels
from dho.data.streams import Batch, StreamPlan
from dho.teacher.clip import Teacher
from dho.training.train import Trainer

ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--teacher", help="open_clip architecture (random weights) instead of the teacher of params.yaml"
    )
    parser.add_argument("--steps", type=int, help="steps per round instead of a whole epoch")
    arguments = parser.parse_args()
    config = load()
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=1))
    with process_group() as process, tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            config, Workspace(trained=Path(folder) / "out", checkpoints=Path(folder) / "checkpoints"), process
        )
        teacher = the_teacher(config, arguments.teacher, process.device)
        steps = trainer.streams.steps
        counted = min(arguments.steps or steps, steps)
        ratios = []
        for number in range(ROUNDS):
            seconds = {}
            for name, batches in (
                ("store", trainer.streams.from_step(0)),
                ("online", online(trainer, teacher, config)),
            ):
                start = time.perf_counter()
                for step, batch in itertools.islice(batches, counted):
                    trainer.step(trainer.to_device(batch), step)
                if process.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[name] = (time.perf_counter() - start) * steps / counted
            ratios.append(seconds["online"] / seconds["store"])
            print(
                f"round {number + 1}: an epoch with the store {seconds['store']:.1f} s, "
                f"with the teacher online {seconds['online']:.1f} s",
                flush=True,
            )
    print(f"ratio {statistics.median(ratios):.2f}")


def the_teacher(config: Config, architecture: str | None, device: torch.device) -> Teacher:
    """Return the teacher of params.yaml, or an architecture of open_clip with random weights."""
    if architecture is None:
        return Teacher.load(config.teacher, device)
    return Teacher(open_clip.create_model(architecture, load_weights=False), None, config.teacher, device)


def online(trainer: Trainer, teacher: Teacher, config: Config) -> Iterator[tuple[int, Batch]]:
    """Yield the trainer's batches with embeddings made now, cut or filled to the store's width for the same losses."""
    index, student = trainer.index, config.student
    make = functools.partial(
        both_sizes,
        trainer.streams.plan,
        Pixels(index, config.views, student.input_size, student.interpolation),
        Pixels(index, config.views, teacher.input_size, teacher.interpolation),
        index.labels,
    )
    for step, (batch, for_teacher) in enumerate(loader(make, 0, trainer.streams.steps, trainer.streams.workers)):
        for name, pixels in for_teacher.items():
            embeddings = teacher.embed(pixels).half()
            padded = embeddings.new_zeros(len(embeddings), trainer.store.dim)
            width = min(embeddings.shape[1], trainer.store.dim)
            padded[:, :width] = embeddings[:, :width]
            batch[name]["embedding"] = padded
        yield step, batch


def both_sizes(
    plan: StreamPlan, student: Pixels, teacher: Pixels, labels: Any, step: int
) -> tuple[Batch, dict[str, torch.Tensor]]:
    """Render the batch of a step at both sizes: for the student, and pixels per stream for the teacher."""
    batch: Batch = {}
    for_teacher = {}
    for name in ("labelled", "unlabelled"):
        rows, views = plan.labelled_at(step) if name == "labelled" else plan.unlabelled_at(step)
        batch[name] = {"pixels": student.batch(rows, views)}
        if name == "labelled":
            batch[name]["label"] = torch.from_numpy(labels[rows])
        for_teacher[name] = teacher.batch(rows, views)
    return batch, for_teacher


if __name__ == "__main__":
    main()
