"""What a data set consists of before it is divided: one `Record` per image, and the way to read its bytes.

    source = open_source(config.data, workspace.raw)
    source.records[0]           # Record(path="circle/000.jpg", pool="train", label=0, caption=None)
    source.read(0)              # the bytes of that image file

A layout is one implementation of `Source`, in a file of its own.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from dho.catalogue import resolve
from dho.catalogue.datasets import LAYOUTS
from dho.config import DataConfig
from dho.core.errors import DataError
from dho.data.dataset import data_set


@dataclass(frozen=True)
class Record:
    """One image file before the splits are drawn."""

    path: str
    """Name that a person can find the image by: its path under `data.source`, or file and row of the raw arrays."""
    pool: str
    """`train` (divided further), `val`, `test` or `captions` (given by the data set)."""
    label: int | None
    caption: str | None = None


class Source(Protocol):
    """All records of a data set and their bytes, one class per layout; instances can be sent to worker processes.

    Attributes:
        class_names: in label order.
        records: in an order that does not change from one machine to the next.
    """

    class_names: list[str]
    records: list[Record]

    def __init__(self, config: DataConfig, raw: Path) -> None:
        """Open the raw folder that stage `fetch` wrote; raises `DataError` where something is missing or wrong."""

    @classmethod
    def list_images(cls, config: DataConfig, raw: Path) -> None:
        """Write to `raw` whatever the constructor needs besides the catalogue's files, which are there already.

        Raises:
            DataError: the user's folder or lists cannot be used.
        """

    def read(self, number: int) -> bytes:
        """Return the bytes of record `number`, an image file; raises `OSError` when it cannot be read."""


def source_class(config: DataConfig) -> type[Source]:
    """Return the class that reads the layout of `data.name`; raises `ConfigError` where it cannot be imported."""
    layout = data_set(config).layout
    return cast(type[Source], resolve(LAYOUTS.get(layout, layout)))


def open_source(config: DataConfig, raw: Path) -> Source:
    """Open the source that `data.name` names, over the raw folder that stage `fetch` wrote; raises `DataError`."""
    return source_class(config)(config, raw)


def read_csv(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (row number as a spreadsheet counts, the named columns) of every row that is not blank.

    Raises:
        DataError: the file cannot be read, lacks a column, or is no CSV; names the file and the row.
    """
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
                            f"{path}, row {reader.line_num}: more fields than columns; "
                            'put text with a comma in "quotes"'
                        )
                    if cells:
                        row = dict(zip(header, cells, strict=False))
                        yield reader.line_num, {column: row.get(column, "") for column in columns}
            except csv.Error as error:
                raise DataError(f"{path}, row {reader.line_num}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def is_file(path: Path) -> bool:
    """Whether there is a file of that name, whatever characters a user has put into it."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # such as a name that is too long, or one with a null byte
        return False
