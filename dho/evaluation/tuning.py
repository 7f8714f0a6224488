"""alpha and beta (Eq. 8), searched on val from stored head outputs; nothing is trained again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dho.config import EvaluateConfig
from dho.evaluation.head_outputs import HeadOutputs
from dho.evaluation.metrics import nll, only_alpha, top1
from dho.runtime.dho_runtime import softmax


@dataclass(frozen=True)
class Point:
    """One pair of the grid, with top-1 (share) and NLL (nats per image) of the combination on val."""

    alpha: float
    beta: float
    top1: float
    nll: float


def search(outputs: HeadOutputs, config: EvaluateConfig) -> tuple[Point, list[Point]]:
    """Find the best pair of the grid by top-1 on val, ties decided by the lower NLL; return it and the whole surface.

    A single-head student has one alpha (1 for `ce`, 0 for `kd`); beta is then searched for `kd` alone, where it moves
    NLL only.

    Args:
        outputs: head outputs of the val split; never those of test.
        config: the grid.
    """
    labels = outputs.labels
    nothing = np.zeros(1)
    ce = nothing if outputs.ce is None else softmax(outputs.ce)
    single = only_alpha(outputs)
    alphas = config.alphas if single is None else [single]
    betas = config.betas if outputs.kd is not None else [1.0]

    surface = []
    for beta in betas:
        kd = nothing if outputs.kd is None else softmax(outputs.kd, beta)
        for alpha in alphas:
            # Each head's softmax is made once for all pairs; this is dho_runtime.mix with that taken out of the loop.
            mixed = alpha * ce + (1 - alpha) * kd
            surface.append(Point(alpha, beta, top1(mixed, labels), nll(mixed, labels)))

    return min(surface, key=lambda point: (-point.top1, point.nll)), surface
