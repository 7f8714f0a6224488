"""The trained student as a version in MLflow's model registry, for teams that have neither torch nor this repository.

    register(config, Path("data/student"), Path("metrics.json"), Path("registered.json"))

The package holds no pickle: an ONNX file, `card.json`, and two Python files (`dho/serving/`). The version's tag `package.sha256` names
what it answers with (weights, alpha, beta, class names, input, code, pinned requirements), so the same package is registered once.
Alias `candidate` moves to the version when it is READY and its package has answered like the student it was made from; `champion` is
never touched here.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow import MlflowClient
from mlflow.entities import Metric, Run
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array
from PIL import Image

from dho.config import Config, digest
from dho.errors import DataError, DhoError, TrackingError
from dho.export import export_onnx
from dho.files import sha256_file, write_atomically
from dho.mlflow_server import connect, one_line, tracking_uri
from dho.serving import dho_runtime
from dho.student import Student, StudentCard, load_student

CODE = Path(__file__).parent / "serving"
REQUIREMENTS = ("mlflow-skinny", "numpy", "onnxruntime", "pandas", "pillow")
ALIAS = "candidate"


def register(config: Config, student_folder: Path, metrics_file: Path, out: Path, example: bytes | None = None) -> dict[str, Any]:
    """Log the student's package to its training run, make it a model version and point alias `candidate` at it.

    Args:
        config: `tracking`, `registry.name` and `data.max_pixels` are used.
        student_folder: what stage `train` wrote (`dho.student.load_student`).
        metrics_file: what stage `evaluate` wrote: {"alpha": ..., "beta": ..., "test": {source: {metric: number}}}.
        out: JSON file to write the result to, whole or not at all.
        example: bytes of an encoded image for the model's input example; None draws one.

    Returns:
        name, version (int), uri, run_id, model_id, sha256 (of the ONNX file), package_sha256. Registering an identical package again
        gives the version that is there.

    Raises:
        DataError: no student, no metrics, metrics that do not fit the student, or an example that is not an image.
        ConfigError: the backbone cannot be exported.
        DhoError: the package does not answer like the student.
        TrackingError: the MLflow server cannot be reached or refuses, or does not know the student's run.
    """
    student, card = load_student(student_folder)
    alpha, beta, test = _read_metrics(metrics_file, card)
    example = example if example is not None else _draw_example()
    expected = _expected(student, example, config.data.max_pixels, alpha, beta)
    client, name, uri = connect(config.tracking), config.registry.name, tracking_uri(config.tracking)
    with one_line(uri, "cannot find the student's run"):
        run = _run_of(client, card, student_folder)
    with tempfile.TemporaryDirectory() as temporary:
        package = Path(temporary)
        export_onnx(student, package / "student.onnx")
        sha256 = sha256_file(package / "student.onnx")
        content = _content(config, card, alpha, beta) | {"onnx_sha256": sha256}
        package_sha256 = _package_digest(content)
        write_atomically(package / "card.json", json.dumps(content | _origin(card), indent=2, ensure_ascii=False) + "\n")
        with one_line(uri, f"cannot look up or make registered model {name!r}"):
            version = _find(client, name, package_sha256)
        if version is None:
            tags = {"package.sha256": package_sha256, "onnx.sha256": sha256} | _tags(card, alpha, beta, test)
            with one_line(uri, "cannot take the student's package"), _serving_imports():
                model_id = _log(client, run, package, card, content, example, tags)
                answer = mlflow.pyfunc.load_model(f"models:/{model_id}").predict(pd.DataFrame({"image": [example]}))
            _check_answer(model_id, answer, expected)
            with one_line(uri, f"cannot add a version to {name}"):
                _log_metrics(client, card, model_id, test)
                version = _create_version(client, name, card, model_id, tags)
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


def requirements() -> list[str]:
    """What the package needs, pinned to the versions installed here: pip lines, without torch."""
    return [f"{name}=={importlib.metadata.version(name)}" for name in REQUIREMENTS]


def signature(alpha: float, beta: float) -> ModelSignature:
    """The model's interface: encoded images in (base64 in JSON), labels out; alpha and beta are the parameters' defaults."""
    answers = [
        ColSpec(DataType.string, "label", required=False),
        ColSpec(DataType.double, "probability", required=False),
        ColSpec(Array(DataType.string), "top_labels", required=False),
        ColSpec(Array(DataType.double), "top_probabilities", required=False),
        ColSpec(DataType.string, "error", required=False),
    ]
    params = [
        ParamSpec("alpha", DataType.double, alpha),
        ParamSpec("beta", DataType.double, beta),
        ParamSpec("top_k", DataType.long, 5),
        ParamSpec("batch_size", DataType.long, 64),
        ParamSpec("on_error", DataType.string, "raise"),
    ]
    return ModelSignature(Schema([ColSpec(DataType.binary, "image")]), Schema([*answers]), ParamSchema(params))


def _read_metrics(path: Path, card: StudentCard) -> tuple[float, float, dict[str, float]]:
    """alpha, beta and the test metrics by their MLflow name (`test/<source>/<metric>`); a single head fixes alpha, as in `mix`."""
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        alpha, beta, test = metrics.get("alpha"), metrics.get("beta"), metrics.get("test") or {}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: no metrics here ({error}); run the evaluate stage first") from error
    if len(card.heads) == 1:
        only = 1.0 if card.heads == ["ce"] else 0.0
        if alpha not in (None, only):
            raise DataError(f"{path}: alpha is {alpha!r}, but the student has only the {card.heads[0]} head (alpha {only:g})")
        alpha = only
        # Without a kd head, beta divides nothing.
        beta = 1.0 if beta is None and "kd" not in card.heads else beta
    for key, value, low, high in (("alpha", alpha, 0.0, 1.0), ("beta", beta, sys.float_info.min, sys.float_info.max)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise DataError(f"{path}: {key} is {value!r}; expected {'0 to 1' if key == 'alpha' else 'a number > 0'}, from evaluate")
    # What is nested deeper (a number a class) goes by names that MLflow may refuse.
    numbers = {
        f"test/{source}/{metric}": float(value)
        for source, values in test.items()
        if isinstance(values, dict)
        for metric, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
    return float(alpha), float(beta), numbers


def _content(config: Config, card: StudentCard, alpha: float, beta: float) -> dict[str, Any]:
    """The part of `card.json` that decides what is answered."""
    student = {key: card.student[key] for key in ("input_size", "mean", "std", "interpolation")}
    names = {"class_names": card.class_names, "heads": card.heads, "alpha": alpha, "beta": beta}
    return names | student | {"max_pixels": config.data.max_pixels}


def _origin(card: StudentCard) -> dict[str, Any]:
    """The part of `card.json` that says where the student comes from."""
    names = ("method", "run_id", "steps", "fingerprints")
    return {name: getattr(card, name) for name in names} | {"model": card.student["model"]}


def _package_digest(content: dict[str, Any]) -> str:
    """SHA-256 over all that a package answers with; where it comes from is left out."""
    code = {path.name: sha256_file(path) for path in (CODE / "pyfunc_model.py", CODE / "dho_runtime.py")}
    return digest({"content": content, "code": code, "requirements": requirements()})


def _tags(card: StudentCard, alpha: float, beta: float, test: dict[str, float]) -> dict[str, str]:
    tags = {"method": card.method, "heads": ",".join(card.heads), "alpha": f"{alpha:g}", "beta": f"{beta:g}"}
    tags |= {f"fingerprint.{name}": value for name, value in card.fingerprints.items()}
    return tags | {key: f"{value:.4f}" for key, value in test.items() if key.endswith("/top1")}


def _find(client: MlflowClient, name: str, package_sha256: str) -> Any:
    """The newest READY version with this package, or None; the registered model is made where there is none."""
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"tags.`package.sha256` = '{package_sha256}'")
    ready = [version for version in versions if version.name == name and version.status == "READY"]
    return max(ready, key=lambda version: int(version.version), default=None)


def _log(
    client: MlflowClient, run: Run, package: Path, card: StudentCard, content: dict[str, Any], example: bytes, tags: dict[str, str]
) -> str:
    """Log the package as model `student` of the training run, in that run's experiment; its id."""
    # Not mlflow.pyfunc.log_model, which takes the run from mlflow.start_run: that would set a finished run to running and move its end.
    # Model.log takes the run's id, but by itself puts the model into whichever experiment is active.
    model = client.create_logged_model(run.info.experiment_id, "student", card.run_id, tags, run.data.params)
    Model.log(
        artifact_path=None,
        name="student",
        flavor=mlflow.pyfunc,
        run_id=card.run_id,
        model_id=model.model_id,
        step=card.steps,
        python_model=str(CODE / "pyfunc_model.py"),
        code_paths=[str(CODE / "dho_runtime.py")],
        artifacts={"student": str(package / "student.onnx"), "card": str(package / "card.json")},
        pip_requirements=requirements(),
        signature=signature(content["alpha"], content["beta"]),
        input_example=pd.DataFrame({"image": [example]}),
    )
    return str(model.model_id)


