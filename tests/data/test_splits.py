"""Who gets which image: balanced and seeded, no image on both sides, labels hidden."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import webdataset
from conftest import CLASSES, Tiny, draw_image, write_folder
from prepared import (
    card,
    prepare_mixed,
    rows,
    run,
    sources,
    write_csv,
)

from dho.core.errors import DataError
from dho.data.index import Index


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return prepare_mixed(tmp_path_factory.mktemp("mixed"))


# Who gets which image


def test_splits_are_balanced_and_leave_nothing_out(tiny: Tiny) -> None:
    index = tiny.index
    for split, each in (("labelled", 4), ("val", 5), ("test", 5), ("captions", 8)):
        assert Counter(index.labels[index.rows(split)].tolist()) == dict.fromkeys(range(3), each)
    assert card(index)["images"] == {"labelled": 12, "unlabelled": 54, "val": 15, "test": 15, "captions": 24}
    assert len(set(index.keys)) == len(index) == 120


def test_splits_change_with_the_seed_and_with_nothing_else(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", each=12, unlabelled=3)

    def held(**splits: Any) -> dict[str, str]:
        return {row["source"]: row["split"] for row in rows(run(tmp_path / "images", splits))}

    first = held()
    assert held() == first
    assert held(seed=1) != first
    more = held(shots=3)
    changed = {source for source, split in first.items() if more[source] != split}
    assert len(changed) == 3 and {first[source] for source in changed} == {"unlabelled"}


def test_a_share_of_the_labels_takes_that_share_of_each_class(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", each=22, unlabelled=1)
    index = run(tmp_path / "images", {"shots": None, "labelled_fraction": 0.25})
    assert Counter(index.labels[index.rows("labelled")].tolist()) == {0: 5, 1: 5, 2: 5}
    index = run(tmp_path / "images", {"shots": None, "labelled_fraction": 0.001})
    assert Counter(index.labels[index.rows("labelled")].tolist()) == {0: 1, 1: 1, 2: 1}
    index = run(tmp_path / "images", {"shots": None})
    assert Counter(index.labels[index.rows("labelled")].tolist()) == {0: 20, 1: 20, 2: 20}


def test_numbers_that_the_classes_do_not_divide_are_still_exact(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", each=12, unlabelled=0)
    index = run(tmp_path / "images", {"captions": 8, "unlabelled": 10})
    assert card(index)["images"] == {"labelled": 6, "unlabelled": 10, "val": 3, "test": 3, "captions": 8}
    assert Counter(index.labels[index.rows("captions")].tolist()) == {0: 3, 1: 3, 2: 2}


def test_a_huge_class_does_not_outweigh_the_others(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", each=8, unlabelled=0)
    for seed in range(100, 180):
        draw_image("circle", seed).save(tmp_path / "images" / "circle" / f"{seed}.png")
    index = run(tmp_path / "images", {"shots": 2, "unlabelled": 12})
    assert card(index)["images"] == {"labelled": 6, "unlabelled": 12, "val": 3, "test": 3}
    names = [Path(source).parts[0] for source in sources(index, "unlabelled")]
    assert Counter(names) == {"circle": 4, "square": 4, "stripes": 4}


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        ({"shots": 5}, r"class 'circle' has 4 labelled images left for labelled; data\.splits\.shots asks for 5"),
        (
            {"val_per_class": 9},
            r"class 'circle' has 5 labelled images left for val; data\.splits\.val_per_class asks for 9",
        ),
        (
            {"captions": 30},
            r"class 'circle' has 2 labelled images left for captions; data\.splits\.captions 30.* asks for 10",
        ),
        ({"shots": 4}, r"no image is left for the unlabelled split"),
        ({"shots": None, "val_per_class": 5}, r"class 'circle' has no labelled image left for training"),
    ],
)
def test_too_few_images_are_told_with_class_and_setting(tmp_path: Path, splits: dict[str, Any], words: str) -> None:
    write_folder(tmp_path / "images", each=6, unlabelled=0)
    with pytest.raises(DataError, match=words):
        run(tmp_path / "images", splits)


def test_hidden_labels_stay_hidden(mixed: Index) -> None:
    unlabelled = [row for row in rows(mixed) if row["split"] == "unlabelled"]
    assert any(row["source"].startswith(CLASSES) for row in unlabelled)  # labelled by their folder, used without
    assert all(row["label"] is None and row["caption"] is None for row in unlabelled)
    assert (mixed.labels[mixed.rows("unlabelled")] == -1).all()
    for shard in {row["shard"] for row in unlabelled}:
        for sample in webdataset.WebDataset(str(mixed.folder / shard), shardshuffle=False):
            assert len([name for name in sample if not name.startswith("__")]) == 1


# The same image twice


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder with val and test lists whose images have copies among the training images."""
    root = tmp_path / "images"
    write_folder(root, each=10, unlabelled=4)
    for split in ("val", "test"):
        (root / split).mkdir()
        lines = []
        for name in CLASSES:
            shutil.move(root / name / f"00{len(split) - 3}.jpg", root / split / f"{name}.jpg")
            lines.append(f"{split}/{name}.jpg,{name}")
        write_csv(root / f"{split}.csv", "path,label", lines)
    return root


