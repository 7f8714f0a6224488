"""Folders of images of all kinds, and what stages fetch and prepare make of them; shared by the tests of this room."""

from __future__ import annotations

import csv
import io
import json
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from conftest import draw_image, write_folder
from PIL import Image

from dho.config import Config, from_dict
from dho.core.workspace import Workspace
from dho.data.fetch import fetch
from dho.data.index import Index
from dho.data.prepare import prepare

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


def prepare_mixed(folder: Path) -> Index:
    """Prepare images of all kinds, some broken, in several shards."""
    root = folder / "images"
    write_folder(root, each=6, unlabelled=4)
    for name, content in good_files().items():
        (root / "unlabelled" / name).write_bytes(content)
    for name, (content, _) in bad_files().items():
        (root / "unlabelled" / name).write_bytes(content)
    (root / "unlabelled" / "link to nowhere.jpg").symlink_to(root / "gone.jpg")
    return run(root, max_rejected=0.5, shard_images=5)
