"""Processes started by torchrun: who am I, which device is mine, which part of the work, and talking to the others.

Nothing here uses RANK as a device number: the device is LOCAL_RANK's, so several nodes work.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dho.core.allocator import keep_freed_memory

SILENCE = timedelta(minutes=5)
"""How long ranks wait for one that says nothing (a node that lost power closes no connection) before the training ends with an error."""
LONGEST_FINISH = timedelta(hours=2)
"""How long the other ranks wait while rank 0 alone finishes a job."""
MOST_LOADING_PROCESSES = 8
"""On each rank, unless `launch.workers` says another number."""


@dataclass(frozen=True)
class Process:
    """One of the `world_size` processes of a torchrun job."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0, the only one that writes shared files and talks to MLflow."""
        return self.rank == 0


@contextmanager
def process_group() -> Iterator[Process]:
    """Join the job that torchrun started (or be alone without one) and leave it again; NCCL for GPUs, gloo for CPUs and host tensors."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    alone = "RANK" not in os.environ
    if alone:
        yield Process(0, 1, device)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=SILENCE)
    try:
        yield Process(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def loading_processes(asked: int | None, device: torch.device) -> int:
    """Data-loading processes of this rank: `launch.workers`, or what its null stands for.

    A CPU that trains is busy with every core: what a loading process takes there, the step waits for (benchmarks/train_step.py).
    """
    if asked is not None:
        return asked
    if device.type == "cpu":
        return 0
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cpus = int(os.environ.get("CPUS", here))  # of a pod, which sees all of its node's
    return max(1, min(MOST_LOADING_PROCESSES, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def barrier() -> None:
    """Wait for every process."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def others_wait(process: Process) -> Iterator[None]:
    """At the end of the body all ranks have finished theirs, however long one takes; a rank that ends with an error ends the others."""
    if process.world_size == 1:
        yield
        return
    group: Any = dist.new_group(backend="gloo", timeout=LONGEST_FINISH)
    yield
    dist.barrier(group)


def gather_rows(rows: Tensor, process: Process) -> Tensor | None:
    """Rows [n_rank, ...] of every rank in rank order on rank 0, None elsewhere; ranks may hold different numbers of rows."""
    if process.world_size == 1:
        return rows.cpu()
    mine = rows.cpu().contiguous()
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(process.world_size)]
    dist.all_gather(counts, torch.tensor([len(mine)]))
    longest = max(int(count) for count in counts)
    # gloo gathers equal shapes only; the padding is cut off again and never counted.
    padded = torch.cat([mine, mine.new_zeros((longest - len(mine), *mine.shape[1:]))])
    received = [torch.empty_like(padded) for _ in range(process.world_size)] if process.is_main else None
    dist.gather(padded, received)
    if received is None:
        return None
    return torch.cat([rows[: int(count)] for rows, count in zip(received, counts, strict=True)])


def mean_over_ranks(values: Tensor, process: Process) -> Tensor:
    """Mean over the ranks of a tensor of equal shape, on every rank."""
    if process.world_size > 1:
        dist.all_reduce(values)
        values /= process.world_size
    return values


class StopFlag:
    """Agreement of all ranks to stop after the same step, without waiting for the device.

    A signal reaches the ranks at different moments. Each step starts a tiny all-reduce of the ranks' flags on the host and reads
    the one of the step before, so every rank sees the same answer at the same step, and nobody waits for it.
    """

    def __init__(self, process: Process) -> None:
        self._alone = process.world_size == 1
        self._raised = False
        self._pending: tuple[Tensor, dist.Work] | None = None

    def raise_here(self) -> None:
        """Ask for a stop; safe in a signal handler."""
        self._raised = True

    def agreed(self) -> bool:
        """Whether all ranks stop now; every rank must call it once a step."""
        if self._alone:
            return self._raised
        answer = False
        if self._pending is not None:
            flag, work = self._pending
            work.wait()
            answer = bool(flag.item())
        flag = torch.tensor([float(self._raised)])
        self._pending = (flag, dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True))
        return answer
