"""Layout `coop`: a data set of CoOp's is one row and a class list; what is wrong with a split file is one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CLASSES, draw_image
from prepared import beside, card, run, sources

import dho
from dho.catalogue.datasets import DataSet
from dho.config import from_dict
from dho.core.errors import ConfigError, DataError
from dho.data.fetch import fetch
from dho.data.index import Index
from dho.data.prepare import prepare

Split = dict[str, Any]
PER_CLASS = {"train": 5, "val": 2, "test": 3}

TOY_SHAPES = DataSet(
    name="toy_shapes",
    doc="three shapes",
    layout="coop",
    class_names=("round shape", "four-sided shape", "striped shape"),
    templates=("a drawing of a {}.",),
    licence="CC0",
    split_file="split_zhou_ToyShapes.json",
    image_folders=("jpg",),
)
"""A row as a user's own module holds it: `data.name: test_coop:TOY_SHAPES`."""


def write_coop(root: Path, image_folder: str = "images", name: str = "ToyShapes") -> Split:
    """Write a small tree as CoOp's data sets have it and return its split."""
    split: Split = {}
    seed = 0
    for pool, count in PER_CLASS.items():
        split[pool] = []
        for label, class_name in enumerate(CLASSES):
            folder = root / image_folder / class_name
            folder.mkdir(parents=True, exist_ok=True)
            for _ in range(count):
                seed += 1
                draw_image(class_name, seed).save(folder / f"{seed:03d}.jpg", quality=92)
                split[pool].append([f"{class_name}/{seed:03d}.jpg", label, class_name])
    (root / "annotations").mkdir()
    (root / f"split_zhou_{name}.json").write_text(json.dumps(split))
    return split


def run_coop(root: Path, name: str = "coop", **data: Any) -> Index:
    return run(root, name=name, **data)


def labelled_by_class(index: Index) -> dict[str, set[str]]:
    """Class name -> class folders of the images that carry it."""
    folders: dict[str, set[str]] = {}
    for split in ("labelled", "val", "test"):
        for row, path in zip(index.rows(split), sources(index, split), strict=True):
            folders.setdefault(index.class_names[index.labels[row]], set()).add(Path(path).parent.name)
    return folders


# A data set that is as it should be


@pytest.mark.parametrize("image_folder", ["", "images", "jpg", "101_ObjectCategories"])
def test_the_splits_are_those_of_the_file(tmp_path: Path, image_folder: str) -> None:
    split = write_coop(tmp_path / "toy", image_folder)
    index = run_coop(tmp_path / "toy")
    assert index.name == "coop" and index.class_names == list(CLASSES)
    for pool in ("val", "test"):
        assert sources(index, pool) == [str(Path(image_folder, path)) for path, _, _ in split[pool]]
        assert index.labels[index.rows(pool)].tolist() == [label for _, label, _ in split[pool]]
    assert card(index)["images"] == {"labelled": 6, "unlabelled": 9, "val": 6, "test": 9}
    assert Counter(index.labels[index.rows("labelled")].tolist()) == {0: 2, 1: 2, 2: 2}
    assert {*sources(index, "labelled"), *sources(index, "unlabelled")} == {
        str(Path(image_folder, path)) for path, _, _ in split["train"]
    }
    assert labelled_by_class(index) == {name: {name} for name in CLASSES}


def test_a_row_of_the_users_own_names_classes_templates_and_folders(tmp_path: Path) -> None:
    write_coop(tmp_path / "toy", "jpg")
    index = run_coop(tmp_path / "toy", "test_coop:TOY_SHAPES")
    assert index.name == "toy_shapes" and index.class_names == list(TOY_SHAPES.class_names)
    assert labelled_by_class(index) == dict(zip(TOY_SHAPES.class_names, ({name} for name in CLASSES), strict=True))
    assert card(index)["licence"] == "CC0"


ROW = """
DATASETS["shapes"] = DataSet(
    name="shapes",
    doc="three shapes",
    layout="coop",
    class_names=class_list("shapes"),
    split_file="split_zhou_ToyShapes.json",
    image_folders=("jpg",),
)
"""
STAGES = """
import sys
import dho
from dho.config import from_dict
from dho.core.workspace import Workspace
from dho.data.fetch import fetch
from dho.data.prepare import prepare
config = from_dict({"data": {"name": "shapes", "source": sys.argv[1], "splits": {"shots": 2}}})
fetch(config, Workspace())
index = prepare(config, Workspace())
print(dho.__file__, index.name, index.class_names, len(index))
"""


