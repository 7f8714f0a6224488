"""Waiting for servers that are down: in a cluster they come back, and a pod that gave up at once would lose its place."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TypeVar

from dho.core.errors import DhoError

T = TypeVar("T")

PATIENCE_S = 600.0
"""How long a pod waits for a server that does not answer, seconds."""
LONGEST_PAUSE_S = 15.0
"""Between two attempts, seconds; the first pause is 1 s, and each is twice the one before."""


def patiently(action: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
    """Call `action` until it works; only errors that may pass are waited for, `patience_s` seconds in all."""
    deadline, pause = time.monotonic() + patience_s, 1.0
    while True:
        try:
            return action()
        except DhoError as error:
            if not error.may_pass or time.monotonic() + pause > deadline:
                raise
            print(f"dho: {error}; trying again in {pause:.0f} s", file=sys.stderr, flush=True)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
