"""Stage `prepare`: check every image, draw the splits, write tar shards in WebDataset's layout and one index.

    dho prepare

Images are stored as they came. Files that cannot be used are listed in `rejected.csv` with the reason; more of them
than `data.max_rejected` stop the stage. The output folder is complete or absent: it is written under another name and
renamed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dho.config import Config, DataConfig
from dho.core.errors import DataError
from dho.core.files import sync
from dho.core.progress import progress
from dho.core.workspace import Workspace
from dho.data.dataset import data_set
from dho.data.index import DATASET, INDEX, SCHEMA, Index, fingerprint
from dho.data.sources import Source, open_source
from dho.data.splits import SPLITS, Draw, draw
from dho.runtime.dho_runtime import ImageRejected, decode

REJECTED = "rejected.csv"


@dataclass(frozen=True)
class Inspection:
    """What one look at an image file found."""

    sha256: str
    width: int
    height: int
    extension: str
    reason: str | None
    """Why it cannot be used; None when it can."""


def prepare(config: Config, workspace: Workspace) -> Index:
    """Write the prepared data set of `workspace.raw` to `workspace.prepared` and return it.

    Raises:
        DataError: too many unusable files, a split cannot be drawn, or two splits share an image.
    """
    data, out = config.data, workspace.prepared
    source = open_source(data, workspace.raw)
    inspections = _inspect_all(source, data.max_pixels)
    rejected = {number: inspection for number, inspection in enumerate(inspections) if inspection.reason is not None}
    _refuse_too_many(source, rejected, data.max_rejected)
    usable = {number: inspection.sha256 for number, inspection in enumerate(inspections) if inspection.reason is None}
    result = draw(source.records, usable, source.class_names, data.splits, data.on_leak)

    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    rows = list(_write_shards(source, inspections, result, unfinished, data.shard_images))
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    pq.write_table(table, unfinished / INDEX)
    _write_rejected(source, rejected, unfinished / REJECTED)
    dataset = _dataset(data, source, table, result, len(rejected))
    (unfinished / DATASET).write_text(json.dumps(dataset, indent=2) + "\n")
    for path in unfinished.iterdir():
        sync(path)

    # Two renames, so that the folder under `out` is always a whole one.
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.replace(old)
    unfinished.replace(out)
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)

    counts = ", ".join(f"{count} {name}" for name, count in dataset["images"].items())
    print(f"prepare: {counts}; {len(rejected)} rejected, {len(result.dropped)} dropped")
    return Index.load(out)


def _inspect_all(source: Source, max_pixels: int) -> list[Inspection]:
    numbers = range(len(source.records))
    chunks = [numbers[i : i + 256] for i in range(0, len(numbers), 256)]
    workers = min(os.cpu_count() or 1, len(chunks))
    if workers <= 1:
        _share(source, max_pixels)
        return [
            inspection for chunk in progress(chunks, "prepare: checking", unit=256) for inspection in _inspect(chunk)
        ]
    with ProcessPoolExecutor(workers, initializer=_share, initargs=(source, max_pixels)) as pool:
        return [
            inspection
            for inspections in progress(pool.map(_inspect, chunks), "prepare: checking", len(chunks), unit=256)
            for inspection in inspections
        ]


# What every worker process of the check needs; sent once and not with each chunk.
_shared: dict[str, Any] = {}


def _share(source: Source, max_pixels: int) -> None:
    _shared.update(source=source, max_pixels=max_pixels)


def _inspect(numbers: range) -> list[Inspection]:
    return [inspect(_shared["source"], number, _shared["max_pixels"]) for number in numbers]


def inspect(source: Source, number: int, max_pixels: int) -> Inspection:
    """Read and decode one file."""
    try:
        data = source.read(number)
    except OSError as error:
        return Inspection("", 0, 0, "", f"cannot be read: {error.strerror}")
    try:
        image = decode(data, max_pixels)
    except ImageRejected as reason:
        return Inspection("", 0, 0, "", str(reason))
    return Inspection(hashlib.sha256(data).hexdigest(), image.width, image.height, _extension(data), None)


def _extension(data: bytes) -> str:
    """Return the usual file ending of an image format, by its first bytes: WebDataset's readers go by it."""
    for start, extension in (
        (b"\x89PNG", "png"),
        (b"\xff\xd8", "jpg"),
        (b"GIF8", "gif"),
        (b"BM", "bmp"),
        (b"RIFF", "webp"),
    ):
        if data.startswith(start):
            return extension
    return "tif"


