"""The trained student as a version in MLflow's model registry, for teams that have neither torch nor this repository.

    register(config, Path("data/student"), Path("metrics.json"), Path("registered.json"), Sources(...))

A version is made in this order, so that one that can be seen is whole: the package is built and measured here (`dho/registry/evidence.py`),
logged to the training run, fetched back, hashed and asked the example; then the version is added with all its tags in one request, and
alias `candidate` moves to it. Interrupted anywhere, running it again ends with one version. `champion` is moved
by `dho/registry/promote.py` only.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus, Metric, Run
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from dho.config import Config
from dho.core.errors import DataError, DhoError, TrackingError
from dho.core.files import sha256_file, write_atomically
from dho.data.index import CARD, Index
from dho.registry.evidence import (
    Evidence,
    TestSet,
    folder_bytes,
    folder_digest,
    measure_speed,
    measure_test,
    open_package,
    serving_imports,
)
from dho.registry.lease import claim
from dho.registry.lineage import Sources, gather, write_lineage
from dho.registry.model_card import Subject, write_card
from dho.registry.onnx_export import export_onnx
from dho.registry.onnx_int8 import calibration_batches, quantise_onnx
from dho.registry.package import (
    Parts,
    check_answer,
    draw_example,
    expected_answer,
    package_content,
    package_digest,
    package_origin,
    quantised_answer,
)
from dho.registry.promote import recover
from dho.student.saved import StudentCard, load_student
from dho.tracking.server import connect, one_line, tracking_uri, who

ALIAS = "candidate"
LARGEST_DIFFERENCE = 0.002
"""Of the test accuracy between package and training: both are the same on a CPU; training on a GPU rounds differently."""


def register(
    config: Config,
    student_folder: Path,
    metrics_file: Path,
    out: Path,
    sources: Sources | None = None,
    example: bytes | None = None,
) -> dict[str, Any]:
    """Log the student's package to its training run, make it a model version and point alias `candidate` at it.

    Args:
        config: `tracking`, `registry`, `evaluate.ece_bins` and `data.max_pixels` are used.
        student_folder: what stage `train` wrote (`dho.student.model.load_student`).
        metrics_file: what stage `evaluate` wrote: {"alpha": ..., "beta": ..., "test": {source: {metric: number}}}.
        out: JSON file to write the result to, whole or not at all.
        sources: the prepared data to measure the package on, and what its card and lineage say; None measures speed alone, and
            promotion then measures the rest.
        example: bytes of an encoded image for the model's input example; None draws one.

    Returns:
        name, version (int), uri, run_id, model_id, sha256 (of the ONNX file), package_sha256. Registering an identical package again
        gives the version that is there.

    Raises:
        DataError: no student, no metrics, metrics that do not fit the student, or an example that is not an image.
        ConfigError: the backbone cannot be exported, or not quantised.
        DhoError: the package does not answer like the student.
        TrackingError: the MLflow server cannot be reached or refuses, or does not know the student's run.
    """
    student, card = load_student(student_folder)
    alpha, beta, metrics = _read_metrics(metrics_file, card)
    example = example if example is not None else draw_example()
    expected = expected_answer(student, example, config.data.max_pixels, alpha, beta)
    client, name, uri = connect(config.tracking), config.registry.name, tracking_uri(config.tracking)
    with one_line(uri, "cannot find the student's run"):
        run = _run_of(client, card, student_folder)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        export_onnx(student, folder / "student.onnx")
        if config.registry.precision == "int8":
            if sources is None:
                raise DataError(
                    "registry.precision is 'int8', which is calibrated on val images; give the prepared data"
                )
            quantise_onnx(
                folder / "student.onnx",
                folder / "student.onnx",
                calibration_batches(Index.load(sources.prepared), card.student),
            )
            expected = quantised_answer(folder / "student.onnx", student, example, config.data.max_pixels, alpha, beta)
        sha256 = sha256_file(folder / "student.onnx")
        content = package_content(config, card, alpha, beta) | {"onnx_sha256": sha256}
        package_sha256 = package_digest(content)
        with one_line(uri, f"cannot look up or make registered model {name!r}"):
            _make_registered_model(client, name)
            version = _find(client, name, package_sha256)
        if version is None:
            origin = package_origin(card)
            write_atomically(folder / "card.json", json.dumps(content | origin, indent=2, ensure_ascii=False) + "\n")
            artifacts = {"student": str(folder / "student.onnx"), "card": str(folder / "card.json")}
            parts = Parts(content, origin, artifacts, example)
            facts = gather(card, run, alpha, beta, sources) | {"precision": config.registry.precision}
            description = _describe(config, card, run, facts, metrics, parts, folder, sources, expected)
            with one_line(uri, "cannot take the student's package"):
                model_id = _log(client, run, card, parts, package_sha256)
                tags = facts | _fetch_back(client, model_id, example, expected, folder / "fetched")
            numbers = _numbers(metrics) if config.registry.precision == "float32" else _measured(folder / "evidence")
            tags |= {"package.sha256": package_sha256, "onnx.sha256": sha256} | {
                key: f"{value:.4f}" for key, value in numbers.items()
            }
            with one_line(uri, f"cannot add a version to {name}"):
                _log_metrics(client, card, model_id, numbers)
                version = _create_version(client, name, card, model_id, tags, description)
    with one_line(uri, f"cannot set alias {ALIAS} of {name}"):
        client.set_registered_model_alias(name, ALIAS, version.version)
    result = {
        "name": name,
        "version": int(version.version),
        "uri": f"models:/{name}/{version.version}",
        "run_id": version.run_id,
        # MLflow's SQL store keeps the logged model of a version nowhere else.
        "model_id": version.source.removeprefix("models:/"),
        "sha256": sha256,
        "package_sha256": package_sha256,
    }
    write_atomically(out, json.dumps(result, indent=2) + "\n")
    return result


def _read_metrics(path: Path, card: StudentCard) -> tuple[float, float, dict[str, Any]]:
    """alpha, beta and all of `metrics.json`; a single head fixes alpha, as in `mix`."""
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        alpha, beta, _ = metrics.get("alpha"), metrics.get("beta"), metrics.get("test") or {}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: no metrics here ({error}); run the evaluate stage first") from error
    if len(card.heads) == 1:
        only = 1.0 if card.heads == ["ce"] else 0.0
        if alpha not in (None, only):
            raise DataError(
                f"{path}: alpha is {alpha!r}, but the student has only the {card.heads[0]} head (alpha {only:g})"
            )
        alpha = only
        # Without a kd head, beta divides nothing.
        beta = 1.0 if beta is None and "kd" not in card.heads else beta
    for key, value, low, high in (("alpha", alpha, 0.0, 1.0), ("beta", beta, sys.float_info.min, sys.float_info.max)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise DataError(
                f"{path}: {key} is {value!r}; expected {'0 to 1' if key == 'alpha' else 'a number > 0'}, from evaluate"
            )
    return float(alpha), float(beta), metrics


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The test metrics by their MLflow name (`test/<source>/<metric>`); numbers a class go by names that MLflow may refuse."""
    return {
        f"test/{source}/{metric}": float(value)
        for source, values in (metrics.get("test") or {}).items()
        if isinstance(values, dict)
        for metric, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _measured(evidence: Path) -> dict[str, float]:
    """As `_numbers`, of the package itself: what training measured is not true of it."""
    found = json.loads((evidence / "measured.json").read_text())["test"]["metrics"]
    return _numbers({"test": {"combined": found}})


def _make_registered_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _find(client: MlflowClient, name: str, package_sha256: str) -> Any:
    """The newest READY version with this package, or None."""
    versions = client.search_model_versions(f"tags.`package.sha256` = '{package_sha256}'")
    ready = [version for version in versions if version.name == name and version.status == "READY"]
    return max(ready, key=lambda version: int(version.version), default=None)


def _describe(
    config: Config,
    card: StudentCard,
    run: Run,
    facts: dict[str, str],
    metrics: dict[str, Any],
    parts: Parts,
    folder: Path,
    sources: Sources | None,
    expected: np.ndarray[Any, Any],
) -> str:
    """Measure the package, and add evidence, lineage and model card to its artifacts; returns the version's description."""
    bare = folder / "bare"
    with serving_imports():
        mlflow.pyfunc.save_model(str(bare), mlflow_model=Model(metadata=parts.metadata), **parts.options())
    evidence, images, dataset = None, [parts.example], {}
    measured: dict[str, Any] = {"class_names": card.class_names, "ece_bins": config.evaluate.ece_bins}
    with open_package(bare) as package:
        check_answer(package, parts.example, expected)
        if sources is not None:
            test = TestSet.of(Index.load(sources.prepared))
            evidence = measure_test(package, test, config.evaluate.ece_bins)
            if config.registry.precision == "float32":
                _check_accuracy(evidence, metrics)
            evidence.save(folder / "evidence" / "test.parquet", test.index.keys[test.rows])
            measured["test"] = {"fingerprint": test.fingerprint, "images": len(test.rows), "metrics": evidence.metrics}
            images = [test.index.read(int(row)) for row in test.rows[:64]]
            dataset = json.loads((sources.prepared / CARD).read_text())
    measured["latency_ms"] = measure_speed(bare, images)
    write_atomically(folder / "evidence" / "measured.json", json.dumps(measured, indent=2) + "\n")
    write_lineage(folder / "lineage", facts, run, sources)
    subject = Subject(
        config.registry,
        card,
        facts,
        metrics,
        evidence,
        dataset,
        measured["latency_ms"],
        (folder / "student.onnx").stat().st_size,
    )
    description = write_card(folder / "model_card", subject, sources.plots if sources is not None else None)
    parts.artifacts.update({name: str(folder / name) for name in ("evidence", "lineage", "model_card")})
    return description


def _check_accuracy(evidence: Evidence, metrics: dict[str, Any]) -> None:
    trained = ((metrics.get("test") or {}).get("combined") or {}).get("top1")
    if trained is not None and abs(evidence.metrics["top1"] - trained) > LARGEST_DIFFERENCE:
        raise DhoError(
            f"the package's top-1 on test is {evidence.metrics['top1']:.4f}, evaluate measured {trained:.4f}; not registered. "
            "Was the data prepared anew since? `dvc repro` brings both together"
        )


def _log(client: MlflowClient, run: Run, card: StudentCard, parts: Parts, package_sha256: str) -> str:
    """Log the package as model `student` of the training run, in that run's experiment; its id."""
    # What an interrupted registration left: a package that is whole is taken, another one goes.
    found = client.search_logged_models([run.info.experiment_id], f"tags.`package.sha256` = '{package_sha256}'")
    for model in found:
        if model.source_run_id == card.run_id and not client.search_model_versions(
            f"source_path = 'models:/{model.model_id}'"
        ):
            if model.status == LoggedModelStatus.READY:
                return str(model.model_id)
            client.delete_logged_model(model.model_id)
    # Not mlflow.pyfunc.log_model, which takes the run from mlflow.start_run: that would set a finished run to running and move its end.
    # Model.log takes the run's id, but by itself puts the model into whichever experiment is active.
    tags = {"package.sha256": package_sha256}
    model = client.create_logged_model(run.info.experiment_id, "student", card.run_id, tags, run.data.params)
    with serving_imports():
        Model.log(
            artifact_path=None,
            name="student",
            flavor=mlflow.pyfunc,
            run_id=card.run_id,
            model_id=model.model_id,
            step=card.steps,
            metadata=parts.metadata,
            **parts.options(),
        )
    return str(model.model_id)


def _fetch_back(
    client: MlflowClient, model_id: str, example: bytes, expected: np.ndarray[Any, Any], folder: Path
) -> dict[str, str]:
    """Download the package as downstream would, check that it answers, and give the tags that its content decides."""
    mlflow.artifacts.download_artifacts(f"models:/{model_id}", dst_path=str(folder), tracking_uri=client.tracking_uri)
    tags = {"artifact.sha256": folder_digest(folder), "artifact.bytes": str(folder_bytes(folder))}
    measured = json.loads((folder / "artifacts/evidence/measured.json").read_text())
    with open_package(folder) as package:
        check_answer(package, example, expected)
    tags |= {f"latency_ms/{key}": f"{value:.3f}" for key, value in measured["latency_ms"].items()}
    if "test" in measured:
        tags |= {"fingerprint.test": measured["test"]["fingerprint"]}
    return tags


def _log_metrics(client: MlflowClient, card: StudentCard, model_id: str, test: dict[str, float]) -> None:
    """Show the test metrics on the logged model. What the run has already is linked, not logged a second time."""
    metrics = []
    for key, value in test.items():
        same = [point for point in client.get_metric_history(card.run_id, key) if point.value == value]
        moment, step = (same[-1].timestamp, same[-1].step) if same else (int(time.time() * 1000), card.steps)
        metrics.append(Metric(key, value, moment, step, model_id=model_id, run_id=card.run_id))
    if metrics:
        client.log_batch(card.run_id, metrics=metrics)


def _create_version(
    client: MlflowClient, name: str, card: StudentCard, model_id: str, tags: dict[str, str], description: str
) -> Any:
    """Add the version, with its tags in the same request (a version without `package.sha256` would be added again), and wait for it."""
    with claim(
        client, name, f"register package {tags['package.sha256'][:12]}", who(), functools.partial(recover, client, name)
    ):
        found = _find(client, name, tags["package.sha256"])  # by a second registration of the same package, meanwhile
        if found is not None:
            client.delete_logged_model(model_id)
            return found
        version = client.create_model_version(
            name, f"models:/{model_id}", run_id=card.run_id, tags=tags, description=description, model_id=model_id
        )
    version = client.get_model_version(name, version.version)
    if version.status != "READY":
        raise TrackingError(
            f"version {version.version} of {name} is {version.status}, not READY; alias {ALIAS} is left where it was"
        )
    return version


def _run_of(client: MlflowClient, card: StudentCard, student_folder: Path) -> Run:
    try:
        return client.get_run(card.run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise TrackingError(
            f"{student_folder}: its run {card.run_id!r} is not on this MLflow server; register where it was trained, or train again"
        ) from error
