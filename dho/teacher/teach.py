"""Stage `teach`: run the teacher once over every (image, view) and write the teacher store.

    dho teach                     # starts torchrun; on GPUs one process each

The unit of work is a shard: ranks take every world_size-th one, a shard appears under its name once it is whole, and an
interrupted stage continues with the missing shards. Where only prompts or class names changed, only the text weights
are made again.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dho.config import Config, digest
from dho.core.errors import StoreMismatch
from dho.core.files import replacing, sha256_file, write_atomically
from dho.core.partition import partition
from dho.core.process import Process, barrier, loading_processes
from dho.core.progress import bar
from dho.core.workspace import Workspace
from dho.data.dataset import templates
from dho.data.index import Index
from dho.data.loader import loader
from dho.data.pixels import Pixels
from dho.teacher.clip import Teacher
from dho.teacher.store import (
    FORMAT,
    META,
    PARTS,
    TEXT_WEIGHTS,
    TeacherStore,
    data_identity,
    differences,
    part_views,
    read_meta,
    shard_name,
)


def teach(config: Config, workspace: Workspace, process: Process, rebuild: bool = False) -> TeacherStore:
    """Write or complete the teacher store in `workspace.teacher` and open it.

    Args:
        config: teacher, views and prompts.
        workspace: whose `prepared` is read and whose `teacher` is written.
        process: this rank; every rank must call.
        rebuild: whether to replace a store made from something else (and say what differs) instead of refusing it.

    Returns:
        The complete store, on every rank.

    Raises:
        StoreMismatch: there is a store of other data, other views or another teacher, and `rebuild` is false.
        DataError: the teacher cannot be loaded.
    """
    out = workspace.teacher
    index = Index.load(workspace.prepared)
    # Rank 0 downloads the weights, if need be; the others then load them all at once.
    if process.is_main:
        teacher = Teacher.load(config.teacher, process.device)
    barrier()
    if not process.is_main:
        teacher = Teacher.load(config.teacher, process.device)

    meta = _meta(config, index, teacher)
    if process.is_main:
        _claim(out, meta, rebuild)
    barrier()
    _write_missing(config, index, teacher, meta, out, process)
    barrier()
    if process.is_main:
        _finish(config, index, teacher, meta, out)
    barrier()

    return TeacherStore.open(out, index, config)


def _meta(config: Config, index: Index, teacher: Teacher) -> dict[str, Any]:
    description = teacher.describe()
    parts = {}
    for name, splits in PARTS.items():
        images = len(index.rows(*splits))
        views = part_views(name, config.views) or 1
        shards = max(1, -(-images // config.teacher.shard_images))
        parts[name] = {"shape": [images, views, teacher.dim], "dtype": "float16", "shards": shards}
    return {
        "format": FORMAT,
        "teacher": description,
        **data_identity(index, config.views, description["preprocessing"]),
        "dim": teacher.dim,
        "logit_scale": teacher.logit_scale,
        "parts": parts,
        "complete": False,
    }


def _claim(out: Path, meta: dict[str, Any], rebuild: bool) -> None:
    """Make `out` a store of this identity: new, continued, or (with `rebuild` only) replaced."""
    existing = read_meta(out)
    if existing is not None:
        wrong = differences(existing, {key: value for key, value in meta.items() if key != "complete"})
        if not wrong:
            return
        if not rebuild:
            raise StoreMismatch(
                f"teacher store {out} does not match: {'; '.join(wrong)}; "
                "give --rebuild to replace it, or another folder"
            )
        print(f"teach: replacing the store in {out}: {'; '.join(wrong)}")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / META, json.dumps(meta, indent=2) + "\n")


def _write_missing(
    config: Config, index: Index, teacher: Teacher, meta: dict[str, Any], out: Path, process: Process
) -> None:
    """Write every missing shard that falls to this rank."""
    for name, splits in PARTS.items():
        rows = index.rows(*splits)
        shards = meta["parts"][name]["shards"]
        missing = [number for number in range(shards) if not (out / shard_name(name, number)).exists()]
        own_shards = missing[process.rank :: process.world_size]
        if not own_shards:
            continue

        count = part_views(name, config.views)
        per_batch = max(1, config.teacher.batch_size // (count or 1))
        # One loader over all of this rank's shards, so that its processes start once.
        jobs = [
            (number, batch)
            for number in own_shards
            for batch in _batches(partition(len(rows), number, shards), per_batch)
        ]
        pixels = Pixels(index, config.views, teacher.input_size, teacher.interpolation)
        make = functools.partial(_render, pixels, rows, [batch for _, batch in jobs], count)
        workers = loading_processes(config.launch.workers, teacher.device)
        rendered = iter(loader(make, 0, len(jobs), workers, pin_memory=teacher.device.type == "cuda"))

        with bar(process.is_main) as shown:
            task = shown.add_task(f"teach: {name}", total=sum(len(batch) for _, batch in jobs) * (count or 1), note="")
            for number in own_shards:
                shard_rows = partition(len(rows), number, shards)
                with replacing(out / shard_name(name, number)) as temporary:
                    shape = (len(shard_rows), count or 1, teacher.dim)
                    shard = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape)
                    for batch in _batches(shard_rows, per_batch):
                        views = next(rendered)
                        embeddings = teacher.embed(views.flatten(0, 1)).half().cpu().numpy()
                        place = slice(batch.start - shard_rows.start, batch.stop - shard_rows.start)
                        shard[place] = embeddings.reshape(len(batch), *shape[1:])
                        shown.advance(task, len(batch) * shape[1])
                    shard.flush()


def _batches(rows: range, size: int) -> Iterator[range]:
    for start in range(rows.start, rows.stop, size):
        yield range(start, min(start + size, rows.stop))


def _render(pixels: Pixels, rows: np.ndarray[Any, Any], batches: list[range], count: int | None, number: int) -> Tensor:
    """Render batch `number`: pixels uint8 [images, views, size, size, 3]."""
    batch = batches[number]
    return pixels.all_views(rows[batch.start : batch.stop], count)


def _finish(config: Config, index: Index, teacher: Teacher, meta: dict[str, Any], out: Path) -> None:
    """Write text weights, digests of the shards and, last, the mark that the store is complete."""
    prompts = templates(config.data)
    weights = teacher.text_weights(index.class_names, prompts)
    with replacing(out / TEXT_WEIGHTS) as temporary, temporary.open("wb") as file:
        np.save(file, weights.numpy(), allow_pickle=False)

    names = [shard_name(name, number) for name in PARTS for number in range(meta["parts"][name]["shards"])]
    complete = meta | {
        "text": {
            "class_names": index.class_names,
            "templates": prompts,
            "shape": list(weights.shape),
            "dtype": "float32",
            "sha256": digest(torch.round(weights, decimals=6).tolist()),
        },
        "shards": {name: sha256_file(out / name) for name in names},
        "complete": True,
    }
    write_atomically(out / META, json.dumps(complete, indent=2) + "\n")
    shapes = " + ".join(" x ".join(map(str, meta["parts"][name]["shape"])) for name in PARTS)
    print(f"teach: {shapes} embeddings in {out}")