def _refuse_too_many(source: Source, rejected: dict[int, Inspection], limit: float) -> None:
    share = len(rejected) / max(1, len(source.records))
    if share > limit:
        number, inspection = next(iter(rejected.items()))
        raise DataError(
            f"{len(rejected)} of {len(source.records)} files ({share:.1%}) cannot be used, "
            f"more than data.max_rejected {limit:.1%}; the first: {source.records[number].path}: {inspection.reason}; "
            f"fix them, or raise the limit to see all in {REJECTED}"
        )


def _write_shards(
    source: Source, inspections: list[Inspection], result: Draw, folder: Path, shard_images: int
) -> Iterator[dict[str, Any]]:
    """Write the shards of every split and yield the index's rows, in the order of the splits and then of the source."""
    order = sorted(result.split, key=lambda number: (SPLITS.index(result.split[number]), number))
    place: Counter[str] = Counter()
    shard: tarfile.TarFile | None = None
    shard_name = ""
    try:
        for position, number in enumerate(progress(order, "prepare: writing shards")):
            split, record, inspection = result.split[number], source.records[number], inspections[number]
            name = f"{split}-{place[split] // shard_images:05d}.tar"
            place[split] += 1
            if shard is None or name != shard_name:
                if shard is not None:
                    shard.close()
                shard_name = name
                shard = tarfile.open(folder / name, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 (spans iterations)
            key, data = f"{position:08d}", _read_again(source, number, inspection)
            label = record.label if split != "unlabelled" else None
            offset = _add(shard, f"{key}.{inspection.extension}", data)
            if label is not None:
                _add(shard, f"{key}.cls", str(label).encode())
            if record.caption is not None:
                _add(shard, f"{key}.txt", record.caption.encode())
            yield {
                "key": key,
                "source": record.path,
                "sha256": bytes.fromhex(inspection.sha256),
                "shard": name,
                "offset": offset,
                "size": len(data),
                "width": inspection.width,
                "height": inspection.height,
                "label": label,
                "split": split,
                "caption": record.caption,
            }
    finally:
        if shard is not None:
            shard.close()


def _read_again(source: Source, number: int, inspection: Inspection) -> bytes:
    try:
        data = source.read(number)
    except OSError:
        data = b""
    if hashlib.sha256(data).hexdigest() != inspection.sha256:
        raise DataError(f"{source.records[number].path} changed while it was being prepared; run the stage again")
    return data


def _add(shard: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a file with nothing of this machine in its header; returns the offset of its content, bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    start = shard.offset
    shard.addfile(member, io.BytesIO(data))
    return start + tarfile.BLOCKSIZE


def _write_rejected(source: Source, rejected: dict[int, Inspection], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["source", "reason"])
        writer.writerows([source.records[number].path, inspection.reason] for number, inspection in rejected.items())


def _dataset(config: DataConfig, source: Source, table: pa.Table, result: Draw, rejected: int) -> dict[str, Any]:
    counts = Counter(table["split"].to_pylist())
    row = data_set(config)
    return {
        "name": row.name,
        "class_names": source.class_names,
        "fingerprint": fingerprint(table),
        "licence": row.licence,
        "images": {split: counts[split] for split in SPLITS if counts[split]},
        "left_out": len(source.records) - len(table) - rejected - len(result.dropped),
        "rejected": rejected,
        "dropped_leaks": len(result.dropped),
        "duplicates_within": {split: count for split, count in result.duplicates.items() if count},
    }
