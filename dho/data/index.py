"""The prepared data set: tar shards, one index (parquet) and `dataset.json`; every image is read by its offset.

    from dho.runtime.dho_runtime import decode
    index = Index.load(Path("data/prepared"))
    image = decode(index.read(int(index.rows("labelled")[0])))

Columns of `index.parquet`: key, source (path under `data.source`, or file and row of raw arrays), sha256, shard, offset
and size (bytes), width and height (pixels, upright), label (or null), split, caption (or null).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dho.core.errors import DataError
from dho.data.readers import LocalReader, Reader

INDEX, DATASET = "index.parquet", "dataset.json"

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("sha256", pa.binary(32), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("split", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
    ]
)


class Index:
    """The images of a prepared data set, in the order of the index.

    Args:
        folder: where index and shards are.
        table: content of `index.parquet`.
        dataset: content of `dataset.json`.
        reader: where the images' bytes come from; None for the shards in `folder`.

    Attributes:
        folder: as given.
        class_names: in label order.
        fingerprint: SHA-256 (hex) over key, image digest, label and split of every row; it names the data set in stores
            and runs.
        labels: int64 [images], -1 where there is no label.
        splits: split name of every row.
        name: the catalogue's name of the data set.
    """

    def __init__(self, folder: Path, table: pa.Table, dataset: dict[str, Any], reader: Reader | None = None) -> None:
        self.folder = folder
        self.reader = LocalReader(folder) if reader is None else reader
        self.name: str = dataset["name"]
        self.class_names: list[str] = dataset["class_names"]
        self.fingerprint: str = dataset["fingerprint"]
        self.labels: npt.NDArray[np.int64] = table["label"].fill_null(-1).to_numpy().astype(np.int64)
        self.splits: npt.NDArray[np.str_] = np.asarray(table["split"].to_pylist())
        self.captions: list[str | None] = (
            table["caption"].to_pylist() if table["caption"].null_count < len(table) else [None] * len(table)
        )
        self.keys: npt.NDArray[np.str_] = np.asarray(table["key"].to_pylist())
        shards = table["shard"].combine_chunks().dictionary_encode()
        self._shard_names: list[str] = shards.dictionary.to_pylist()
        self._shards = shards.indices.to_numpy()
        self._offsets, self._sizes = table["offset"].to_numpy(), table["size"].to_numpy()
        self._sha256: bytes = table["sha256"].combine_chunks().buffers()[1].to_pybytes()

    @classmethod
    def load(cls, folder: Path) -> Index:
        """Read the index; raises `DataError` when the folder holds none."""
        try:
            dataset = json.loads((folder / DATASET).read_text())
            return cls(folder, pq.read_table(folder / INDEX, schema=SCHEMA), dataset)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder}: no prepared data set here ({error}); run the prepare stage") from error

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, *splits: str) -> npt.NDArray[np.int64]:
        """Return the row numbers of the given splits, in index order: int64 [images]."""
        return np.flatnonzero(np.isin(self.splits, splits))

    def sha256(self, row: int) -> bytes:
        """Return the 32 bytes that name the image of a row."""
        return self._sha256[32 * row : 32 * row + 32]

    def read(self, row: int) -> bytes:
        """Return the image file of a row, as it came; raises `DataError` when its shard is missing or short."""
        shard = self._shard_names[int(self._shards[row])]
        return self.reader.read(shard, int(self._offsets[row]), int(self._sizes[row]))


def fingerprint(table: pa.Table) -> str:
    """Return the SHA-256 (hex) over key, image digest, label and split of every row of an index."""
    digest = hashlib.sha256()
    for key, sha256, label, split in zip(
        *(table[name].to_pylist() for name in ("key", "sha256", "label", "split")), strict=True
    ):
        digest.update(f"{key} {sha256.hex()} {label} {split}\n".encode())
    return digest.hexdigest()
