"""Layout `folder`: a user's own images, named by folders or by CSV files; what is wrong with them is one line."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import webdataset
from conftest import CLASSES, draw_image, write_folder
from prepared import (
    rejected,
    rows,
    run,
    sources,
    write_csv,
)

from dho.core.errors import DataError

# Lists in CSV files


def listed(root: Path) -> list[str]:
    """Rows path,label for all of a folder's images but those of `unlabelled`, whose label is empty."""
    paths = sorted(path.relative_to(root) for path in root.rglob("*.*") if path.suffix in (".jpg", ".png"))
    return [f"{path},{'' if path.parts[0] == 'unlabelled' else path.parts[0]}" for path in paths]


def test_a_csv_of_labels_gives_the_same_splits_as_folders(tmp_path: Path) -> None:
    root = tmp_path / "images"
    write_folder(root, each=6, unlabelled=4)
    by_folder = rows(run(root))
    assert rows(run(root, labels=write_csv(root / "labels.csv", "path,label", listed(root)))) == by_folder
    extra = write_csv(root / "labels.csv", "shot by,path , label", [f"me,{line}" for line in listed(root)])
    assert rows(run(root, labels=extra)) == by_folder


def test_a_csv_from_windows_is_read(tmp_path: Path) -> None:
    root = tmp_path / "images"
    write_folder(root, each=6, unlabelled=4)
    by_folder = rows(run(root))
    lines = ["path,label", *(line.replace("/", "\\") for line in listed(root))]
    (root / "labels.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, "", ""]).encode())
    assert rows(run(root, labels="labels.csv")) == by_folder


def test_val_test_and_captions_lists_make_their_splits(tmp_path: Path) -> None:
    root = tmp_path / "images"
    write_folder(root, each=8, unlabelled=6)
    lists = {
        "val": write_csv(root / "val.csv", "path,label", [f"./{name}/000.jpg,{name}" for name in CLASSES]),
        "test": write_csv(
            root / "test.csv", "path,label", [f"{name}/001.jpg,{name}" for name in CLASSES] + ["circle/002.jpg,circle"]
        ),
        "captions": write_csv(
            root / "captions.csv", "path,caption", ['unlabelled/000.png,"a mug, blue"', "unlabelled/001.png,ein Bär"]
        ),
    }
    index = run(root, **lists)
    assert sources(index, "val") == [f"{name}/000.jpg" for name in CLASSES]
    assert sorted(sources(index, "test")) == ["circle/001.jpg", "circle/002.jpg", "square/001.jpg", "stripes/001.jpg"]
    captions = [row for row in rows(index) if row["split"] == "captions"]
    assert [(row["source"], row["caption"], row["label"]) for row in captions] == [
        ("unlabelled/000.png", "a mug, blue", None),
        ("unlabelled/001.png", "ein Bär", None),
    ]
    assert [index.captions[row] for row in index.rows("captions")] == ["a mug, blue", "ein Bär"]
    (sample, *_) = webdataset.WebDataset(str(index.folder / "captions-00000.tar"), shardshuffle=False).decode()
    assert sample["txt"] == "a mug, blue"
    taken = {source for split in ("val", "test", "captions") for source in sources(index, split)}
    assert not taken & {*sources(index, "labelled"), *sources(index, "unlabelled")}


@pytest.mark.parametrize(
    ("setting", "content", "words"),
    [
        ("labels", "path;label\na;b\n", r"row 1: no column path, label; expected path,label"),
        ("labels", "", r"row 1: no column path, label"),
        ("labels", "path,label\ncircle/000.jpg,circle\ncircle/9.jpg,circle\n", r"row 3: no file .*circle/9\.jpg"),
        ("labels", "path,label\n\n\ncircle/9.jpg,circle\n", r"row 4: no file .*circle/9\.jpg"),
        ("labels", "path,label\n,circle\n", r"row 2: the path is empty"),
        (
            "labels",
            "path,label\ncircle/000.jpg,circle\n./circle/000.jpg,square\n",
            r"row 3: circle/000\.jpg is already in row 2",
        ),
        (
            "labels",
            'path,label\n"circle/000.jpg,circle\n' + "circle/001.jpg,circle\n" * 30,
            r"row 3\d: unexpected end of data",
        ),
        ("labels", f"path,label\n{'x' * 300},circle\n", r"row 2: no file"),
        ("val", "path,label\ncircle/000.jpg,\n", r"row 2: circle/000\.jpg has no label"),
        ("test", "path,label\ncircle/000.jpg\n", r"row 2: circle/000\.jpg has no label"),
        (
            "captions",
            "path,caption\ncircle/000.jpg,a mug, blue\n",
            r'row 2: more fields than columns; put text with a comma in "quotes"',
        ),
        ("captions", "path,caption\ncircle/000.jpg,\n", r"row 2: circle/000\.jpg has no caption"),
        ("captions", "path,label\ncircle/000.jpg,circle\n", r"row 1: no column caption; expected path,caption"),
    ],
)
def test_an_error_in_a_csv_names_file_and_row(tmp_path: Path, setting: str, content: str, words: str) -> None:
    write_folder(tmp_path / "images", each=2, unlabelled=1)
    (tmp_path / "images" / "list.csv").write_text(content)
    with pytest.raises(DataError, match=rf"images/list\.csv, {words}") as caught:
        run(tmp_path / "images", **{setting: "list.csv"})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "path,label\ncircle/000.jpg,Größe\n".encode("cp1252")])
