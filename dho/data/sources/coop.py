"""Layout `coop`: CoOp's few-shot data sets (Zhou et al.), each with one JSON file that lists train, val and test.

`split_zhou_<DataSet>.json` in `data.source` holds {"train": [[path, label, class name], ...], "val": [...],
"test": [...]}; the paths are relative to an image folder that the catalogue's row names. Labels count from 0.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from dho.catalogue.datasets import DataSet
from dho.config import DataConfig
from dho.core.errors import DataError
from dho.core.files import write_atomically
from dho.data.dataset import class_names, data_set
from dho.data.sources.base import is_file
from dho.data.sources.listing import Listed, Row

POOLS = ("train", "val", "test")
CLASSES = "classes.json"
"""Beside the listing: the split file's name, and the class name that it gives to each label."""


class Coop(Listed):
    """The images that a split file lists; the listing's labels are numbers, `classes.json` names them."""

    expected = "the images that a split_zhou_*.json lists"

    @classmethod
    def _list(cls, root: Path, config: DataConfig, raw: Path) -> list[Row]:
        row = data_set(config)
        file = _split_file(root, row)
        rows, names = _read_split(file, root, row)
        content = {"split_file": file.name, "names": {str(label): names[label] for label in sorted(names)}}
        write_atomically(raw / CLASSES, json.dumps(content, indent=2) + "\n")
        return rows

    def _classes(self, config: DataConfig, raw: Path, _labels: set[str]) -> tuple[list[str], dict[str, int]]:
        try:
            content = json.loads((raw / CLASSES).read_text(encoding="utf-8"))
            file = self._root / content["split_file"]
            by_label = {int(label): name for label, name in content["names"].items()}
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{raw / CLASSES}: cannot be read ({error}); run the fetch stage") from error

        remedy = "list the classes in data.class_names, or in the catalogue's row"
        count = max(by_label) + 1
        unnamed = next((label for label in range(len(by_label)) if label not in by_label), None)
        names = class_names(config, [] if unnamed is not None else [by_label[label] for label in range(count)])
        if unnamed is not None and not names:
            raise DataError(f"{file}: no entry has label {unnamed}, so its class has no name; {remedy}")
        if len(names) != count:
            raise DataError(f"{file} has {count} classes; {len(names)} class names are given for {config.name}")
        if count < 2:
            raise DataError(f"{file} has {count} class; expected two or more")
        for label, name in enumerate(names):
            if names.index(name) != label:
                raise DataError(f"{file}: labels {names.index(name)} and {label} are both {name!r}; {remedy}")
        return names, {str(label): label for label in range(count)}


def _split_file(root: Path, row: DataSet) -> Path:
    files = sorted(root.glob(row.split_file))
    if len(files) != 1:
        present = f"{', '.join(file.name for file in files)} are there" if files else "there is none"
        raise DataError(f"{root}: {present}; expected one file {row.split_file} that lists train, val and test")
    return files[0]


def _read_split(file: Path, root: Path, row: DataSet) -> tuple[list[Row], dict[int, str]]:
    """Return the rows of the listing, and the class name of every label that an entry has."""
    try:
        split = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error})") from error
    if (
        not isinstance(split, dict)
        or set(split) != set(POOLS)
        or not all(isinstance(split[pool], list) for pool in POOLS)
    ):
        raise DataError(f"{file}: expected a mapping of three lists, {', '.join(POOLS)}")
    if not split["train"]:
        raise DataError(f"{file}: train is empty")

    entries = [
        (f"{file}, {pool}[{number}]", pool, *_entry(f"{file}, {pool}[{number}]", entry))
        for pool in POOLS
        for number, entry in enumerate(split[pool])
    ]
    folder = _image_folder(root, row, entries[0][0], entries[0][2])
    rows: list[Row] = []
    labels: dict[str, tuple[int, str]] = {}
    names: dict[int, tuple[str, str]] = {}
    for where, pool, path, label, name in entries:
        if not is_file(folder / path):
            raise DataError(f"{where}: no file {path!r} in {folder}")
        first_label, first_where = labels.setdefault(path, (label, where))
        if first_label != label:
            raise DataError(f"{where}: {path!r} has label {label}, and {first_label} in {first_where}")
        first_name, first_where = names.setdefault(label, (name, where))
        if first_name != name:
            raise DataError(f"{where}: label {label} is {name!r}, and {first_name!r} in {first_where}")
        rows.append({"source": (folder / path).relative_to(root).as_posix(), "pool": pool, "label": str(label)})
    return rows, {label: name for label, (name, _) in names.items()}


def _entry(where: str, entry: Any) -> tuple[str, int, str]:
    """Return path, label and class name of an entry; raises `DataError` for anything else."""
    if not isinstance(entry, list) or len(entry) != 3:
        raise DataError(f"{where} is {_short(entry)}; expected [path, label, class name]")
    path, label, name = entry
    if not isinstance(path, str) or not path.strip():
        raise DataError(f"{where}: the path is {_short(path)}; expected text")
    if not isinstance(label, int) or isinstance(label, bool) or label < 0:
        raise DataError(f"{where}: the label is {_short(label)}; expected a whole number >= 0")
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{where}: label {label} has no class name, {_short(name)}; expected text")
    try:
        f"{path}{name}".encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {_short(entry)} is not UTF-8 text") from error
    relative = PurePosixPath(path)
    if relative.is_absolute() or ".." in relative.parts:
        raise DataError(f"{where}: {path!r} leaves the image folder; expected a path below it")
    return relative.as_posix(), label, name.strip()


def _image_folder(root: Path, row: DataSet, where: str, path: str) -> Path:
    """Return the first of the row's image folders that holds the first entry's file."""
    for name in row.image_folders:
        if is_file(root / name / path):
            return root / name
    folders = ", ".join(str(root / name) for name in row.image_folders)
    raise DataError(f"{where}: no file {path!r} in {folders}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
