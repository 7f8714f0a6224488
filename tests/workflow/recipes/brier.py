"""The Brier score."""

from __future__ import annotations

import numpy as np

from dho.evaluation.metrics import Labels, Probabilities


def brier(probabilities: Probabilities, labels: Labels) -> float:
    """Return the mean squared distance of probabilities [images, classes] to the one-hot labels [images]."""
    one_hot = np.eye(probabilities.shape[1])[labels]
    return float(((probabilities - one_hot) ** 2).sum(1).mean())