def test_a_csv_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    write_folder(tmp_path / "images", each=2, unlabelled=1)
    if content is not None:
        (tmp_path / "images" / "list.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"images/list\.csv: cannot be read"):
        run(tmp_path / "images", labels="list.csv")


# Class names and folders


def test_class_names_come_from_the_folders_sorted_or_from_the_parameters_in_their_order(tmp_path: Path) -> None:
    root = tmp_path / "images"
    write_folder(root, each=6, unlabelled=1)
    (root / "circle").rename(root / "round things")
    (root / "square").rename(root / "Größe")
    index = run(root)
    assert index.class_names == ["Größe", "round things", "stripes"]
    index = run(root, class_names=["stripes", "round things", "Größe"])
    assert index.class_names == ["stripes", "round things", "Größe"]
    for row in rows(index):
        if row["label"] is not None:
            assert row["source"].startswith(index.class_names[row["label"]] + "/")


def test_a_label_that_is_no_class_name_is_told_with_the_image(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", each=6, unlabelled=1)
    with pytest.raises(
        DataError, match=r"stripes/000\.jpg: label 'stripes' is not among the class names circle, square"
    ):
        run(tmp_path / "images", class_names=["circle", "square"])


def test_hidden_files_and_what_systems_leave_behind_are_passed_over(tmp_path: Path) -> None:
    root = tmp_path / "images"
    write_folder(root, each=6, unlabelled=2)
    (root / ".git").mkdir()
    (root / "__MACOSX" / "circle").mkdir(parents=True)
    (root / "circle" / ".ipynb_checkpoints").mkdir()
    for name in (
        ".DS_Store",
        "circle/.DS_Store",
        "circle/._000.jpg",
        "__MACOSX/circle/._000.jpg",
        "circle/Thumbs.db",
        "circle/notes.txt",
    ):
        (root / name).write_bytes(b"not an image")
    shutil.copy(root / "circle" / "000.jpg", root / "circle" / ".ipynb_checkpoints" / "000-checkpoint.jpg")
    index = run(root)
    assert index.class_names == list(CLASSES)
    assert len(index) == 20 and rejected(index) == {}


def test_folders_below_a_class_and_links_to_folders_and_files_are_followed(tmp_path: Path) -> None:
    root = tmp_path / "images"
    write_folder(root, each=6, unlabelled=2)
    (root / "circle").rename(tmp_path / "circles")
    (root / "circle").symlink_to(tmp_path / "circles")
    (root / "square" / "below").mkdir()
    (root / "square" / "000.jpg").rename(root / "square" / "below" / "000.jpg")
    (root / "stripes" / "000.jpg").rename(tmp_path / "elsewhere.jpg")
    (root / "stripes" / "000.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    (tmp_path / "more").mkdir()
    draw_image("stripes", 50).save(tmp_path / "more" / "050.jpg")
    (root / "stripes" / "linked").symlink_to(tmp_path / "more")
    index = run(root)
    assert Counter(Path(row["source"]).parts[0] for row in rows(index)) == {
        "circle": 6,
        "square": 6,
        "stripes": 7,
        "unlabelled": 2,
    }


def test_an_empty_class_folder_is_not_lost_in_silence(tmp_path: Path) -> None:
    root = tmp_path / "images"
    write_folder(root, each=6, unlabelled=2)
    (root / "triangle").mkdir()
    (root / "triangle" / "photo.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"triangle holds no image .*data\.class_names"):
        run(root)
    assert run(root, class_names=list(CLASSES)).class_names == list(CLASSES)


def test_the_other_spelling_of_unlabelled_does_not_become_a_class(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", each=6, unlabelled=2)
    (tmp_path / "images" / "unlabelled").rename(tmp_path / "images" / "Unlabeled")
    with pytest.raises(DataError, match=r"Unlabeled would be a class of its own; call .*'unlabelled'"):
        run(tmp_path / "images")


def test_a_name_that_is_not_utf8_is_told(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", each=6, unlabelled=2)
    (tmp_path / "images" / "circle" / os.fsdecode(b"gr\xf6\xdfe.jpg")).write_bytes(b"x")
    with pytest.raises(DataError, match=r"the name is not UTF-8; rename it") as caught:
        run(tmp_path / "images")
    str(caught.value).encode()  # can be printed


def test_one_class_is_too_few(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", each=6, unlabelled=2)
    for name in ("square", "stripes"):
        shutil.rmtree(tmp_path / "images" / name)
    with pytest.raises(DataError, match=r"found 1 classes; expected one sub-folder per class"):
        run(tmp_path / "images")
