"""The C library's memory allocator, set for training on a CPU."""

from __future__ import annotations

import ctypes

KEPT_BYTES = 2**30
"""Freed memory that a process keeps for its next step instead of returning it to the kernel."""

# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Let this process keep the memory of a step's tensors for the next step.

    By default glibc returns a step's large tensors to the kernel, which clears and maps their pages again in the next
    step (6,000 pages per step with the default student: `benchmarks/allocator.py`).

    Returns:
        False where the C library is not glibc; nothing is changed there.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS and musl have none, Windows no such handle
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES) and mallopt(_M_MMAP_THRESHOLD, KEPT_BYTES))
