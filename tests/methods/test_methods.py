"""The losses of every method, against the equations and against each other."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import ALONE, Tiny

from dho.catalogue import resolve
from dho.catalogue.methods import METHODS
from dho.config import from_dict
from dho.core.partition import partition
from dho.data.streams import Batch, Streams
from dho.methods.base import Method, create_method, total
from dho.runtime.dho_runtime import HEADS
from dho.teacher.classifier import open_classifier
from dho.training.train import micro_batch


def make(tiny: Tiny, method: str = "dho", **train: object) -> tuple[Method, Batch]:
    tree = copy.deepcopy(tiny.tree)
    tree["train"] |= {"method": method, **train}
    # A backbone without BatchNorm: its gradient does not depend on which images share a pass.
    tree["student"] = {"model": "test_vit", "input_size": 160}
    config = from_dict(tree)
    trained = create_method(config, open_classifier(config.teacher.classifier, tiny.store))
    streams = Streams(tiny.index, tiny.store, config, ALONE, trained.streams)
    return trained.train(), next(iter(streams.from_step(0)))[1]


def losses_of(method: Method, batch: Batch, counts: dict[str, float]) -> dict[str, torch.Tensor]:
    """Return `loss` and the terms, as the loop records them."""
    terms = method(batch, counts)
    return {"loss": total(method.weigh(terms)), **terms}


def gradient(trained: Method) -> torch.Tensor:
    return torch.cat(
        [parameter.grad.flatten() for parameter in trained.student.parameters() if parameter.grad is not None]
    )


def test_every_method_of_the_configuration_has_a_task() -> None:
    for name, row in METHODS.items():
        method = resolve(row.implementation)
        assert issubclass(method, Method), name
        assert set(method.heads) <= set(HEADS) and set(method.streams) <= {"labelled", "unlabelled"}


def test_dho_loss_is_the_papers_equation(tiny: Tiny) -> None:
    trained, batch = make(tiny, lambda_ce=0.3, eta=2.0)
    sizes = {name: float(len(entries["pixels"])) for name, entries in batch.items()}
    losses = losses_of(trained, batch, sizes)

    pixels = torch.cat([batch["labelled"]["pixels"], batch["unlabelled"]["pixels"]])
    outputs = trained.student(trained.student.normalise(pixels))
    labelled = len(batch["labelled"]["pixels"])
    ce = torch.nn.CrossEntropyLoss()(outputs["ce"][:labelled], batch["labelled"]["label"])
    kd = torch.zeros(())
    for rows, name in ((slice(None, labelled), "labelled"), (slice(labelled, None), "unlabelled")):
        teacher = tiny.store.logit_scale * batch[name]["embedding"].float() @ trained.classifier.text_weights.T
        target = torch.softmax(teacher / 2, -1)
        answer = torch.softmax(outputs["kd"][rows] / 2, -1)
        kd = kd + 4 * (target * (target.log() - answer.log())).sum(1).mean()
    torch.testing.assert_close(losses["ce"], ce)
    torch.testing.assert_close(losses["kd_labelled"] + losses["kd_unlabelled"], kd)
    torch.testing.assert_close(losses["loss"], 0.3 * ce + 0.7 * kd)


def test_each_head_learns_from_its_own_loss_only(tiny: Tiny) -> None:
    trained, batch = make(tiny, lambda_ce=1.0)
    losses_of(trained, batch, {"labelled": 8.0, "unlabelled": 8.0})["loss"].backward()
    assert trained.student.ce_head is not None and trained.student.kd_head is not None
    assert trained.student.ce_head.weight.grad.abs().sum() > 0
    assert trained.student.kd_head.weight.grad.abs().sum() == 0


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
    trained, batch = make(tiny, method)
    assert trained.student.heads == heads
    assert set(batch) == streams
    losses = losses_of(trained, batch, {"labelled": 8.0, "unlabelled": 8.0})
    assert set(losses) == names
    losses["loss"].backward()
    assert all(parameter.grad is not None for parameter in trained.student.parameters())


@pytest.mark.parametrize("pieces", [2, 3])
def test_micro_batches_give_the_gradient_of_the_whole_batch(tiny: Tiny, pieces: int) -> None:
    trained, batch = make(tiny)
    counts = {name: float(len(entries["pixels"])) for name, entries in batch.items()}
    losses_of(trained, batch, counts)["loss"].backward()
    whole = gradient(trained)
    trained.zero_grad()
    for piece in range(pieces):
        losses_of(trained, micro_batch(batch, piece, pieces), counts)["loss"].backward()
    torch.testing.assert_close(gradient(trained), whole, rtol=1e-4, atol=1e-6)


def test_unequal_shares_of_ranks_average_to_the_gradient_of_one_process(tiny: Tiny) -> None:
    trained, batch = make(tiny)
    sizes = {name: len(entries["pixels"]) for name, entries in batch.items()}
    losses_of(trained, batch, {name: float(size) for name, size in sizes.items()})["loss"].backward()
    whole = gradient(trained)
    ranks = 3  # 8 images of a stream: shares of 2, 3 and 3
    shares = []
    for rank in range(ranks):
        trained.zero_grad()
        share = {
            name: {
                key: value[slice(partition(sizes[name], rank, ranks).start, partition(sizes[name], rank, ranks).stop)]
                for key, value in entries.items()
            }
            for name, entries in batch.items()
        }
        losses_of(trained, share, {name: size / ranks for name, size in sizes.items()})["loss"].backward()
        shares.append(gradient(trained))
    torch.testing.assert_close(torch.stack(shares).mean(0), whole, rtol=1e-4, atol=1e-6)


def test_the_student_of_a_seed_is_always_the_same(tiny: Tiny) -> None:
    first, second, other = (make(tiny, seed=seed)[0].student.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
