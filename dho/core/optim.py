"""Learning-rate schedule of the recipes (Table 7): linear warm-up, then cosine to zero."""

import math


def learning_rate_share(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at step `step` (from 0) of `steps`, with `warmup` steps of linear rise."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
