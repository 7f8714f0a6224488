"""Gradients per objective: their sum is what one backward pass gives, over micro-batches as well."""

from __future__ import annotations

import pytest
import torch
from conftest import ALONE, Tiny, changed
from torch import Tensor, nn

from dho.data.streams import Batch, Streams
from dho.methods.base import Method, create_method, total
from dho.methods.gradients import Gradients, cosine
from dho.teacher.classifier import open_classifier
from dho.training.train import micro_batch

STUDENT = {"model": "test_vit", "model_args": {}, "input_size": 160}
COUNTS = {"labelled": 8.0, "unlabelled": 8.0}


def make(tiny: Tiny, name: str) -> tuple[Method, Batch]:
    config = changed(tiny, train={"method": name}, student=STUDENT)
    method = create_method(config, open_classifier(config.teacher.classifier, tiny.store))
    streams = Streams(tiny.index, tiny.store, config, ALONE, method.streams)
    return method.train(), next(iter(streams.from_step(0)))[1]


def flat(parameters: list[nn.Parameter]) -> Tensor:
    return torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in parameters])


@pytest.mark.parametrize("method", ["dho", "ce_kd"])
def test_the_sum_over_objectives_is_the_gradient_of_the_loss(tiny: Tiny, method: str) -> None:
    trained, batch = make(tiny, method)
    parameters = list(trained.trainable.parameters())
    objectives = trained.weigh(trained(batch, COUNTS))
    gradients = Gradients(parameters)
    gradients.add(objectives)
    by_objective = gradients.reduce(world_size=1)
    assert set(by_objective) == {"ce", "kd"}
    total(objectives).backward()
    torch.testing.assert_close(by_objective["ce"] + by_objective["kd"], flat(parameters), rtol=1e-4, atol=1e-6)


def test_micro_batches_add_up_and_the_next_step_starts_anew(tiny: Tiny) -> None:
    trained, batch = make(tiny, "dho")
    gradients = Gradients(list(trained.student.backbone.parameters()))
    gradients.add(trained.weigh(trained(batch, COUNTS)))
    whole = gradients.reduce(world_size=1)
    for piece in range(2):
        gradients.add(trained.weigh(trained(micro_batch(batch, piece, 2), COUNTS)))
    pieces = gradients.reduce(world_size=1)
    for name in whole:
        torch.testing.assert_close(pieces[name], whole[name], rtol=1e-4, atol=1e-6)


def test_a_head_that_an_objective_does_not_reach_has_gradient_zero_there(tiny: Tiny) -> None:
    trained, batch = make(tiny, "dho")
    assert trained.student.kd_head is not None
    gradients = Gradients(list(trained.student.kd_head.parameters()))
    gradients.add(trained.weigh(trained(batch, COUNTS)))
    by_objective = gradients.reduce(world_size=1)
    assert by_objective["ce"].abs().sum() == 0 and by_objective["kd"].abs().sum() > 0


def test_a_written_gradient_is_that_of_the_parameters() -> None:
    layer = nn.Linear(3, 2)
    gradients = Gradients(list(layer.parameters()))
    gradients.write(torch.arange(8.0))
    assert layer.weight.grad is not None and layer.bias.grad is not None
    assert layer.weight.grad.tolist() == [[0, 1, 2], [3, 4, 5]] and layer.bias.grad.tolist() == [6, 7]


def test_the_cosine_is_negative_where_gradients_conflict() -> None:
    assert cosine(torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0])).item() == pytest.approx(-1)
    assert cosine(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])).item() == pytest.approx(0)
