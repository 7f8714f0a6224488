"""What a training process takes of its machine: loading processes by device and CPUs, and the memory it frees."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from dho.core.process import MAX_LOADING_PROCESSES, loading_processes

HERE = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("requested", "device", "environment", "expected"),
    [
        (None, CPU, {"CPUS": "16"}, 0),  # they would take the CPUs from the training
        (3, CPU, {"CPUS": "16"}, 3),
        (0, GPU, {"CPUS": "16"}, 0),
        (None, GPU, {"CPUS": "6"}, 6),
        (None, GPU, {"CPUS": "64"}, MAX_LOADING_PROCESSES),
        (None, GPU, {"CPUS": "16", "LOCAL_WORLD_SIZE": "4"}, 4),
        (None, GPU, {"CPUS": "4", "LOCAL_WORLD_SIZE": "8"}, 1),
        (None, GPU, {}, min(MAX_LOADING_PROCESSES, HERE)),
    ],
)
def test_loading_processes_are_those_asked_for_or_fit_the_device_and_the_cpus_of_the_rank(
    monkeypatch: pytest.MonkeyPatch,
    requested: int | None,
    device: torch.device,
    environment: dict[str, str],
    expected: int,
) -> None:
    for name in ("CPUS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert loading_processes(requested, device) == expected


PAGE_FAULTS = """
import resource, sys
import numpy as np
from dho.core.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def step():
    return [np.ones(size, np.uint8).sum() for size in (3 << 20, 48 << 20)]
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_a_steps_freed_memory_is_kept_for_the_next_step() -> None:
    faults = {
        name: int(
            subprocess.run([sys.executable, "-c", PAGE_FAULTS, name], check=True, capture_output=True, text=True).stdout
        )
        for name in ("returned", "kept")
    }
    assert faults["returned"] > 100 and faults["kept"] < faults["returned"] / 10
