"""The losses of every method, against the equations and against each other."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import ALONE, Tiny

from dho.config import METHODS as METHOD_NAMES
from dho.config import from_dict
from dho.core.partition import partition
from dho.data.streams import Batch, Streams
from dho.methods.base import METHODS, DistillationTask, create_task
from dho.training.train import _slice


def make(tiny: Tiny, method: str = "dho", **train: object) -> tuple[DistillationTask, Batch]:
    tree = copy.deepcopy(tiny.tree)
    tree["train"] |= {"method": method, **train}
    # A backbone without BatchNorm: its gradient does not depend on which images share a pass.
    tree["student"] = {"model": "test_vit", "input_size": 160}
    config = from_dict(tree)
    task = create_task(config.train, config.student, torch.from_numpy(tiny.store.text_weights), tiny.store.logit_scale)
    streams = Streams(tiny.index, tiny.store, config, ALONE, task.streams)
    return task.train(), next(iter(streams.from_step(0)))[1]


def gradient(task: DistillationTask) -> torch.Tensor:
    return torch.cat(
        [parameter.grad.flatten() for parameter in task.student.parameters() if parameter.grad is not None]
    )


def test_every_method_of_the_configuration_has_a_task() -> None:
    assert set(METHODS) == set(METHOD_NAMES)


def test_dho_loss_is_the_papers_equation(tiny: Tiny) -> None:
    task, batch = make(tiny, lambda_ce=0.3, eta=2.0)
    sizes = {name: float(len(entries["pixels"])) for name, entries in batch.items()}
    losses = task(batch, sizes)

    pixels = torch.cat([batch["labelled"]["pixels"], batch["unlabelled"]["pixels"]])
    outputs = task.student(task.student.normalise(pixels))
    labelled = len(batch["labelled"]["pixels"])
    ce = torch.nn.CrossEntropyLoss()(outputs["ce"][:labelled], batch["labelled"]["label"])
    kd = torch.zeros(())
    for rows, name in ((slice(None, labelled), "labelled"), (slice(labelled, None), "unlabelled")):
        teacher = tiny.store.logit_scale * batch[name]["embedding"].float() @ task.text_weights.T
        target = torch.softmax(teacher / 2, -1)
        answer = torch.softmax(outputs["kd"][rows] / 2, -1)
        kd = kd + 4 * (target * (target.log() - answer.log())).sum(1).mean()
    torch.testing.assert_close(losses["ce"], ce)
    torch.testing.assert_close(losses["kd_labelled"] + losses["kd_unlabelled"], kd)
    torch.testing.assert_close(losses["loss"], 0.3 * ce + 0.7 * kd)


def test_each_head_learns_from_its_own_loss_only(tiny: Tiny) -> None:
    task, batch = make(tiny, lambda_ce=1.0)
    task(batch, {"labelled": 8.0, "unlabelled": 8.0})["loss"].backward()
    assert task.student.ce_head is not None and task.student.kd_head is not None
    assert task.student.ce_head.weight.grad.abs().sum() > 0
    assert task.student.kd_head.weight.grad.abs().sum() == 0


@pytest.mark.parametrize(
    ("method", "heads", "streams", "names"),
    [
        ("ce", ("ce",), {"labelled"}, {"loss", "ce"}),
        ("kd", ("kd",), {"unlabelled"}, {"loss", "kd_unlabelled"}),
        ("ce_kd", ("ce",), {"labelled", "unlabelled"}, {"loss", "ce", "kd_labelled", "kd_unlabelled"}),
    ],
)
def test_baselines_have_their_heads_streams_and_losses(
    tiny: Tiny, method: str, heads: tuple[str, ...], streams: set[str], names: set[str]
) -> None:
    task, batch = make(tiny, method)
    assert task.student.heads == heads
    assert set(batch) == streams
    losses = task(batch, {"labelled": 8.0, "unlabelled": 8.0})
    assert set(losses) == names
    losses["loss"].backward()
    assert all(parameter.grad is not None for parameter in task.student.parameters())


@pytest.mark.parametrize("pieces", [2, 3])
def test_micro_batches_give_the_gradient_of_the_whole_batch(tiny: Tiny, pieces: int) -> None:
    task, batch = make(tiny)
    counts = {name: float(len(entries["pixels"])) for name, entries in batch.items()}
    task(batch, counts)["loss"].backward()
    whole = gradient(task)
    task.zero_grad()
    for piece in range(pieces):
        task(_slice(batch, piece, pieces), counts)["loss"].backward()
    torch.testing.assert_close(gradient(task), whole, rtol=1e-4, atol=1e-6)


def test_unequal_shares_of_ranks_average_to_the_gradient_of_one_process(tiny: Tiny) -> None:
    task, batch = make(tiny)
    sizes = {name: len(entries["pixels"]) for name, entries in batch.items()}
    task(batch, {name: float(size) for name, size in sizes.items()})["loss"].backward()
    whole = gradient(task)
    ranks = 3  # 8 images of a stream: shares of 2, 3 and 3
    shares = []
    for rank in range(ranks):
        task.zero_grad()
        mine = {
            name: {
                key: value[slice(partition(sizes[name], rank, ranks).start, partition(sizes[name], rank, ranks).stop)]
                for key, value in entries.items()
            }
            for name, entries in batch.items()
        }
        task(mine, {name: size / ranks for name, size in sizes.items()})["loss"].backward()
        shares.append(gradient(task))
    torch.testing.assert_close(torch.stack(shares).mean(0), whole, rtol=1e-4, atol=1e-6)


def test_the_student_of_a_seed_is_always_the_same(tiny: Tiny) -> None:
    first, second, other = (make(tiny, seed=seed)[0].student.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
