"""Layout `imagefolder`: torchvision's `train/<class>/*`, `val/<class>/*` and `test/<class>/*` below `data.source`.

Without `val` or `test`, that split is drawn from `train`, as for layout `folder`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dho.config import DataConfig
from dho.core.errors import DataError
from dho.data.sources.listing import Listed, Row, class_folders, sub_folders

POOLS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Folder -> pool of its images."""


class ImageFolder(Listed):
    """Images in one folder per split, and there in one folder per class."""

    expected = "train/<class>/*.jpg, and val and test likewise where there are any"

    @classmethod
    def _list(cls, root: Path, config: DataConfig, _raw: Path) -> Iterator[Row]:
        folders: dict[str, Path] = {}
        for folder in sub_folders(root):
            pool = POOLS.get(folder.name)
            # Another name (`Test`, `dev`) would silently leave images out, and a split would be drawn in its place.
            if pool is None:
                raise DataError(f"{folder}: not a split; expected {', '.join(POOLS)} in {root}")
            if pool in folders:
                raise DataError(f"{folder} and {folders[pool]} are both the {pool} split; keep one")
            folders[pool] = folder
        if "train" not in folders:
            raise DataError(f"{root}: no folder 'train'; expected {cls.expected}")

        rows = {pool: list(class_folders(folder, root, config.class_names)) for pool, folder in folders.items()}
        labels = {row["label"] for row in rows["train"] if row["label"]}
        for pool, folder in folders.items():
            if not rows[pool]:
                raise DataError(f"{folder} holds no class folder with images; add some, or remove it")
            for row in rows[pool]:
                if pool != "train" and row["label"] not in labels:
                    raise DataError(
                        f"{root / row['source']}: its class is not among those of {folders['train']}, "
                        f"{', '.join(sorted(labels))}"
                    )
                yield row | {"pool": pool}
