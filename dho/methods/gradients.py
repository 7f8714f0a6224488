"""Gradients of each objective on its own.

    gradients = Gradients(list(method.student.backbone.parameters()))
    gradients.add(method.weigh(method(batch, counts)))         # once per micro-batch
    ce, kd = gradients.reduce(world_size=1).values()           # float32 [parameters] each
    cosine(ce, kd)                                             # Fig. 3

They are for methods that combine gradients otherwise than by their sum, and for measuring conflict.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional


class Gradients:
    """Gradients per objective over chosen parameters, summed over micro-batches and averaged over ranks.

    Args:
        parameters: over which; a parameter that an objective does not reach has gradient 0 there.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self._sums: dict[str, Tensor] = {}

    def add(self, objectives: dict[str, Tensor]) -> None:
        """Add the gradients of one micro-batch; the graph is kept, so that `backward` may follow.

        Args:
            objectives: name -> scalar with a graph.
        """
        for name, objective in objectives.items():
            parts = torch.autograd.grad(objective, self.parameters, retain_graph=True, allow_unused=True)
            flat = torch.cat(
                [
                    (torch.zeros_like(parameter) if part is None else part).reshape(-1).float()
                    for parameter, part in zip(self.parameters, parts, strict=True)
                ]
            )
            self._sums[name] = self._sums[name] + flat if name in self._sums else flat

    def reduce(self, world_size: int) -> dict[str, Tensor]:
        """Return the gradient of each objective, float32 [parameters], averaged over the ranks.

        Every rank must call; there is one all-reduce per objective. The sums start again from zero.
        """
        sums, self._sums = self._sums, {}
        if world_size > 1:
            for gradient in sums.values():
                dist.all_reduce(gradient)
                gradient /= world_size
        return sums

    def write(self, gradient: Tensor) -> None:
        """Write a flat gradient [parameters] to the `grad` of the parameters."""
        start = 0
        for parameter in self.parameters:
            end = start + parameter.numel()
            parameter.grad = gradient[start:end].view_as(parameter).to(parameter.dtype).clone()
            start = end


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosine of two flat gradients, a scalar; negative where they conflict (Fig. 3)."""
    return functional.cosine_similarity(first, second, dim=0)