def _log_metrics(client: MlflowClient, card: StudentCard, model_id: str, test: dict[str, float]) -> None:
    """Show the test metrics on the logged model. What the run has already is linked, not logged a second time."""
    metrics = []
    for key, value in test.items():
        same = [point for point in client.get_metric_history(card.run_id, key) if point.value == value]
        moment, step = (same[-1].timestamp, same[-1].step) if same else (int(time.time() * 1000), card.steps)
        metrics.append(Metric(key, value, moment, step, model_id=model_id, run_id=card.run_id))
    if metrics:
        client.log_batch(card.run_id, metrics=metrics)


def _create_version(client: MlflowClient, name: str, card: StudentCard, model_id: str, tags: dict[str, str]) -> Any:
    """Add the version, with its tags in the same request (a version without `package.sha256` would be added again), and wait for it."""
    version = client.create_model_version(
        name,
        f"models:/{model_id}",
        run_id=card.run_id,
        tags=tags,
        description=f"{card.student['model']} student, {len(card.class_names)} classes, method {card.method}, {card.steps} steps",
        model_id=model_id,
    )
    version = client.get_model_version(name, version.version)
    if version.status != "READY":
        raise TrackingError(f"version {version.version} of {name} is {version.status}, not READY; alias {ALIAS} is left where it was")
    return version


