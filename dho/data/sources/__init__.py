"""What a data set consists of before it is divided: one `Record` a file, and the way to read its bytes.

Fashion-MNIST's raw arrays become PNG (lossless); a user's folder is read as it is: `root/<class>/*` labelled, `root/unlabelled/*`
unlabelled, or a CSV of path,label. Paths in CSV files are relative to `data.source`.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from PIL import Image

from dho.catalogue.datasets import class_names
from dho.config import DataConfig
from dho.core.errors import DataError
from dho.core.files import write_atomically

LISTING = "listing.csv"
UNLABELLED_FOLDER = "unlabelled"
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class Record:
    """One image file before the splits are drawn."""

    source: str
    """Name that a person can find the image by: its path under `data.source`, or file and row of the raw arrays."""
    pool: str
    """`train` (divided further), `val`, `test` or `captions` (given by the data set)."""
    label: int | None
    caption: str | None = None


class Source(Protocol):
    """All records of a data set and their bytes; instances can be sent to worker processes."""

    class_names: list[str]
    records: list[Record]

    def read(self, number: int) -> bytes:
        """Bytes of record `number`, an image file; raises OSError when it cannot be read."""


def open_source(config: DataConfig, raw: Path) -> Source:
    """The source that `data.name` names, over the raw folder that stage `fetch` wrote; raises `DataError`."""
    return FashionMnist(config, raw) if config.name == "fashion_mnist" else Folder(config, raw)


class FashionMnist:
    """The four raw files of Fashion-MNIST: 60,000 train and 10,000 test images, 28 x 28 grey."""

    def __init__(self, config: DataConfig, raw: Path) -> None:
        self.class_names = class_names(config)
        self.records: list[Record] = []
        self._images: list[Any] = []
        for pool, part in (("train", "train"), ("test", "t10k")):
            try:
                labels = np.fromfile(raw / f"{part}-labels-idx1-ubyte", np.uint8, offset=8)
                pixels = np.fromfile(raw / f"{part}-images-idx3-ubyte", np.uint8, offset=16).reshape(-1, 28, 28)
            except OSError as error:
                raise DataError(f"{raw}: {error.strerror} ({error.filename}); run the fetch stage") from error
            self._images.append(pixels)
            self.records += [Record(f"{part}/{row:05d}", pool, int(label)) for row, label in enumerate(labels)]

    def read(self, number: int) -> bytes:
        train, test = self._images
        buffer = io.BytesIO()
        Image.fromarray(train[number] if number < len(train) else test[number - len(train)]).save(buffer, "PNG")
        return buffer.getvalue()


class Folder:
    """The user's own images, as listed by stage `fetch`."""

    def __init__(self, config: DataConfig, raw: Path) -> None:
        self._root = Path(str(config.source))
        rows = [row for _, row in _read_csv(raw / LISTING, tuple(field.name for field in fields(Record)))]
        names = class_names(config, sorted({row["label"] for row in rows if row["label"]}))
        if len(names) < 2:
            raise DataError(
                f"{self._root}: found {len(names)} classes; expected one sub-folder a class, or data.labels, a CSV of path,label"
            )
        numbers = {name: number for number, name in enumerate(names)}
        self.class_names = names
        self.records = []
        for row in rows:
            label = row["label"] or None
            if label is not None and label not in numbers:
                raise DataError(f"{row['source']}: label {label!r} is not among the class names {', '.join(names)}")
            self.records.append(
                Record(row["source"], row["pool"], None if label is None else numbers[label], row["caption"] or None)
            )

    def read(self, number: int) -> bytes:
        return (self._root / self.records[number].source).read_bytes()


