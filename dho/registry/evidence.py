"""Measure a package: its answers on the test set, its size and its speed, which promotion decides by.

    from pathlib import Path
    folder, test = Path("package"), TestSet.of(Index.load(Path("data/prepared")))
    with open_package(folder) as package:
        evidence = measure_test(package, test)
    speed = measure_speed(folder, [test.index.read(0)])

The package is loaded as a downstream team loads it, so decoding, resizing and mixing are measured with the network.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import numpy.typing as npt
import pandas as pd

from dho.config import digest
from dho.core.errors import DataError
from dho.core.files import replacing, sha256_file
from dho.data.index import Index
from dho.evaluation.metrics import measure

CODE = Path(__file__).parents[1] / "runtime"
BATCH = 256
SECONDS = 1.0
"""Time for each setting of `measure_speed`, seconds."""
ADDED_ON_DOWNLOAD = ("registered_model_meta",)
"""Files that MLflow adds when it downloads a version."""


@dataclass(frozen=True)
class TestSet:
    """The labelled test images of a prepared data set.

    Attributes:
        rows: of the index, int64 [images].
        fingerprint: SHA-256 (hex) over class names and every image's digest and label: the same for two data sets that
            differ in anything but their test images.
    """

    __test__ = False  # not a test, whatever pytest makes of the name

    index: Index
    rows: npt.NDArray[np.int64]
    fingerprint: str

    @classmethod
    def of(cls, index: Index) -> TestSet:
        """Take the test images of an index; raises `DataError` where it has no test images."""
        rows = index.rows("test")
        if not len(rows):
            raise DataError(f"{index.folder}: there are no test images, so nothing can be measured")
        content = hashlib.sha256("\n".join(index.class_names).encode())
        for row in rows:
            content.update(index.sha256(int(row)) + int(index.labels[row]).to_bytes(4, "little"))
        return cls(index, rows, content.hexdigest())

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """int64 [images]."""
        return self.index.labels[self.rows]


@dataclass(frozen=True)
class Evidence:
    """One package's answers on one test set; labels and guesses are int64 [images]."""

    fingerprint: str
    class_names: list[str]
    labels: npt.NDArray[np.int64]
    guesses: npt.NDArray[np.int64]
    metrics: dict[str, float]
    """Of `dho.evaluation.metrics.METRICS`, by name."""

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """bool [images]: answered correctly."""
        right: npt.NDArray[np.bool_] = self.guesses == self.labels
        return right

    @property
    def recalls(self) -> dict[str, float]:
        """Share of each class's images that were recognised; classes without test images are left out."""
        present = ((name, self.right[self.labels == number]) for number, name in enumerate(self.class_names))
        return {name: float(right.mean()) for name, right in present if len(right)}

    def save(self, path: Path, keys: npt.NDArray[np.str_]) -> None:
        """Write one row per image (key, label, guess) as parquet; keys are text [images]."""
        names = np.asarray(self.class_names, dtype=object)
        table = pd.DataFrame({"key": keys, "label": names[self.labels], "guess": names[self.guesses]})
        with replacing(path) as temporary:
            table.to_parquet(temporary, index=False)

    @classmethod
    def load(cls, path: Path, fingerprint: str, class_names: list[str], metrics: dict[str, float]) -> Evidence:
        """Read what `save` wrote; raises `DataError` when it is not there or not whole."""
        try:
            table = pd.read_parquet(path)
            numbers = {name: number for number, name in enumerate(class_names)}
            labels, guesses = (table[column].map(numbers).to_numpy(np.int64) for column in ("label", "guess"))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path}: no evidence here ({error})") from error
        return cls(fingerprint, class_names, labels, guesses, metrics)


@contextlib.contextmanager
def serving_imports() -> Iterator[None]:
    """Let `import dho_runtime` find the file beside the model's code, as downstream; then restore sys.path."""
    before = list(sys.path)
    sys.path.insert(0, str(CODE))
    try:
        yield
    finally:
        sys.path[:] = before
        sys.modules.pop("dho_runtime", None)


@contextlib.contextmanager
def open_package(folder: Path | str, threads: int = 0) -> Iterator[Any]:
    """Load a package (folder or MLflow address) as downstream does, on that many ONNX Runtime threads (0: all)."""
    before = os.environ.get("DHO_THREADS")
    os.environ["DHO_THREADS"] = str(threads)
    try:
        with serving_imports():
            yield mlflow.pyfunc.load_model(str(folder))
    finally:
        if before is None:
            os.environ.pop("DHO_THREADS")
        else:
            os.environ["DHO_THREADS"] = before


def measure_test(package: Any, test: TestSet, ece_bins: int = 15) -> Evidence:
    """Put every test image through a package; raises `DataError` when it knows other classes than the test set has."""
    names = test.index.class_names
    numbers = {name: number for number, name in enumerate(names)}
    known = package.metadata.metadata["class_names"]
    if known != names:
        raise DataError(
            f"the package's classes ({', '.join(known)}) are not those of the test set ({', '.join(names)})"
        )
    probabilities = np.zeros((len(test.rows), len(names)))
    for start in range(0, len(test.rows), BATCH):
        images = [test.index.read(int(row)) for row in test.rows[start : start + BATCH]]
        answers = package.predict(pd.DataFrame({"image": images}), params={"top_k": len(names)})
        for i, (labels, values) in enumerate(
            zip(answers["top_labels"], answers["top_probabilities"], strict=True), start
        ):
            probabilities[i, [numbers[label] for label in labels]] = values
    return Evidence(
        test.fingerprint, names, test.labels, probabilities.argmax(1), measure(probabilities, test.labels, ece_bins)
    )


def measure_speed(folder: Path, images: list[bytes]) -> dict[str, float]:
    """Time a package from encoded images to the answer, for 1 and 32 images on 1 and 2 threads.

    Args:
        folder: the package.
        images: encoded images, taken in turn; at least 10 calls per setting, and at most 300 or `SECONDS`.

    Returns:
        Milliseconds: `batch<n>/threads<n>/p50` and `/p99`.
    """
    speed = {}
    for threads in (1, 2):
        with open_package(folder, threads) as package:
            for batch in (1, 32):
                tables = [
                    pd.DataFrame({"image": [images[(start + i) % len(images)] for i in range(batch)]})
                    for start in range(0, 8 * batch, batch)
                ]
                for table in tables[:3]:
                    package.predict(table)
                times: list[float] = []
                end = time.perf_counter() + SECONDS
                while len(times) < 10 or (time.perf_counter() < end and len(times) < 300):
                    start_s = time.perf_counter()
                    package.predict(tables[len(times) % len(tables)])
                    times.append(1000 * (time.perf_counter() - start_s))
                for quantile in (50, 99):
                    value = float(np.percentile(times, quantile))
                    speed[f"batch{batch}/threads{threads}/p{quantile}"] = round(value, 3)
    return speed


def folder_digest(folder: Path) -> str:
    """Return the SHA-256 (hex) over the path and content of every file of a package, as uploaded."""
    return digest({path.relative_to(folder).as_posix(): sha256_file(path) for path in package_files(folder)})


def folder_bytes(folder: Path) -> int:
    """Return the size of a package, bytes."""
    return sum(path.stat().st_size for path in package_files(folder))


def package_files(folder: Path) -> list[Path]:
    """List the files of a package, without what MLflow adds on download.

    Call it before the package is loaded, which leaves compiled code in it.
    """
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in ADDED_ON_DOWNLOAD)
