"""The teacher store: embeddings of every (image, view), so that the teacher runs once and not in every epoch.

    store = TeacherStore.open(Path("data/teacher"), index, config)
    store.embeddings(rows, views)          # float16 [n, dim]
    store.text_weights                     # float32 [classes, dim]

It is a folder:

- `meta.json`: teacher, preprocessing, views, data set, shapes, text, and whether the store is complete.
- `train-00000.npy ...`: float16 [images, views, dim], of the labelled and unlabelled images.
- `eval-00000.npy ...`: float16 [images, 1, dim], of the centre view of val and test.
- `text_weights.npy`: float32 [classes, dim].

The shards are memory-mapped. They hold embeddings and not logits, so prompts, classes and temperature can change
without the image tower. A store made from other data, other views or another teacher is refused, with what differs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dho.config import Config, ViewsConfig, digest, flatten
from dho.core.errors import StoreMismatch
from dho.core.partition import partition
from dho.data.index import Index
from dho.data.pixels import rendering_fingerprint

META, TEXT_WEIGHTS = "meta.json", "text_weights.npy"
PARTS = {"train": ("labelled", "unlabelled"), "eval": ("val", "test")}
"""Part of the store -> splits it covers."""
FORMAT = 1


def part_views(name: str, views: ViewsConfig) -> int | None:
    """Return the views per image that a part of the store holds; None for the centre view alone."""
    return views.count if name == "train" else None


def data_identity(index: Index, views: ViewsConfig, preprocessing: dict[str, Any]) -> dict[str, Any]:
    """Return what of the data, and of the code that renders it, a store depends on.

    Args:
        index, views: whose embeddings.
        preprocessing: the teacher's `input_size` and `interpolation`.
    """
    # Of fixed views, so that it differs where the code renders otherwise and nowhere else.
    rendering = rendering_fingerprint(preprocessing["interpolation"], preprocessing["input_size"], ViewsConfig())
    return {
        "dataset": {"name": index.name, "fingerprint": index.fingerprint},
        "views": {
            "seed": views.seed,
            "count": views.count,
            "scale": views.scale,
            "flip": views.flip,
            "rendering": rendering,
        },
    }


def differences(meta: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return one phrase per setting in which a store's meta differs from what is expected.

    Args:
        meta: of the store; what is not expected is ignored.
        expected: nested; phrases name dotted keys.
    """
    stored, wanted = flatten(meta), flatten(expected)
    return [
        f"{key} is {_short(stored.get(key))} in the store and {_short(value)} here"
        for key, value in wanted.items()
        if stored.get(key) != value
    ]


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else repr(value)


def read_meta(folder: Path) -> dict[str, Any] | None:
    """Read a store's `meta.json`; None where there is no store.

    Raises:
        StoreMismatch: the file is broken, or of a format that this version cannot read.
    """
    path = folder / META
    if not path.exists():
        return None
    try:
        meta: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise StoreMismatch(f"{path} is not readable ({error}); delete {folder} and run the teach stage") from error
    if meta.get("format") != FORMAT:
        raise StoreMismatch(
            f"{folder} has format {meta.get('format')}; this version reads format {FORMAT}; "
            "delete it and run the teach stage"
        )
    return meta


class TeacherStore:
    """A complete teacher store, read by rows of the index it was made from.

    Attributes:
        meta: content of `meta.json`.
        text_weights: float32 [classes, dim].
        logit_scale: 1 / zeta.
        dim: width of the embeddings.
        fingerprint: SHA-256 (hex) that names this store in runs: identity, shard digests and text weights.
    """

    def __init__(self, folder: Path, meta: dict[str, Any], index: Index) -> None:
        self.folder, self.meta = folder, meta
        self.text_weights: npt.NDArray[np.float32] = np.load(folder / TEXT_WEIGHTS, allow_pickle=False)
        self.logit_scale = float(meta["logit_scale"])
        self.dim = int(meta["dim"])
        self.fingerprint = digest({key: meta[key] for key in ("teacher", "dataset", "views", "shards", "text")})
        self._position = np.full(len(index), -1, np.int64)
        self._starts: dict[str, npt.NDArray[np.int64]] = {}
        for name, splits in PARTS.items():
            rows = index.rows(*splits)
            self._position[rows] = np.arange(len(rows))
            shards = meta["parts"][name]["shards"]
            self._starts[name] = np.asarray([partition(len(rows), shard, shards).start for shard in range(shards)])
        self._maps: dict[str, npt.NDArray[np.float16]] = {}

    @classmethod
    def open(cls, folder: Path, index: Index, config: Config) -> TeacherStore:
        """Open a store for reading.

        Raises:
            StoreMismatch: there is none, it is not complete, or it was made from other data, views or another teacher.
        """
        meta = read_meta(folder)
        if meta is None:
            raise StoreMismatch(f"{folder}: no teacher store here; run the teach stage")
        teacher = {"teacher": {"model": config.teacher.model, "pretrained": config.teacher.pretrained}}
        if wrong := differences(meta, data_identity(index, config.views, meta["teacher"]["preprocessing"]) | teacher):
            raise StoreMismatch(f"teacher store {folder} does not match: {'; '.join(wrong)}; run the teach stage")
        if not meta.get("complete"):
            raise StoreMismatch(f"teacher store {folder} is not complete; run the teach stage, which continues it")
        return cls(folder, meta, index)

    def embeddings(
        self, rows: npt.NDArray[np.int64], views: npt.NDArray[np.int64] | int = 0, part_name: str = "train"
    ) -> npt.NDArray[np.float16]:
        """Read embeddings, float16 [n, dim].

        Args:
            rows: of the index, int64 [n].
            views: numbers of the views, int64 [n], or one for all rows.
            part_name: "train" for rows of the labelled and unlabelled splits, "eval" for those of val and test.

        Raises:
            StoreMismatch: a shard cannot be read.
        """
        positions = self._position[rows]
        starts = self._starts[part_name]
        shards = np.searchsorted(starts, positions, side="right") - 1
        numbers = np.broadcast_to(np.asarray(views), positions.shape)
        embeddings = np.empty((len(positions), self.dim), np.float16)
        for shard in np.unique(shards):
            chosen = shards == shard
            content = self._shard(shard_name(part_name, int(shard)))
            embeddings[chosen] = content[positions[chosen] - starts[shard], numbers[chosen]]
        return embeddings

    def _shard(self, name: str) -> npt.NDArray[np.float16]:
        if name not in self._maps:
            try:
                self._maps[name] = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise StoreMismatch(
                    f"teacher store {self.folder}: {name} cannot be read ({error}); delete it and run the teach stage"
                ) from error
        return self._maps[name]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}  # pickling a memory map would copy it whole


def shard_name(part_name: str, number: int) -> str:
    """Return the file name of a shard."""
    return f"{part_name}-{number:05d}.npy"
