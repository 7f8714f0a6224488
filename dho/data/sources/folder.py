"""Layout `folder`: a user's own images, `root/<class>/*` labelled and `root/unlabelled/*` unlabelled, or CSV files.

CSV files hold path,label or path,caption; their paths are relative to `data.source`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from dho.config import DataConfig
from dho.core.errors import DataError
from dho.data.sources.base import is_file, read_csv
from dho.data.sources.listing import Listed, Row, class_folders


class Folder(Listed):
    """The user's own images."""

    expected = "one sub-folder per class, or data.labels, a CSV of path,label"

    @classmethod
    def _list(cls, root: Path, config: DataConfig, _raw: Path) -> Iterable[Row]:
        rows: list[Row] = []
        for pool, name, column in (
            ("val", config.val, "label"),
            ("test", config.test, "label"),
            ("captions", config.captions, "caption"),
        ):
            if name is not None:
                rows += [row | {"pool": pool} for row in _users_csv(root, name, column, may_be_empty=False)]

        held_out = {row["source"] for row in rows}
        if config.labels is None:
            train = class_folders(root, root, config.class_names)
        else:
            train = _users_csv(root, config.labels, "label", may_be_empty=True)
        return rows + [row | {"pool": "train"} for row in train if row["source"] not in held_out]


def _users_csv(root: Path, name: str, column: str, may_be_empty: bool) -> Iterator[Row]:
    """Yield source and `column` of every row of a user's CSV; raises `DataError` that names the file and the row."""
    path = root / name
    row_numbers: dict[str, int] = {}
    for number, row in read_csv(path, ("path", column)):
        source, value = row["path"].strip(), row[column].strip()
        if not source:
            raise DataError(f"{path}, row {number}: the path is empty")
        if not is_file(root / source):
            source = source.replace("\\", "/")  # written on Windows
        if not is_file(root / source):
            raise DataError(f"{path}, row {number}: no file {root / source}")
        source = PurePosixPath(source).as_posix()  # ./a.jpg is a.jpg
        if source in row_numbers:
            raise DataError(f"{path}, row {number}: {source} is already in row {row_numbers[source]}")
        if not value and not may_be_empty:
            raise DataError(f"{path}, row {number}: {source} has no {column}")
        row_numbers[source] = number
        yield {"source": source, column: value}
