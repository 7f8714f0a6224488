"""Label a folder of images with a registered model, into a parquet file.

    from dho.config import load
    tracking = load("params.yaml").tracking
    batch_predict(tracking, "models:/dho-student@champion", [Path("photos")], Path("labels.parquet"))

Every row says which version answered.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from dho.config import TrackingConfig
from dho.core.errors import DataError
from dho.core.files import replacing
from dho.core.progress import bar
from dho.data.sources import SUFFIXES
from dho.registry.evidence import open_package
from dho.registry.lineage import resolve
from dho.tracking.server import one_line, tracking_uri

BATCH = 256


def batch_predict(tracking: TrackingConfig, uri: str, places: list[Path], out: Path, top: int = 3) -> tuple[int, int]:
    """Write one row per image to a parquet file, labelled by a registered model.

    Columns: path, label, probability, top_labels, top_probabilities, error (why the image cannot be read), model (its
    version).

    Args:
        uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`; an alias is resolved once, so that all rows are of one
            version.
        places: image files, and folders that are searched for them.
        out: parquet file, whole or not at all.
        top: labels per image.

    Returns:
        The number of images that were answered, and of those that cannot be read.

    Raises:
        DataError: there is no image, or the address of the model has another form.
        TrackingError: MLflow cannot be reached, or has no such version.
    """
    files = [file for place in places for file in _images(place)]
    if not files:
        raise DataError(f"{', '.join(map(str, places))}: no image here ({', '.join(sorted(SUFFIXES))})")
    _, version = resolve(tracking, uri)
    exact = f"models:/{version.name}/{version.version}"

    tables = []
    with one_line(tracking_uri(tracking), f"cannot load {exact}"), open_package(exact) as package, bar() as shown:
        task = shown.add_task("predict", total=len(files), note="")
        for start in range(0, len(files), BATCH):
            batch = files[start : start + BATCH]
            answers = package.predict(pd.DataFrame({"image": batch}), params={"on_error": "null", "top_k": top})
            answers.insert(0, "path", [str(file) for file in batch])
            tables.append(answers)
            shown.advance(task, len(batch))

    table = pd.concat(tables, ignore_index=True)
    table["probability"] = pd.to_numeric(table["probability"])
    table["model"] = exact
    with replacing(out) as temporary:
        table.to_parquet(temporary, index=False)
    unreadable = int(table["error"].notna().sum())
    return len(table) - unreadable, unreadable


def _images(place: Path) -> list[Path]:
    if place.is_dir():
        return sorted(file for file in place.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not place.exists():
        raise DataError(f"{place}: no such file or folder")
    return [place]
