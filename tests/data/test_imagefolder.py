"""Layout `imagefolder`: torchvision's train/<class>, val/<class>, test/<class>, used as they are."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import CLASSES, draw_image
from prepared import card, run, sources

from dho.core.errors import DataError
from dho.data.index import Index

PER_CLASS = {"train": 6, "val": 2, "test": 3}


def write_imagefolder(root: Path, *splits: str) -> None:
    for number, split in enumerate(splits):
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for seed in range(PER_CLASS.get(split, 2)):
                draw_image(name, 100 * number + seed).save(folder / f"{seed}.png")


def run_imagefolder(root: Path, **data: Any) -> Index:
    return run(root, name="imagefolder", **data)


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_the_splits_are_those_of_the_folders(tmp_path: Path, val: str) -> None:
    write_imagefolder(tmp_path / "images", "train", val, "test")
    index = run_imagefolder(tmp_path / "images")
    assert index.name == "imagefolder" and index.class_names == list(CLASSES)
    assert card(index)["images"] == {"labelled": 6, "unlabelled": 12, "val": 6, "test": 9}
    assert Counter(index.labels[index.rows("labelled")].tolist()) == {0: 2, 1: 2, 2: 2}
    for split, folder in (("val", val), ("test", "test"), ("labelled", "train"), ("unlabelled", "train")):
        assert {Path(path).parts[0] for path in sources(index, split)} == {folder}
    for split in ("labelled", "val", "test"):
        classes = [index.class_names[label] for label in index.labels[index.rows(split)]]
        assert [Path(path).parts[1] for path in sources(index, split)] == classes


def test_without_val_and_test_both_are_drawn_from_train(tmp_path: Path) -> None:
    write_imagefolder(tmp_path / "images", "train")
    index = run_imagefolder(tmp_path / "images")
    assert card(index)["images"] == {"labelled": 6, "unlabelled": 6, "val": 3, "test": 3}


def test_unlabelled_images_may_lie_beside_the_classes_of_train(tmp_path: Path) -> None:
    root = tmp_path / "images"
    write_imagefolder(root, "train", "val", "test")
    (root / "train" / "unlabelled").mkdir()
    draw_image("circle", 999).save(root / "train" / "unlabelled" / "a.png")
    index = run_imagefolder(root)
    assert index.class_names == list(CLASSES)
    assert "train/unlabelled/a.png" in sources(index, "unlabelled")


def test_what_is_wrong_with_the_folders_is_one_line(tmp_path: Path) -> None:
    def refused(words: str) -> None:
        with pytest.raises(DataError, match=words) as caught:
            run_imagefolder(tmp_path / "images")
        assert "\n" not in str(caught.value)

    root = tmp_path / "images"
    write_imagefolder(root, "train", "val")
    (root / "train").rename(tmp_path / "train")
    refused(r"images: no folder 'train'; expected train/<class>/\*\.jpg")
    (tmp_path / "train").rename(root / "train")

    (root / "Test").mkdir()
    refused(r"images/Test: not a split; expected train, val, valid, validation, test in ")
    (root / "Test").rmdir()

    shutil.copytree(root / "val", root / "valid")
    refused(r"images/valid and .*images/val are both the val split; keep one")
    shutil.rmtree(root / "valid")

    (root / "test").mkdir()
    draw_image("circle", 999).save(root / "test" / "a.png")
    refused(r"images/test holds no class folder with images; add some, or remove it")
    shutil.rmtree(root / "test")

    for name in ("triangle", "unlabelled"):
        (root / "val" / "circle").rename(root / "val" / name)
        refused(rf"val/{name}/0\.png: its class is not among those of .*images/train, circle, square, stripes")
        (root / "val" / name).rename(root / "val" / "circle")

    for name in ("square", "stripes"):
        shutil.rmtree(root / "train" / name)
        shutil.rmtree(root / "val" / name)
    refused(r"images: found 1 classes; expected train/<class>/\*\.jpg")