LISTS = {"val": "val.csv", "test": "test.csv"}


@pytest.mark.parametrize(
    ("copy_of", "copy", "splits"),
    [
        ("val/circle.jpg", "unlabelled/copy.jpg", ("unlabelled", "val")),
        ("test/square.jpg", "unlabelled/copy.jpg", ("unlabelled", "test")),
        ("test/square.jpg", "val/stripes.jpg", ("val", "test")),
    ],
)
def test_the_same_image_in_two_splits_is_an_error_that_names_both(
    copied: Path, copy_of: str, copy: str, splits: tuple[str, str]
) -> None:
    shutil.copy(copied / copy_of, copied / copy)
    digest = hashlib.sha256((copied / copy).read_bytes()).hexdigest()[:16]
    with pytest.raises(DataError) as caught:
        run(copied, **LISTS)
    assert str(caught.value).startswith(
        f"{copy} ({splits[0]}) and {copy_of} ({splits[1]}) are the same image, SHA-256 {digest}..."
    )
    assert "data.on_leak: drop" in str(caught.value)


def test_copies_are_dropped_on_the_training_side_and_shots_stay_exact(copied: Path) -> None:
    for number, name in enumerate(sorted((copied / "circle").iterdir())[:6]):
        shutil.copy(copied / ("val" if number % 2 else "test") / "circle.jpg", name)
    shutil.copy(copied / "val" / "square.jpg", copied / "unlabelled" / "copy.jpg")
    index = run(copied, on_leak="drop", **LISTS)
    assert sources(index, "val") == [f"val/{name}.jpg" for name in CLASSES]
    assert sources(index, "test") == [f"test/{name}.jpg" for name in CLASSES]
    assert Counter(index.labels[index.rows("labelled")].tolist()) == {0: 2, 1: 2, 2: 2}
    assert card(index)["dropped_leaks"] == 7
    held: dict[bytes, set[str]] = {}
    for row in rows(index):
        held.setdefault(row["sha256"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in held.values())


def test_a_list_of_ones_own_comes_before_a_split_that_is_drawn(tmp_path: Path) -> None:
    root = tmp_path / "images"
    write_folder(root, each=10, unlabelled=1)
    (root / "val").mkdir()
    for name in CLASSES:  # every training image of a class but five has a copy in the val list
        for seed in range(5):
            shutil.copy(root / name / f"00{seed}.jpg", root / "val" / f"{name}{seed}.jpg")
    lines = [f"val/{name}{seed}.jpg,{name}" for name in CLASSES for seed in range(5)]
    index = run(root, {"test_per_class": 2}, on_leak="drop", val=write_csv(root / "val.csv", "path,label", lines))
    assert card(index)["images"] == {"labelled": 6, "unlabelled": 4, "val": 15, "test": 6}
    assert card(index)["dropped_leaks"] == 15


def test_copies_within_a_split_are_counted_and_kept(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", each=6, unlabelled=4)
    for number in range(3):
        shutil.copy(
            tmp_path / "images" / "unlabelled" / "000.png", tmp_path / "images" / "unlabelled" / f"copy{number}.png"
        )
    index = run(tmp_path / "images")
    assert card(index)["duplicates_within"] == {"unlabelled": 3}
    assert card(index)["images"]["unlabelled"] == 3 * 2 + 7
