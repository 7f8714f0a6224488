"""Where the bytes of a prepared data set come from: a reader answers (shard, offset, size).

    reader = LocalReader(Path("data/prepared"))
    reader.read("labelled-00000.tar", 512, 1834)

Shards are opened once per process and stay open.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

from dho.core.errors import DataError


class Reader(Protocol):
    """Bytes of shards; instances can be sent to worker processes."""

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """Return `size` bytes of a shard, from byte `offset` on; raises `DataError` when it is missing or short."""


class LocalReader:
    """Shards in a folder of this machine.

    Args:
        folder: where the shards are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, int] = {}

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """Return `size` bytes of a shard, from byte `offset` on; raises `DataError` when it is missing or short."""
        try:
            file = self._files.get(shard)
            if file is None:
                file = self._files[shard] = os.open(self.folder / shard, os.O_RDONLY)
            data = os.pread(file, size, offset)
        except OSError as error:
            raise DataError(f"{self.folder / shard}: {error.strerror}; run the prepare stage") from error
        if len(data) != size:
            raise DataError(f"{self.folder / shard} is too short for the index; run the prepare stage")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}  # open files stay with the process that opened them