def test_one_row_of_the_catalogue_and_a_class_list_are_enough(tmp_path: Path) -> None:
    write_coop(tmp_path / "toy", "jpg")
    package = Path(shutil.copytree(Path(dho.__file__).parent, tmp_path / "copy" / "dho"))
    with (package / "catalogue" / "datasets.py").open("a") as file:
        file.write(ROW)
    (package / "catalogue" / "classes" / "shapes.txt").write_text("ring\nbox\nlines\n")
    result = subprocess.run(
        [sys.executable, "-c", STAGES, str(tmp_path / "toy")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "copy")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines()[-1] == f"{package / '__init__.py'} shapes ['ring', 'box', 'lines'] 30"


def test_class_names_of_the_parameters_replace_those_of_the_file(tmp_path: Path) -> None:
    write_coop(tmp_path / "toy")
    index = run_coop(tmp_path / "toy", class_names=["ring", "box", "lines"])
    assert labelled_by_class(index) == {"ring": {"circle"}, "box": {"square"}, "lines": {"stripes"}}


def test_new_class_names_need_no_new_fetch(tmp_path: Path) -> None:
    write_coop(tmp_path / "toy")
    run_coop(tmp_path / "toy")
    listing = (tmp_path / "raw" / "listing.csv").read_bytes()
    tree = {"name": "coop", "source": str(tmp_path / "toy"), "class_names": ["ring", "box", "lines"]}
    renamed = prepare(from_dict({"data": tree | {"splits": {"shots": 2}}}), beside(tmp_path))
    assert renamed.class_names == ["ring", "box", "lines"]
    fetch(from_dict({"data": tree}), beside(tmp_path))
    assert (tmp_path / "raw" / "listing.csv").read_bytes() == listing


def test_empty_val_and_test_lists_are_drawn_from_train(tmp_path: Path) -> None:
    split = write_coop(tmp_path / "toy")
    write_split(tmp_path / "toy", split | {"val": [], "test": []})
    index = run_coop(tmp_path / "toy")
    assert card(index)["images"] == {"labelled": 6, "unlabelled": 3, "val": 3, "test": 3}


def test_a_path_that_comes_twice_with_one_label_is_left_to_the_rule_for_leaks(tmp_path: Path) -> None:
    split = write_coop(tmp_path / "toy")
    write_split(tmp_path / "toy", split | {"val": split["val"] + split["test"][:1]})
    with pytest.raises(DataError, match=r"\(val\) and .*\(test\) are the same image"):
        run_coop(tmp_path / "toy")
    assert card(run_coop(tmp_path / "toy", on_leak="drop"))["dropped_leaks"] == 1


# What can be wrong with it


def write_split(root: Path, split: Any) -> None:
    (root / "split_zhou_ToyShapes.json").write_text(split if isinstance(split, str) else json.dumps(split))


def replaced(split: Split, pool: str, number: int, entry: Any) -> Split:
    return split | {pool: [*split[pool][:number], entry, *split[pool][number + 1 :]]}


WRONG: list[tuple[Callable[[Split], Any], str]] = [
    (lambda _: "{", r": cannot be read as JSON \("),
    (lambda _: "[" * 100_000, r": cannot be read as JSON \("),
    (lambda _: [], r": expected a mapping of three lists, train, val, test"),
    (lambda split: {"train": split["train"], "test": []}, r": expected a mapping of three lists"),
    (lambda split: split | {"unlabelled": []}, r": expected a mapping of three lists"),
    (lambda split: split | {"val": {}}, r": expected a mapping of three lists"),
    (lambda split: split | {"train": []}, r": train is empty"),
    (
        lambda split: replaced(split, "train", 1, ["circle/001.jpg", 0]),
        r", train\[1\] is \['circle/001\.jpg', 0\]; expe",
    ),
    (
        lambda split: replaced(split, "val", 0, "circle"),
        r", val\[0\] is 'circle'; expected \[path, label, class name\]",
    ),
    (lambda split: replaced(split, "test", 2, [7, 0, "circle"]), r", test\[2\]: the path is 7; expected text"),
    (lambda split: replaced(split, "test", 2, ["", 0, "circle"]), r", test\[2\]: the path is ''; expected text"),
    (lambda split: replaced(split, "train", 3, ["a.jpg", "0", "circle"]), r", train\[3\]: the label is '0'; expected"),
    (lambda split: replaced(split, "train", 3, ["a.jpg", True, "circle"]), r", train\[3\]: the label is True; expect"),
    (lambda split: replaced(split, "train", 3, ["a.jpg", -1, "circle"]), r", train\[3\]: the label is -1; expected a"),
    (lambda split: replaced(split, "train", 3, ["a.jpg", 0.0, "circle"]), r", train\[3\]: the label is 0\.0; expecte"),
    (lambda split: replaced(split, "val", 1, ["a.jpg", 0, None]), r", val\[1\]: label 0 has no class name, None; exp"),
    (lambda split: replaced(split, "val", 1, ["a.jpg", 0, " "]), r", val\[1\]: label 0 has no class name, ' '; expec"),
    (lambda split: replaced(split, "val", 1, ["gr\udcf6.jpg", 0, "circle"]), r", val\[1\]: .* is not UTF-8 text"),
    (
        lambda split: replaced(split, "val", 1, ["circle/999.jpg", 0, "circle"]),
        r", val\[1\]: no file 'circle/999\.jpg' i",
    ),
    (
        lambda split: replaced(split, "train", 0, ["circle/999.jpg", 0, "circle"]),
        r", train\[0\]: no file 'circle/999\.j",
    ),
    (lambda split: replaced(split, "val", 1, ["a\0.jpg", 0, "circle"]), r", val\[1\]: no file 'a\\x00\.jpg' in "),
    (lambda split: replaced(split, "val", 1, ["x" * 300, 0, "circle"]), r", val\[1\]: no file 'xxx"),
    (
        lambda split: replaced(split, "val", 1, ["../outside.jpg", 0, "circle"]),
        r", val\[1\]: '\.\./outside\.jpg' leaves",
    ),
    (
        lambda split: replaced(split, "val", 1, ["/etc/passwd", 0, "circle"]),
        r", val\[1\]: '/etc/passwd' leaves the imag",
    ),
    (
        lambda split: replaced(split, "val", 3, ["./circle/001.jpg", 1, "square"]),
        r", val\[3\]: 'circle/001\.jpg' has label 1, and 0 in .*split_zhou_ToyShapes\.json, train\[0\]",
    ),
    (
        lambda split: replaced(split, "test", 0, [split["test"][0][0], 0, "ring"]),
        r", test\[0\]: label 0 is 'ring', and 'circle' in .*split_zhou_ToyShapes\.json, train\[0\]",
    ),
    (
        lambda split: replaced(split, "test", 0, [split["test"][0][0], 10**12, "ring"]),
        r": no entry has label 3, so its class has no name; list the classes in data\.class_names, or in the catalog",
    ),
    (
        lambda split: {pool: [[path, label, "shape"] for path, label, _ in split[pool]] for pool in split},
        r": labels 0 and 1 are both 'shape'; list the classes in data\.class_names",
    ),
    (lambda split: {pool: [e for e in split[pool] if e[1] == 0] for pool in split}, r" has 1 class; expected two or "),
]


@pytest.mark.parametrize(("change", "words"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_split_file_is_one_line_that_names_file_and_entry(
    tmp_path: Path, change: Callable[[Split], Any], words: str
) -> None:
    root = tmp_path / "toy"
    write_split(root, change(write_coop(root)))
    draw_image("circle", 1).save(tmp_path / "outside.jpg")
    with pytest.raises(DataError) as caught:
        run_coop(root)
    assert re.match(rf"{root}/split_zhou_ToyShapes\.json{words}", str(caught.value))
    assert "\n" not in str(caught.value)
    str(caught.value).encode()  # can be printed


def test_no_split_file_or_two_are_one_line(tmp_path: Path) -> None:
    root = tmp_path / "toy"
    write_coop(root)
    shutil.copy(root / "split_zhou_ToyShapes.json", root / "split_zhou_Other.json")
    with pytest.raises(DataError, match=r"toy: split_zhou_Other\.json, split_zhou_ToyShapes\.json are there; expected"):
        run_coop(root)
    for path in root.glob("*.json"):
        path.unlink()
    with pytest.raises(DataError, match=r"toy: there is none; expected one file split_zhou_\*\.json that lists train"):
        run_coop(root)
    with pytest.raises(DataError, match=r"expected a folder of images"):
        run_coop(tmp_path / "nowhere")


def test_a_class_list_of_another_length_is_an_error(tmp_path: Path) -> None:
    split = write_coop(tmp_path / "toy", "jpg")
    with pytest.raises(DataError, match=r"ToyShapes\.json has 3 classes; 2 class names are given for coop"):
        run_coop(tmp_path / "toy", class_names=["ring", "box"])
    with pytest.raises(ConfigError, match=r"data\.class_names has 2 names; toy_shapes has 3 classes"):
        run_coop(tmp_path / "toy", "test_coop:TOY_SHAPES", class_names=["ring", "box"])
    write_split(tmp_path / "toy", {pool: [entry for entry in split[pool] if entry[1] != 2] for pool in split})
    with pytest.raises(DataError, match=r"has 2 classes; 3 class names are given for test_coop:TOY_SHAPES"):
        run_coop(tmp_path / "toy", "test_coop:TOY_SHAPES")


def test_a_class_list_names_labels_that_the_file_names_alike_or_not_at_all(tmp_path: Path) -> None:
    split = write_coop(tmp_path / "toy", "jpg")
    write_split(tmp_path / "toy", {p: [[path, label, "shape"] for path, label, _ in split[p]] for p in split})
    assert run_coop(tmp_path / "toy", "test_coop:TOY_SHAPES").class_names == list(TOY_SHAPES.class_names)
    assert run_coop(tmp_path / "toy", class_names=["ring", "box", "lines"]).class_names == ["ring", "box", "lines"]


def test_prepare_without_fetch_points_to_it(tmp_path: Path) -> None:
    write_coop(tmp_path / "toy")
    run_coop(tmp_path / "toy")
    (tmp_path / "raw" / "classes.json").unlink()
    settings = from_dict({"data": {"name": "coop", "source": str(tmp_path / "toy")}})
    with pytest.raises(DataError, match=r"classes\.json: cannot be read .*run the fetch stage"):
        prepare(settings, beside(tmp_path))
