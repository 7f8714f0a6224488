"""Images that stay where the user has them: stage `fetch` lists them in `listing.csv`, stage `prepare` reads the list.

The listing and not the folder says which images there are, so that both stages see the same ones.
"""

from __future__ import annotations

import abc
import csv
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from dho.config import DataConfig
from dho.core.errors import DataError
from dho.core.files import write_atomically
from dho.data.dataset import class_names
from dho.data.sources.base import Record, read_csv

LISTING = "listing.csv"
COLUMNS = ("source", "pool", "label", "caption")
"""Of the listing: path under `data.source`, pool, label as text (empty: none) and caption (empty: none)."""
UNLABELLED_FOLDER = "unlabelled"
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

Row = dict[str, str]
"""Column of the listing -> text; columns that are absent are empty."""


class Listed(abc.ABC):
    """Base of the layouts whose images stay in `data.source`.

    Attributes:
        expected: what such a folder should hold, for messages.
    """

    expected: str

    def __init__(self, config: DataConfig, raw: Path) -> None:
        self._root = Path(str(config.source))
        rows = [row for _, row in read_csv(raw / LISTING, COLUMNS)]
        self.class_names, numbers = self._classes(config, raw, {row["label"] for row in rows if row["label"]})
        self.records: list[Record] = []
        for row in rows:
            label = row["label"] or None
            if label is not None and label not in numbers:
                raise DataError(
                    f"{row['source']}: label {label!r} is not among the class names {', '.join(self.class_names)}"
                )
            number = None if label is None else numbers[label]
            self.records.append(Record(row["source"], row["pool"], number, row["caption"] or None))

    @classmethod
    def list_images(cls, config: DataConfig, raw: Path) -> None:
        """List the images of `data.source` in `raw/listing.csv`.

        Raises:
            DataError: no such folder, no images, or something in it that this layout does not allow.
        """
        root = users_folder(config)
        rows = list(cls._list(root, config, raw))
        if not rows:
            raise DataError(f"{root}: no images found; expected {cls.expected}")
        write_listing(raw, rows)

    @classmethod
    @abc.abstractmethod
    def _list(cls, root: Path, config: DataConfig, raw: Path) -> Iterable[Row]:
        """Return a row of the listing per image; what else the constructor needs is written to `raw`."""

    def _classes(self, config: DataConfig, _raw: Path, labels: set[str]) -> tuple[list[str], dict[str, int]]:
        """Return the class names in label order, and the label of each text in the listing's column `label`."""
        names = class_names(config, sorted(labels))
        if len(names) < 2:
            raise DataError(f"{self._root}: found {len(names)} classes; expected {self.expected}")
        return names, {name: number for number, name in enumerate(names)}

    def read(self, number: int) -> bytes:
        """Return the bytes of record `number`; raises `OSError`."""
        return (self._root / self.records[number].path).read_bytes()


def users_folder(config: DataConfig) -> Path:
    """Return `data.source`; raises `DataError` where it is no folder."""
    root = Path(str(config.source))
    if not root.is_dir():
        raise DataError(f"data.source is {str(root)!r}; expected a folder of images")
    return root


def write_listing(raw: Path, rows: Iterable[Row]) -> None:
    """Write `raw/listing.csv`, whole or not at all."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(raw / LISTING, buffer.getvalue())


def sub_folders(folder: Path) -> list[Path]:
    """Return the folders directly below a folder, sorted, without hidden ones and what systems leave behind."""
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".") and path.name != "__MACOSX"
    )


def class_folders(folder: Path, root: Path, class_names: list[str] | None) -> Iterator[Row]:
    """Yield source and label of every image below folder/<class> and folder/unlabelled; paths are relative to `root`.

    Raises:
        DataError: a class folder without an image that `class_names` does not leave out, or another spelling of
            `unlabelled`.
    """
    for below in sub_folders(folder):
        if below.name != UNLABELLED_FOLDER and below.name.lower() in ("unlabelled", "unlabeled"):
            raise DataError(
                f"{below} would be a class of its own; call the folder of unlabelled images {UNLABELLED_FOLDER!r}"
            )
        images = sorted(_images_below(below))
        if not images and below.name != UNLABELLED_FOLDER and (class_names is None or below.name in class_names):
            raise DataError(
                f"{below} holds no image ({', '.join(sorted(SUFFIXES))}); "
                "add some, remove it, or name the classes in data.class_names"
            )
        for path in images:
            label = "" if below.name == UNLABELLED_FOLDER else below.name
            yield {"source": path.relative_to(root).as_posix(), "label": label}


def _images_below(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})")

    for name, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [below for below in folders if not below.startswith(".")]
        for file in files:
            path = Path(name, file)
            # A link to nowhere is listed, so that `prepare` rejects it by name.
            if path.suffix.lower() in SUFFIXES and not file.startswith(".") and (path.is_file() or path.is_symlink()):
                try:
                    str(path).encode()
                except UnicodeEncodeError as error:
                    raise DataError(f"{str(path)!r}: the name is not UTF-8; rename it") from error
                yield path
