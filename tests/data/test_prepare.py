"""Stage `prepare`: every image checked, stored as it came, found again by its offset, in one split only, its label hidden."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from conftest import CLASSES, Tiny, draw_image, write_folder
from PIL import Image

from dho.config import Config, DataConfig, ViewsConfig, from_dict
from dho.core.errors import DataError
from dho.core.workspace import Workspace
from dho.data.fetch import fetch
from dho.data.index import Index
from dho.data.pixels import Pixels
from dho.data.prepare import prepare
from dho.data.sources import FashionMnist
from dho.runtime.dho_runtime import ImageRejected, decode

SPLITS = {"shots": 2, "val_per_class": 1, "test_per_class": 1}


def config(source: Path, splits: dict[str, Any] | None = None, **data: Any) -> Config:
    return from_dict({"data": {"name": "folder", "source": str(source), "splits": SPLITS | (splits or {}), **data}})


def beside(folder: Path) -> Workspace:
    """A workspace whose raw files and prepared data set lie directly in a folder."""
    return Workspace(folder, raw=folder / "raw", prepared=folder / "prepared")


def run(source: Path, splits: dict[str, Any] | None = None, **data: Any) -> Index:
    """Stages fetch and prepare over a user's folder; the output is beside it."""
    settings, workspace = config(source, splits, **data), beside(source.parent)
    fetch(settings, workspace)
    return prepare(settings, workspace)


def rows(index: Index) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(index.folder / "index.parquet").to_pylist()
    return found


def sources(index: Index, split: str) -> list[str]:
    return [row["source"] for row in rows(index) if row["split"] == split]


def card(index: Index) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((index.folder / "dataset.json").read_text())
    return found


def rejected(index: Index) -> dict[str, str]:
    with (index.folder / "rejected.csv").open(newline="", encoding="utf-8") as file:
        return {row["source"]: row["reason"] for row in csv.DictReader(file)}


def write_csv(path: Path, header: str, lines: Iterable[str]) -> str:
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path.name


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that claims, and would unpack to, width x height pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


ROTATED = Image.Exif()
ROTATED[0x0112] = 6  # a quarter turn


def good_files() -> dict[str, bytes]:
    """A file of every format and mode that is converted, under the name it gets."""
    picture = draw_image("circle", 1, (50, 40))
    grey16 = Image.fromarray(np.linspace(0, 65535, 2000).astype(np.uint16).reshape(40, 50))
    clear = picture.convert("RGBA")
    clear.putalpha(Image.new("L", clear.size, 0))
    palette = picture.quantize(16)
    return {
        "rgb.jpg": encode(picture, "JPEG"),
        "UPPER.JPG": encode(draw_image("circle", 2), "JPEG"),
        "cmyk.jpeg": encode(picture.convert("CMYK"), "JPEG"),
        "grey.jpg": encode(picture.convert("L"), "JPEG"),
        "turned.jpg": encode(picture, "JPEG", exif=ROTATED),
        "turned.png": encode(picture, "PNG", exif=ROTATED),
        "turned.webp": encode(picture, "WEBP", exif=ROTATED),
        "palette.png": encode(palette, "PNG"),
        "palette, clear.png": encode(palette, "PNG", transparency=palette.getpixel((0, 0))),
        "grey-alpha.png": encode(clear.convert("LA"), "PNG"),
        "grey16.png": encode(grey16, "PNG"),
        "clear.png": encode(clear, "PNG"),
        "one-bit.png": encode(picture.convert("1"), "PNG"),
        "größe 日本.png": encode(draw_image("circle", 3, (300, 20)), "PNG"),
        "photo.webp": encode(picture, "WEBP"),
        "moving.gif": encode(
            palette, "GIF", save_all=True, append_images=[draw_image("square", 1, (50, 40)).quantize(16)]
        ),
        "pixels.bmp": encode(picture, "BMP"),
        "scan.tif": encode(picture.convert("CMYK"), "TIFF"),
        "dot.png": encode(Image.new("RGB", (1, 1), "red"), "PNG"),
        "png, in truth.jpg": encode(draw_image("circle", 4), "PNG"),
    }


