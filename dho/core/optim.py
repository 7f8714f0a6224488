"""Learning-rate schedule of the recipes (Table 7): linear warm-up, then cosine to zero."""

import math


def learning_rate_share(step: int, steps: int, warmup: int) -> float:
    """Return the share of the peak learning rate (0 to 1) at a step.

    Args:
        step: from 0.
        steps: of the whole training.
        warmup: steps of linear rise before the cosine.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
