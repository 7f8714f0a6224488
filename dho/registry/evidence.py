"""What a registered package answers on the test set, how large it is and how long it takes: the evidence that promotion goes by.

    package = open_package(folder)
    evidence = measure_test(package, TestSet.of(Index.load(prepared)), class_names)
    speed = measure_speed(folder, images)

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

CODE = Path(__file__).parents[1] / "runtime"
BATCH = 256
SECONDS = 1.0
"""Time for each setting of `measure_speed`."""
ADDED_ON_DOWNLOAD = ("registered_model_meta",)
"""Files that MLflow adds when it downloads a version."""


@dataclass(frozen=True)
class TestSet:
    """The labelled test images of a prepared data set.

    Attributes:
        fingerprint: SHA-256 (hex) over class names and every image's digest and label: the same for two data sets that differ in
            anything but their test images.
    """

    __test__ = False  # not a test, whatever pytest makes of the name

    index: Index
    rows: npt.NDArray[np.int64]
    fingerprint: str

    @classmethod
    def of(cls, index: Index) -> TestSet:
        """The test set of an index; raises `DataError` where it has no test images."""
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
    """One package's answers on one test set."""

    fingerprint: str
    class_names: list[str]
    labels: npt.NDArray[np.int64]
    guesses: npt.NDArray[np.int64]
    metrics: dict[str, float]
    """top1, top5, nll, ece."""

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
        """Write one row an image (key, label, guess) as parquet."""
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
    """`import dho_runtime` finds the file beside the model's code, as downstream; what MLflow adds to sys.path goes again after."""
    before = list(sys.path)
    sys.path.insert(0, str(CODE))
    try:
        yield
    finally:
        sys.path[:] = before
        sys.modules.pop("dho_runtime", None)


@contextlib.contextmanager
def open_package(folder: Path | str, threads: int = 0) -> Iterator[Any]:
    """A package (folder or MLflow address) loaded as downstream, on so many ONNX Runtime threads (0: all cores)."""
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
    """Every test image through the package; raises `DataError` when the package knows other classes than the test set has."""
    from dho.evaluation.metrics import (
        measure,
    )  # it brings torch, which nobody needs who only reads or judges what was measured

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
    """Milliseconds from encoded images to the answer: `batch<n>/threads<n>/p50` and `/p99`, for 1 and 32 images, 1 and 2 threads.

    Args:
        folder: the package.
        images: encoded images, taken in turn; at least 10 calls a setting, and at most 300 or `SECONDS`.
    """
    found = {}
    for threads in (1, 2):
        with open_package(folder, threads) as package:
            for batch in (1, 32):
                tables = [
                    pd.DataFrame({"image": [images[(start + i) % len(images)] for i in range(batch)]})
                    for start in range(0, 8 * batch, batch)
                ]
                for table in tables[:3]:
                    package.predict(table)
                taken: list[float] = []
                end = time.perf_counter() + SECONDS
                while len(taken) < 10 or (time.perf_counter() < end and len(taken) < 300):
                    start_s = time.perf_counter()
                    package.predict(tables[len(taken) % len(tables)])
                    taken.append(1000 * (time.perf_counter() - start_s))
                for quantile in (50, 99):
                    found[f"batch{batch}/threads{threads}/p{quantile}"] = round(
                        float(np.percentile(taken, quantile)), 3
                    )
    return found


def folder_digest(folder: Path) -> str:
    """SHA-256 (hex) over the path and content of every file of a package, as uploaded."""
    return digest({path.relative_to(folder).as_posix(): sha256_file(path) for path in package_files(folder)})


def folder_bytes(folder: Path) -> int:
    """Size of a package, bytes."""
    return sum(path.stat().st_size for path in package_files(folder))


def package_files(folder: Path) -> list[Path]:
    """The files of a package that has not been loaded yet (Python would add compiled code), without what MLflow adds on download."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in ADDED_ON_DOWNLOAD)