def write_listing(config: DataConfig, raw: Path) -> None:
    """List a user's images (path, pool, label by name, caption) in `raw/listing.csv`.

    Raises:
        DataError: no such folder, no images, or a CSV that is wrong (names the file and the row).
    """
    root = Path(str(config.source))
    if not root.is_dir():
        raise DataError(f"data.source is {str(root)!r}; expected a folder of images")
    rows: list[dict[str, str]] = []
    for pool, name, column in (
        ("val", config.val, "label"),
        ("test", config.test, "label"),
        ("captions", config.captions, "caption"),
    ):
        if name is not None:
            rows += [{**row, "pool": pool} for row in _user_csv(root, name, column, may_be_empty=False)]
    taken = {row["source"] for row in rows}
    train = (
        _class_folders(root, config.class_names) if config.labels is None else _user_csv(root, config.labels, "label")
    )
    rows += [{**row, "pool": "train"} for row in train if row["source"] not in taken]
    if not rows:
        raise DataError(f"{root}: no images found; expected {root}/<class>/*.jpg, or data.labels, a CSV of path,label")
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [field.name for field in fields(Record)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(Record("", "", None)) | row for row in rows)
    write_atomically(raw / LISTING, buffer.getvalue())


def _class_folders(root: Path, class_names: list[str] | None) -> Iterable[dict[str, str]]:
    """source and label of every image below root/<class> and root/unlabelled; hidden files and folders are passed over."""
    for folder in sorted(
        path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".") and path.name != "__MACOSX"
    ):
        if folder.name != UNLABELLED_FOLDER and folder.name.lower() in ("unlabelled", "unlabeled"):
            raise DataError(
                f"{folder} would be a class of its own; call the folder of unlabelled images {UNLABELLED_FOLDER!r}"
            )
        images = sorted(_images_below(folder))
        if not images and folder.name != UNLABELLED_FOLDER and (class_names is None or folder.name in class_names):
            raise DataError(
                f"{folder} holds no image ({', '.join(sorted(SUFFIXES))}); add some, remove it, or name the classes in data.class_names"
            )
        for path in images:
            yield {
                "source": path.relative_to(root).as_posix(),
                "label": "" if folder.name == UNLABELLED_FOLDER else folder.name,
            }


def _images_below(folder: Path) -> Iterable[Path]:
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


def _user_csv(root: Path, name: str, column: str, may_be_empty: bool = True) -> Iterable[dict[str, str]]:
    """source and `column` of every row of a user's CSV; raises `DataError` that names the file and the row."""
    path = root / name
    seen: dict[str, int] = {}
    for number, row in _read_csv(path, ("path", column)):
        source, value = row["path"].strip(), row[column].strip()
        if not source:
            raise DataError(f"{path}, row {number}: the path is empty")
        if not _is_file(root / source):
            source = source.replace("\\", "/")  # written on Windows
        if not _is_file(root / source):
            raise DataError(f"{path}, row {number}: no file {root / source}")
        source = PurePosixPath(source).as_posix()  # ./a.jpg is a.jpg
        if source in seen:
            raise DataError(f"{path}, row {number}: {source} is already in row {seen[source]}")
        if not value and not may_be_empty:
            raise DataError(f"{path}, row {number}: {source} has no {column}")
        seen[source] = number
        yield {"source": source, column: value}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long
        return False


def _read_csv(path: Path, columns: tuple[str, ...]) -> Iterable[tuple[int, dict[str, str]]]:
    """(row number as a spreadsheet counts, the named columns) of every row that is not blank."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            try:
                header = [name.strip() for name in next(reader, [])]
                missing = [column for column in columns if column not in header]
                if missing:
                    raise DataError(f"{path}, row 1: no column {', '.join(missing)}; expected {','.join(columns)}")
                for cells in reader:
                    if len(cells) > len(header):
                        raise DataError(
                            f'{path}, row {reader.line_num}: more fields than columns; put text with a comma in "quotes"'
                        )
                    if cells:
                        row = dict(zip(header, cells, strict=False))
                        yield reader.line_num, {column: row.get(column, "") for column in columns}
            except csv.Error as error:
                raise DataError(f"{path}, row {reader.line_num}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
