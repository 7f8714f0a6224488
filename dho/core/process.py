"""Processes started by torchrun: their rank and device, and what they exchange.

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

MAX_SILENCE = timedelta(minutes=5)
"""How long ranks wait for a silent one before they end with an error: a node that lost power closes no connection."""
MAX_FINISH = timedelta(hours=2)
"""How long the other ranks wait while rank 0 alone finishes a job."""
MAX_LOADING_PROCESSES = 8
"""Per rank, unless `launch.workers` says another number."""


@dataclass(frozen=True)
class Process:
    """One of the `world_size` processes of a torchrun job."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, the only one that writes shared files and talks to MLflow."""
        return self.rank == 0


@contextmanager
def process_group() -> Iterator[Process]:
    """Join the job that torchrun started, and leave it at the end; without torchrun the process is alone.

    NCCL carries tensors on GPUs, gloo those on CPUs.
    """
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
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=MAX_SILENCE)
    try:
        yield Process(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def loading_processes(requested: int | None, device: torch.device) -> int:
    """Return the number of data-loading processes of this rank.

    Training on a CPU uses every core, so a loading process would only slow down the step (`benchmarks/train_step.py`).

    Args:
        requested: `launch.workers`; None means none on a CPU, and one per CPU of the rank, at most
            `MAX_LOADING_PROCESSES`, on a GPU.
        device: of the training.
    """
    if requested is not None:
        return requested
    if device.type == "cpu":
        return 0
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cpus = int(os.environ.get("CPUS", usable))  # a pod sees all CPUs of its node, not only those it was given
    return max(1, min(MAX_LOADING_PROCESSES, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def barrier() -> None:
    """Wait for every process."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def others_wait(process: Process) -> Iterator[None]:
    """Leave the body once all ranks have finished theirs, however long one takes (at most `MAX_FINISH`).

    A rank that ends with an error ends the others.
    """
    if process.world_size == 1:
        yield
        return
    group: Any = dist.new_group(backend="gloo", timeout=MAX_FINISH)
    yield
    dist.barrier(group)


def gather_rows(rows: Tensor, process: Process) -> Tensor | None:
    """Gather the rows of every rank, in rank order, on rank 0; every rank must call.

    Args:
        rows: [n_rank, ...] of any dtype; ranks may hold different numbers of rows.
        process: this rank.

    Returns:
        On rank 0 [n, ...] on the CPU, elsewhere None.
    """
    if process.world_size == 1:
        return rows.cpu()
    local_rows = rows.cpu().contiguous()
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(process.world_size)]
    dist.all_gather(counts, torch.tensor([len(local_rows)]))
    longest = max(int(count) for count in counts)

    # gloo gathers equal shapes only; the padding is cut off again and never counted.
    padding = local_rows.new_zeros((longest - len(local_rows), *local_rows.shape[1:]))
    padded = torch.cat([local_rows, padding])
    received = [torch.empty_like(padded) for _ in range(process.world_size)] if process.is_main else None
    dist.gather(padded, received)
    if received is None:
        return None
    return torch.cat([rows[: int(count)] for rows, count in zip(received, counts, strict=True)])


def mean_over_ranks(values: Tensor, process: Process) -> Tensor:
    """Return the mean over the ranks of a tensor of the same shape on each.

    Every rank must call; `values` is overwritten.
    """
    if process.world_size > 1:
        dist.all_reduce(values)
        values /= process.world_size
    return values


class StopFlag:
    """Agreement of all ranks to stop after the same step, without waiting for the device.

    A signal reaches the ranks at different moments. Each step starts a tiny all-reduce of the ranks' flags on the host
    and reads the one of the step before, so every rank sees the same answer at the same step, and none waits for it.
    """

    def __init__(self, process: Process) -> None:
        self._alone = process.world_size == 1
        self._raised = False
        self._pending: tuple[Tensor, dist.Work] | None = None

    def raise_here(self) -> None:
        """Ask for a stop; safe in a signal handler."""
        self._raised = True

    def agreed(self) -> bool:
        """Return whether all ranks stop now; every rank must call it once per step."""
        if self._alone:
            return self._raised
        stop = False
        if self._pending is not None:
            flag, work = self._pending
            work.wait()
            stop = bool(flag.item())

        flag = torch.tensor([float(self._raised)])
        self._pending = (flag, dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True))
        return stop
