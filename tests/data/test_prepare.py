"""Stage `prepare`: every image checked and stored as it came; an interrupted stage leaves nothing half-written."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CLASSES, draw_image, write_folder
from PIL import Image
from prepared import (
    SPLITS,
    bad_files,
    beside,
    card,
    config,
    encode,
    good_files,
    png_bomb,
    prepare_mixed,
    rejected,
    rows,
    run,
)

from dho.config import ViewsConfig
from dho.core.errors import DataError
from dho.data.fetch import fetch
from dho.data.index import Index
from dho.data.pixels import Pixels
from dho.data.prepare import prepare
from dho.runtime.dho_runtime import ImageRejected, decode


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return prepare_mixed(tmp_path_factory.mktemp("mixed"))


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