def bad_files() -> dict[str, tuple[bytes, str]]:
    """Files that cannot be used, and a word of the reason."""
    picture = draw_image("square", 1, (200, 200))
    jpeg, png = encode(picture, "JPEG"), encode(picture, "PNG")
    return {
        "empty.jpg": (b"", "empty file"),
        "text.jpg": (b"this is no image", "not an image"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "cut.png": (png[: len(png) // 2], "truncated"),
        "cut.webp": (encode(picture, "WEBP")[:200], "broken"),
        "header.png": (png[:20], "broken header"),
        "bomb.png": (png_bomb(12_000, 12_000), "too many pixels: 12000 x 12000"),
        "larger bomb.png": (png_bomb(60_000, 60_000), "too many pixels"),
        "floats.tif": (encode(Image.fromarray(np.zeros((9, 9), np.float32)), "TIFF"), "mode F"),
        "vector.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    }


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """A prepared folder of images of all kinds, some broken, in several shards."""
    root = tmp_path_factory.mktemp("mixed") / "images"
    write_folder(root, each=6, unlabelled=4)
    for name, content in good_files().items():
        (root / "unlabelled" / name).write_bytes(content)
    for name, (content, _) in bad_files().items():
        (root / "unlabelled" / name).write_bytes(content)
    (root / "unlabelled" / "link to nowhere.jpg").symlink_to(root / "gone.jpg")
    return run(root, max_rejected=0.5, shard_images=5)


# What may come in


def test_images_of_all_kinds_are_stored_byte_for_byte_and_read_by_offset(mixed: Index) -> None:
    root = mixed.folder.parent / "images"
    found = rows(mixed)
    assert {Path(row["source"]).name for row in found if row["split"] == "unlabelled"} >= set(good_files())
    for number, row in enumerate(found):
        data = (root / row["source"]).read_bytes()
        assert mixed.read(number) == data
        assert row["sha256"] == mixed.sha256(number) == hashlib.sha256(data).digest()
        with (mixed.folder / row["shard"]).open("rb") as shard:
            shard.seek(row["offset"])
            assert shard.read(row["size"]) == data


def test_width_and_height_are_those_of_the_upright_image(mixed: Index) -> None:
    found = {Path(row["source"]).name: (row["width"], row["height"]) for row in rows(mixed)}
    assert found["rgb.jpg"] == (50, 40)
    assert found["turned.jpg"] == found["turned.png"] == found["turned.webp"] == (40, 50)
    assert found["größe 日本.png"] == (300, 20)
    assert found["dot.png"] == (1, 1)
    for number in range(len(mixed)):
        image = decode(mixed.read(number))
        assert (image.width, image.height) == found[Path(rows(mixed)[number]["source"]).name]


def test_unusable_files_are_listed_with_the_reason_and_skipped(mixed: Index) -> None:
    listed = rejected(mixed)
    expected = {name: reason for name, (_, reason) in bad_files().items()} | {
        "link to nowhere.jpg": "cannot be read: No such file"
    }
    assert set(listed) == {f"unlabelled/{name}" for name in expected}
    for name, reason in expected.items():
        assert reason in listed[f"unlabelled/{name}"], name
    assert card(mixed)["rejected"] == len(expected)


def test_every_kind_can_be_rendered_at_the_students_size(mixed: Index) -> None:
    batch = Pixels(mixed, ViewsConfig(), 16, "bilinear").batch(range(len(mixed)), view=1)
    assert batch.shape == (len(mixed), 16, 16, 3)


def test_modes_are_converted_to_the_colours_a_person_sees() -> None:
    files = good_files()
    picture = np.asarray(draw_image("circle", 1, (50, 40))).astype(int)

    def difference(name: str, to: np.ndarray[Any, Any]) -> float:
        return float(np.abs(np.asarray(decode(files[name])).astype(int) - to).mean())

    assert difference("pixels.bmp", picture) == 0
    assert difference("cmyk.jpeg", picture) < 25  # JPEG of noise
    assert difference("scan.tif", picture) < 1
    assert difference("turned.png", np.rot90(picture, -1)) == 0
    assert difference("clear.png", np.full_like(picture, 255)) == 0  # transparent is white
    assert difference("grey-alpha.png", np.full_like(picture, 255)) == 0
    ramp = np.repeat(np.linspace(0, 255, 2000).reshape(40, 50, 1), 3, axis=2)
    assert difference("grey16.png", ramp) < 1
    palette = draw_image("circle", 1, (50, 40)).quantize(16)
    assert difference("palette.png", np.asarray(palette.convert("RGB")).astype(int)) == 0
    assert difference("moving.gif", np.asarray(palette.convert("RGB")).astype(int)) == 0  # the first frame
    hole = np.asarray(palette) == palette.getpixel((0, 0))
    clear = np.asarray(decode(files["palette, clear.png"]))
    assert (clear[hole] == 255).all() and (clear[~hole] == np.asarray(palette.convert("RGB"))[~hole]).all()


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    began = time.perf_counter()
    with pytest.raises(ImageRejected, match="too many pixels"):
        decode(png_bomb(12_000, 12_000))
    assert time.perf_counter() - began < 0.5


def test_an_image_that_max_pixels_allows_can_also_be_trained_on(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", each=5, unlabelled=0)
    large = Image.new("1", (8000, 6500))  # 52 million pixels: more than the runtime's own limit
    large.save(tmp_path / "images" / "circle" / "large.png")
    assert "circle/large.png" in rejected(run(tmp_path / "images", max_rejected=0.1))
    index = run(tmp_path / "images", {"shots": 1, "val_per_class": 1}, max_pixels=60_000_000)
    assert (
        Pixels(index, ViewsConfig(), 8, "bilinear")
        .batch(np.flatnonzero([row["width"] == 8000 for row in rows(index)]), None)
        .shape[0]
        == 1
    )


def test_more_rejected_than_allowed_is_an_error_that_names_the_first(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", each=6, unlabelled=1)
    (tmp_path / "images" / "circle" / "broken.jpg").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"1 of 20 files \(5\.0%\).*data\.max_rejected 4\.0%.*circle/broken\.jpg: empty file"
    ):
        run(tmp_path / "images", max_rejected=0.04)
    assert not (tmp_path / "prepared").exists()
    assert len(rejected(run(tmp_path / "images", max_rejected=0.05))) == 1


def test_a_data_set_of_nothing_but_broken_files_is_an_error(tmp_path: Path) -> None:
    for name in CLASSES:
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "broken.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"3 of 3 files"):
        run(tmp_path / "images")
    with pytest.raises(DataError, match=r"class 'circle' has 0 labelled images left for test"):
        run(tmp_path / "images", max_rejected=1.0)


def test_many_files_are_checked_by_several_processes_with_the_same_result(tmp_path: Path) -> None:
    root = tmp_path / "images"
    generator = np.random.default_rng(0)
    for number in range(560):
        folder = root / ("unlabelled" if number > 20 else CLASSES[number % 3])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (6, 5, 3), dtype=np.uint8)).save(folder / f"{number:04d}.png")
    for number in (30, 300, 559):
        (root / "unlabelled" / f"{number:04d}.png").write_bytes(b"broken")
    index = run(root)
    assert list(rejected(index)) == [f"unlabelled/{number:04d}.png" for number in (30, 300, 559)]
    assert len(index) == 557
    for number, row in enumerate(rows(index)):
        assert index.read(number) == (root / row["source"]).read_bytes()


# How it is stored


def test_shards_are_read_by_the_webdataset_package_with_labels(mixed: Index) -> None:
    found = rows(mixed)
    for split in ("labelled", "unlabelled", "val", "test"):
        expected = [row for row in found if row["split"] == split]
        names = sorted({row["shard"] for row in expected})
        shards = [str(mixed.folder / name) for name in names]
        samples = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
        assert [sample["__key__"] for sample in samples] == [row["key"] for row in expected]
        for sample, row in zip(samples, expected, strict=True):
            (extension,) = set(sample) & {"jpg", "png", "webp", "gif", "bmp", "tif"}
            assert hashlib.sha256(sample[extension]).digest() == row["sha256"]
            assert sample.get("cls") == (None if row["label"] is None else str(row["label"]).encode())
    decoded = next(
        iter(
            webdataset.WebDataset(str(mixed.folder / "labelled-00000.tar"), shardshuffle=False)
            .decode("rgb8")
            .to_tuple("jpg", "cls")
        )
    )
    assert decoded[0].shape == (36, 40, 3) and decoded[1] == found[0]["label"]


def test_a_shard_holds_as_many_images_as_asked_and_one_split(mixed: Index) -> None:
    sizes = Counter(row["shard"] for row in rows(mixed))
    assert len([name for name in sizes if name.startswith("unlabelled")]) > 3
    for name, size in sizes.items():
        split, number = name.removesuffix(".tar").split("-")
        assert {row["split"] for row in rows(mixed) if row["shard"] == name} == {split}
        assert size <= 5
        assert size == 5 or f"{split}-{int(number) + 1:05d}.tar" not in sizes


def test_a_file_is_named_by_what_it_is_and_not_by_its_suffix(mixed: Index) -> None:
    (row,) = [row for row in rows(mixed) if row["source"].endswith("png, in truth.jpg")]
    (sample,) = [
        sample
        for sample in webdataset.WebDataset(str(mixed.folder / row["shard"]), shardshuffle=False)
        if sample["__key__"] == row["key"]
    ]
    assert "png" in sample and "jpg" not in sample


def test_the_same_images_give_the_same_bytes(mixed: Index, tmp_path: Path) -> None:
    shutil.copytree(mixed.folder.parent / "images", tmp_path / "images", symlinks=True)
    again = run(tmp_path / "images", max_rejected=0.5, shard_images=5)
    assert again.fingerprint == mixed.fingerprint
    for path in mixed.folder.iterdir():
        assert (again.folder / path.name).read_bytes() == path.read_bytes()


def test_a_missing_or_short_shard_is_named(mixed: Index, tmp_path: Path) -> None:
    shutil.copytree(mixed.folder, tmp_path / "prepared")
    (tmp_path / "prepared" / "val-00000.tar").unlink()
    os.truncate(tmp_path / "prepared" / "test-00000.tar", 600)
    index = Index.load(tmp_path / "prepared")
    with pytest.raises(DataError, match=r"val-00000\.tar: No such file.*run the prepare stage"):
        index.read(index.rows("val")[0])
    with pytest.raises(DataError, match=r"test-00000\.tar is too short"):
        index.read(index.rows("test")[-1])


def test_a_folder_without_a_prepared_data_set_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no prepared data set here .*run the prepare stage"):
        Index.load(tmp_path)


def test_fashion_mnists_arrays_become_lossless_png(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    arrays = {
        "train": generator.integers(0, 256, (60, 28, 28), dtype=np.uint8),
        "t10k": generator.integers(0, 256, (20, 28, 28), dtype=np.uint8),
    }
    for part, images in arrays.items():
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(bytes(16) + images.tobytes())
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(
            bytes(8) + bytes(number % 10 for number in range(len(images)))
        )
    splits = {"shots": 1, "val_per_class": 1, "captions": 20, "unlabelled": 15}
    index = prepare(from_dict({"data": {"splits": splits}}), beside(tmp_path).at(raw=tmp_path))
    assert card(index)["images"] == {"labelled": 10, "unlabelled": 15, "val": 10, "test": 20, "captions": 20}
    assert card(index)["left_out"] == 5
    for number, row in enumerate(rows(index)):
        part, place = row["source"].split("/")
        assert (part == "t10k") == (row["split"] == "test")
        assert (np.asarray(Image.open(io.BytesIO(index.read(number)))) == arrays[part][int(place)]).all()
        assert row["label"] == (None if row["split"] == "unlabelled" else int(place) % 10)


def test_raw_files_that_are_not_there_point_to_the_fetch_stage(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run the fetch stage"):
        FashionMnist(DataConfig(), tmp_path)
    write_folder(tmp_path / "images", each=6, unlabelled=1)
    with pytest.raises(DataError, match=r"listing\.csv: cannot be read"):
        prepare(config(tmp_path / "images"), beside(tmp_path))


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
    with pytest.raises(DataError, match=r"found 1 classes; expected one sub-folder a class"):
        run(tmp_path / "images")


# Interrupted

PREPARE = """
import sys
from dho.config import load
from dho.core.workspace import Workspace
from dho.data.prepare import prepare
prepare(load(sys.argv[1]), Workspace(raw=sys.argv[2], prepared=sys.argv[3]))
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_failed_prepare_leaves_the_old_output_untouched(tmp_path: Path) -> None:
    root = tmp_path / "images"
    write_folder(root, each=6, unlabelled=2)
    before = contents(run(root).folder)
    with pytest.raises(DataError):
        run(root, {"shots": 50})
    (root / "circle" / "broken.jpg").write_bytes(b"")
    with pytest.raises(DataError):
        run(root)
    assert contents(tmp_path / "prepared") == before


def test_a_file_that_changes_or_vanishes_in_between_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dho.data import prepare as module

    root = tmp_path / "images"
    write_folder(root, each=6, unlabelled=2)
    before = contents(run(root).folder)
    check = module._inspect_all

    def check_then(action: Any) -> Any:
        def checked(*arguments: Any) -> Any:
            found = check(*arguments)
            action()
            return found

        return checked

    for action in (
        lambda: (root / "unlabelled" / "000.png").write_bytes(b"other"),
        (root / "unlabelled" / "000.png").unlink,
    ):
        monkeypatch.setattr(module, "_inspect_all", check_then(action))
        with pytest.raises(
            DataError, match=r"unlabelled/000\.png changed while it was being prepared; run the stage again"
        ):
            run(root)
        draw_image("circle", 10_000).save(root / "unlabelled" / "000.png")
    assert contents(tmp_path / "prepared") == before


def test_a_killed_prepare_leaves_the_old_output_untouched_and_the_next_one_is_whole(tmp_path: Path) -> None:
    root = tmp_path / "images"
    write_folder(root, each=6, unlabelled=2)
    before = contents(run(root).folder)
    generator = np.random.default_rng(0)
    for number in range(3000):
        (root / "unlabelled" / f"more{number}.bmp").write_bytes(
            encode(Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)), "BMP")
        )
    settings = config(root)
    fetch(settings, beside(tmp_path))
    (tmp_path / "params.yaml").write_text(
        json.dumps({"data": {"name": "folder", "source": str(root), "splits": SPLITS}})
    )
    arguments = [str(tmp_path / name) for name in ("params.yaml", "raw", "prepared")]
    process = subprocess.Popen(
        [sys.executable, "-c", PREPARE, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    unfinished = tmp_path / ".prepared.unfinished" / "unlabelled-00000.tar"
    deadline = time.monotonic() + 60
    while (
        not (unfinished.exists() and unfinished.stat().st_size > 0)
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert contents(tmp_path / "prepared") == before
    index = prepare(settings, beside(tmp_path))
    assert len(index) == 3020
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "params.yaml", "prepared", "raw"]
