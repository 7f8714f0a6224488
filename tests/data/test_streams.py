"""The two streams: every image once per epoch over all ranks, a function of the step, the same pixels for both."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Tiny

from dho.config import from_dict
from dho.core.errors import ConfigError
from dho.core.partition import partition
from dho.core.process import Process
from dho.data.pixels import Pixels
from dho.data.streams import Batch, StreamPlan, Streams, plan
from dho.teacher.clip import Teacher

CPU = torch.device("cpu")


def make_plan(
    unlabelled: int, batch: int, labelled: int = 7, batch_labelled: int = 4, views: int = 3, seed: int = 0
) -> StreamPlan:
    return StreamPlan(np.arange(labelled) + 1000, np.arange(unlabelled) * 2, batch_labelled, batch, views, seed)


def streams(
    tiny: Tiny, rank: int = 0, world_size: int = 1, uses: tuple[str, ...] = ("labelled", "unlabelled"), **changes: Any
) -> Streams:
    tree = copy.deepcopy(tiny.tree)
    tree["launch"]["workers"] = changes.pop("workers", 0)
    tree["train"] |= changes
    return Streams(tiny.index, tiny.store, from_dict(tree), Process(rank, world_size, CPU), uses)


def flat(batch: Batch) -> dict[str, torch.Tensor]:
    return {f"{stream}.{name}": value for stream, entries in batch.items() for name, value in entries.items()}


def same(one: Batch, other: Batch) -> bool:
    first, second = flat(one), flat(other)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def shares(rows: np.ndarray[Any, Any], world_size: int) -> list[np.ndarray[Any, Any]]:
    return [
        rows[partition(len(rows), rank, world_size).start : partition(len(rows), rank, world_size).stop]
        for rank in range(world_size)
    ]


# Which images


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    ("images", "batch"), [(64, 8), (65, 8), (63, 8), (7, 8), (8, 8), (9, 8), (101, 13), (20000, 64)]
)
def test_an_epoch_uses_every_unlabelled_image_once_over_all_ranks(images: int, batch: int, world_size: int) -> None:
    streams_plan = make_plan(images, batch)
    for epoch in range(2):
        used: list[int] = []
        sizes = []
        for step in range(epoch * streams_plan.steps_per_epoch, (epoch + 1) * streams_plan.steps_per_epoch):
            rows, _ = streams_plan.unlabelled_at(step)
            sizes.append(len(rows))
            ranks = shares(rows, world_size)
            assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
            used += [int(row) for share in ranks for row in share]
        assert sorted(used) == streams_plan.unlabelled.tolist()
        assert max(sizes) <= batch and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("labelled", "batch"), [(7, 4), (12, 8), (5, 16), (8, 8), (160, 64)])
def test_the_labelled_stream_cycles_evenly(labelled: int, batch: int) -> None:
    streams_plan = make_plan(40, 8, labelled, batch)
    used: Counter[int] = Counter()
    for step in range(23):
        rows, views = streams_plan.labelled_at(step)
        assert len(rows) == len(views) == batch
        used.update(rows.tolist())
        assert max(used.values()) - min(used[row] for row in streams_plan.labelled.tolist()) <= 1
    assert sum(used.values()) == 23 * batch


def test_every_pass_has_an_order_of_its_own() -> None:
    streams_plan = make_plan(64, 64, 64, 64)
    orders = [tuple(streams_plan.unlabelled_at(step)[0]) for step in range(3)] + [
        tuple(streams_plan.labelled_at(step)[0]) for step in range(3)
    ]
    assert len(set(orders)) == 6
    assert tuple(make_plan(64, 64, 64, 64, seed=1).unlabelled_at(0)[0]) not in orders


def test_the_view_is_the_epochs_number_modulo_the_number_of_views() -> None:
    streams_plan = make_plan(20, 5, 7, 4, views=3)
    for step in range(32):
        _, views = streams_plan.unlabelled_at(step)
        assert set(views.tolist()) == {(step // 4) % 3}
    seen: Counter[int] = Counter()
    for step in range(42):  # 24 passes over the 7 labelled images
        for row, view in zip(*streams_plan.labelled_at(step), strict=True):
            assert view == seen[int(row)] % 3
            seen[int(row)] += 1


def test_the_unlabelled_stream_draws_from_both_splits_or_leaves_the_labelled_out(tiny: Tiny) -> None:
    index = tiny.index
    for both, splits in ((True, ("labelled", "unlabelled")), (False, ("unlabelled",))):
        config = from_dict(tiny.tree | {"train": tiny.tree["train"] | {"unlabelled_includes_labelled": both}})
        made = plan(index, config)
        assert made.unlabelled.tolist() == index.rows(*splits).tolist()
        assert made.labelled.tolist() == index.rows("labelled").tolist()
        assert {str(split) for split in index.splits[made.unlabelled]} == set(splits)
    assert streams(tiny, unlabelled_includes_labelled=True).plan.steps_per_epoch == 9
    assert streams(tiny, unlabelled_includes_labelled=False).plan.steps_per_epoch == 7


def test_held_out_images_are_in_neither_stream(tiny: Tiny) -> None:
    made = plan(tiny.index, tiny.config)
    held = set(tiny.index.rows("val", "test", "captions").tolist())
    assert not held & {*made.labelled.tolist(), *made.unlabelled.tolist()}


# What is in a batch


def test_a_batch_holds_the_views_pixels_the_stores_embedding_and_the_label(tiny: Tiny) -> None:
    made = streams(tiny)
    index, store, config = tiny.index, tiny.store, tiny.config
    pixels = Pixels(index, config.views, config.student.input_size, config.student.interpolation)
    for step, batch in made.from_step(0):
        for name, (rows, views) in (
            ("labelled", made.plan.labelled_at(step)),
            ("unlabelled", made.plan.unlabelled_at(step)),
        ):
            assert torch.equal(batch[name]["pixels"], pixels.batch(rows, views))
            assert batch[name]["pixels"].dtype == torch.uint8
            for i, (row, view) in enumerate(zip(rows, views, strict=True)):
                assert torch.equal(
                    batch[name]["embedding"][i], torch.from_numpy(store.embeddings(np.array([row]), int(view)))[0]
                )
            if name == "labelled":
                assert batch[name]["label"].tolist() == index.labels[rows].tolist()
        assert set(batch["unlabelled"]) == {"pixels", "embedding"}  # no label can leak
        assert {name: len(entries["pixels"]) for name, entries in batch.items()} == made.sizes(step)
    assert step == made.steps - 1 == 17


def test_the_stores_embedding_is_the_teachers_of_the_very_view_the_student_sees(tiny: Tiny) -> None:
    teacher = Teacher.load(tiny.config.teacher, CPU)
    made = streams(tiny)
    step = made.plan.steps_per_epoch + 1  # in the second epoch, which uses the second view
    rows, views = made.plan.unlabelled_at(step)
    assert set(views.tolist()) == {1}
    _, batch = next(iter(made.from_step(step)))
    seen = Pixels(tiny.index, tiny.config.views, teacher.input_size, teacher.interpolation).batch(rows, views)
    online = teacher.embed(seen)
    stored = batch["unlabelled"]["embedding"].float()
    assert torch.nn.functional.cosine_similarity(online, stored).min() > 0.9999
    other = teacher.embed(
        Pixels(tiny.index, tiny.config.views, teacher.input_size, teacher.interpolation).batch(rows, views - 1)
    )
    assert (online - stored).norm() < (other - stored).norm() / 2  # and not of another view


@pytest.mark.parametrize("uses", [("labelled",), ("unlabelled",)])
def test_a_stream_that_the_method_does_not_use_is_not_loaded(tiny: Tiny, uses: tuple[str, ...]) -> None:
    _, batch = next(iter(streams(tiny, uses=uses).from_step(0)))
    assert tuple(batch) == uses


# The same for everyone


@pytest.mark.parametrize("workers", [0, 1])
def test_starting_at_a_step_gives_the_tail_of_starting_at_the_first(tiny: Tiny, workers: int) -> None:
    whole = list(streams(tiny, workers=workers).from_step(0))
    for first in (1, 8, 9, 13, 17):
        tail = list(streams(tiny, workers=workers).from_step(first))
        assert [step for step, _ in tail] == list(range(first, 18))
        assert all(same(batch, whole[step][1]) for step, batch in tail)
    assert list(streams(tiny, workers=workers).from_step(18)) == []


def test_the_number_of_workers_does_not_change_the_batches(tiny: Tiny) -> None:
    runs = [list(itertools.islice(streams(tiny, workers=workers).from_step(4), 8)) for workers in (0, 1, 2)]
    for others in runs[1:]:
        assert [step for step, _ in others] == [step for step, _ in runs[0]]
        assert all(same(one, other) for (_, one), (_, other) in zip(runs[0], others, strict=True))


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_ranks_together_have_what_one_process_has(tiny: Tiny, world_size: int) -> None:
    alone = list(streams(tiny).from_step(0))
    ranks = [list(streams(tiny, rank, world_size).from_step(0)) for rank in range(world_size)]
    for (step, batch), *parts in zip(alone, *ranks, strict=True):
        assert {number for number, _ in parts} == {step}
        pieces = [flat(piece) for _, piece in parts]
        together = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        assert together.keys() == flat(batch).keys()
        assert all(torch.equal(together[name], value) for name, value in flat(batch).items())


# Batches that are too small


@pytest.mark.parametrize(
    ("changes", "world_size", "words"),
    [
        (
            {"batch_labelled": 1},
            2,
            r"train\.batch_labelled gives steps of 1 images; expected at least 2 \(2 ranks x train\.accumulate 1\)",
        ),
        (
            {"batch_labelled": 4, "accumulate": 5},
            1,
            r"train\.batch_labelled gives steps of 4 images; expected at least 5 \(1 ranks",
        ),
        ({"batch_unlabelled": 2}, 3, r"train\.batch_unlabelled gives steps of 2 images; expected at least 3"),
        (
            {"batch_unlabelled": 5, "accumulate": 5},
            1,
            r"train\.batch_unlabelled gives steps of 4 images",
        ),  # 66 images: 14 steps of 4 or 5
    ],
)
def test_a_batch_too_small_for_the_ranks_is_an_error(
    tiny: Tiny, changes: dict[str, int], world_size: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        streams(tiny, 0, world_size, **changes)


def test_a_small_batch_of_a_stream_that_is_not_used_does_not_matter(tiny: Tiny) -> None:
    streams(tiny, 0, 2, uses=("unlabelled",), batch_labelled=1)


@pytest.mark.parametrize("batch", [66, 1000])
def test_a_batch_of_all_images_or_more_is_one_step_an_epoch(tiny: Tiny, batch: int) -> None:
    made = streams(tiny, batch_unlabelled=batch)
    assert made.steps == 2 and made.sizes(1)["unlabelled"] == 66
