"""Measure what keeping freed memory (`dho/core/allocator.py`) saves on a CPU.

    python benchmarks/allocator.py

In turns, in processes of their own because the setting cannot be undone: steps of the bare student with glibc's
default, which returns freed memory to the kernel, and with freed memory kept. Prints images per second and page faults
per step of each; the last line is the median ratio kept / returned.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys

import torch
from train_step import Bare

from dho.config import load
from dho.core.allocator import keep_freed_memory

ROUNDS, WARM_UP, STEPS, CLASSES = 3, 20, 80, 10


def main() -> None:
    ratios = []
    for number in range(ROUNDS):
        rates = {name: measured(name) for name in ("returned", "kept")}
        ratios.append(rates["kept"][0] / rates["returned"][0])
        message = ", ".join(
            f"{name}: {rate:,.0f} images/s, {faults:,.0f} page faults per step"
            for name, (rate, faults) in rates.items()
        )
        print(f"round {number + 1}: {message}", flush=True)
    print(f"ratio {statistics.median(ratios):.2f}")


def measured(name: str) -> tuple[float, float]:
    """Return images per second and page faults per step, measured in a new process."""
    command = [sys.executable, __file__, name, str(WARM_UP), str(STEPS)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rate, faults = map(float, output.split())
    return rate, faults


def one(name: str, warm_up: int, steps: int) -> None:
    """Measure in this process, and print both numbers."""
    if name == "kept" and not keep_freed_memory():
        raise SystemExit("this C library is not glibc: nothing to measure")
    bare = Bare(load(), torch.device("cpu"), CLASSES)
    bare.seconds(warm_up)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    seconds = bare.seconds(steps)
    print(steps * len(bare.images) / seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / steps)


if __name__ == "__main__":
    one(sys.argv[1], *map(int, sys.argv[2:])) if len(sys.argv) > 1 else main()