def _expected(student: Student, example: bytes, max_pixels: int, alpha: float, beta: float) -> np.ndarray[Any, Any]:
    """What torch answers to the example, float32 [classes]."""
    try:
        image = dho_runtime.decode(example, max_pixels)
    except dho_runtime.ImageRejected as error:
        raise DataError(f"the input example is not usable: {error}") from error
    config = student.config
    pixels = dho_runtime.render(image, dho_runtime.centre_box(*image.size), config.input_size, config.interpolation)
    images = torch.from_numpy(dho_runtime.normalise(pixels[None], config.mean, config.std))
    answer: np.ndarray[Any, Any] = student.predict(images, alpha, beta)[0].numpy()
    return answer


def _check_answer(model_id: str, answer: pd.DataFrame, expected: np.ndarray[Any, Any]) -> None:
    """The package, loaded as downstream loads it, gave the student's probability for the example."""
    served, trained = float(answer["probability"].iloc[0]), float(expected.max())
    if not abs(served - trained) < 1e-3:
        raise DhoError(f"logged model {model_id} gives its example probability {served:.4f}, the student {trained:.4f}; not registered")


def _run_of(client: MlflowClient, card: StudentCard, student_folder: Path) -> Run:
    try:
        return client.get_run(card.run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise TrackingError(
            f"{student_folder}: its run {card.run_id!r} is not on this MLflow server; register where it was trained, or train again"
        ) from error


def _draw_example() -> bytes:
    """A small PNG that is the same on every machine: two colour ramps."""
    rows, columns = np.mgrid[0:48, 0:64]
    pixels = np.stack([columns * 4, rows * 5, 255 - columns * 4], axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@contextlib.contextmanager
def _serving_imports() -> Iterator[None]:
    """`import dho_runtime` finds the file beside the model's code, as downstream; what MLflow adds to sys.path goes again after."""
    before = list(sys.path)
    sys.path.insert(0, str(CODE))
    try:
        yield
    finally:
        sys.path[:] = before
        sys.modules.pop("dho_runtime", None)
