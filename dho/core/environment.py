"""What the environment says about this process."""

from __future__ import annotations

import os


def under_torchrun() -> bool:
    """Return whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def reports_errors() -> bool:
    """Return whether this process reports an error of all ranks: rank 0 under torchrun, any process outside of it."""
    # In a pod RANK is the node's number until torchrun has started; only then does it say which process this is.
    return not under_torchrun() or os.environ["RANK"] == "0"
