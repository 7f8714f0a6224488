"""What `prepare` writes: shards that others can read, an index that finds every image by its offset."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from conftest import write_folder
from PIL import Image
from prepared import (
    beside,
    card,
    config,
    prepare_mixed,
    rows,
    run,
)

from dho.config import DataConfig, from_dict
from dho.core.errors import DataError
from dho.data.index import Index
from dho.data.prepare import prepare
from dho.data.readers import LocalReader
from dho.data.sources.arrays import Arrays


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return prepare_mixed(tmp_path_factory.mktemp("mixed"))


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


def test_bytes_come_from_the_reader_by_shard_offset_and_size(mixed: Index) -> None:
    asked: list[tuple[str, int, int]] = []

    class Elsewhere:
        def read(self, shard: str, offset: int, size: int) -> bytes:
            asked.append((shard, offset, size))
            return b"bytes"

    table = pq.read_table(mixed.folder / "index.parquet")
    index = Index(Path("nowhere"), table, json.loads((mixed.folder / "dataset.json").read_text()), Elsewhere())
    assert [index.read(row) for row in range(len(index))] == [b"bytes"] * len(index)
    assert asked == [(row["shard"], row["offset"], row["size"]) for row in rows(mixed)]
    reader = LocalReader(mixed.folder)
    for number, place in enumerate(asked):
        assert reader.read(*place) == mixed.read(number)


def test_a_reader_that_goes_to_another_process_opens_files_of_its_own(mixed: Index) -> None:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    expected = mixed.read(0)
    sent = pickle.dumps(mixed)
    descriptors = open_files()
    copy = pickle.loads(sent)  # noqa: S301 (made here)
    assert open_files() == descriptors
    assert copy.read(0) == expected
    assert open_files() == descriptors + 1


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
        Arrays(DataConfig(), tmp_path)
    write_folder(tmp_path / "images", each=6, unlabelled=1)
    with pytest.raises(DataError, match=r"listing\.csv: cannot be read"):
        prepare(config(tmp_path / "images"), beside(tmp_path))
