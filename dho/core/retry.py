"""Waiting for servers that are down: in a cluster they come back, and a pod that gave up would lose its place."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TypeVar

from dho.core.errors import DhoError

T = TypeVar("T")

MAX_WAIT_S = 600.0
"""How long a pod waits for a server that does not answer, seconds."""
MAX_PAUSE_S = 15.0
"""Between two attempts, seconds; the first pause is 1 s, and each is twice the one before."""


def retry(action: Callable[[], T], max_wait_s: float = MAX_WAIT_S) -> T:
    """Call `action` until it works.

    Args:
        action: called again after an error that may pass (`DhoError.may_pass`).
        max_wait_s: seconds of waiting in all.

    Returns:
        What `action` returns.

    Raises:
        DhoError: an error that does not pass, or the last one that did not pass in time.
    """
    deadline, pause = time.monotonic() + max_wait_s, 1.0
    while True:
        try:
            return action()
        except DhoError as error:
            if not error.may_pass or time.monotonic() + pause > deadline:
                raise
            print(f"dho: {error}; trying again in {pause:.0f} s", file=sys.stderr, flush=True)
            time.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE_S)
