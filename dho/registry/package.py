"""Build the package that downstream teams load: an ONNX file, `package.json`, two Python files; no pickle.

    from pathlib import Path
    from dho.config import load
    from dho.core.workspace import Workspace
    config, workspace = load("params.yaml"), Workspace()
    package = build(config, workspace, read_trained(workspace), Path("package"))

A package's digest names what it answers with (weights, alpha, beta, class names, input, code, pinned requirements), so
that the same package is registered once.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pandas as pd
import torch
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array
from PIL import Image

from dho.config import Config, digest
from dho.core.errors import DataError, DhoError
from dho.core.files import sha256_file, write_atomically
from dho.core.workspace import Workspace
from dho.data.index import INDEX, Index
from dho.registry.evidence import CODE
from dho.registry.onnx_export import export_onnx
from dho.registry.onnx_int8 import calibration_batches, quantise_onnx
from dho.runtime import dho_runtime
from dho.student.model import Student
from dho.student.saved import StudentInfo, load_student

REQUIREMENTS = ("mlflow-skinny", "numpy", "onnxruntime", "pandas", "pillow")
ARTIFACTS = {
    "student": "student.onnx",
    "package": "package.json",
    "evidence": "evidence",
    "lineage": "lineage",
    "model_card": "model_card",
}
"""Artifact of a package -> its file or folder. A package answers with the first two; the registry adds the others."""


@dataclass(frozen=True)
class Trained:
    """What training and evaluation made.

    Attributes:
        metrics: content of `metrics.json`.
    """

    student: Student
    info: StudentInfo
    alpha: float
    beta: float
    metrics: dict[str, Any]


@dataclass(frozen=True)
class PackageFiles:
    """What a package is made of.

    Attributes:
        folder: holds the artifacts.
        content: what decides the answers: `package_content` and the ONNX file's SHA-256.
        origin: where the student comes from.
        example: an encoded image.
        expected: what the network answers to the example, float32 or float64 [classes].
    """

    folder: Path
    content: dict[str, Any]
    origin: dict[str, Any]
    example: bytes
    expected: np.ndarray[Any, Any]

    def options(self) -> dict[str, Any]:
        """Return the arguments of MLflow's pyfunc flavour, with those artifacts that are in the folder by now."""
        files = ((name, self.folder / file) for name, file in ARTIFACTS.items())
        return {
            "python_model": str(CODE / "pyfunc_model.py"),
            "code_paths": [str(CODE / "dho_runtime.py")],
            "artifacts": {name: str(file) for name, file in files if file.exists()},
            "pip_requirements": requirements(),
            "signature": signature(self.content["alpha"], self.content["beta"]),
            "input_example": pd.DataFrame({"image": [self.example]}),
        }

    @property
    def metadata(self) -> dict[str, Any]:
        """What a loaded model says of itself (`model.metadata.metadata`)."""
        return {
            "class_names": self.content["class_names"],
            "heads": self.content["heads"],
            "method": self.origin["method"],
        }

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over all that the package answers with; where it comes from is left out."""
        code = {path.name: sha256_file(path) for path in (CODE / "pyfunc_model.py", CODE / "dho_runtime.py")}
        return digest({"content": self.content, "code": code, "requirements": requirements()})

    @property
    def network_bytes(self) -> int:
        """Size of the ONNX file, bytes."""
        return (self.folder / ARTIFACTS["student"]).stat().st_size


def build(
    config: Config, workspace: Workspace, trained: Trained, folder: Path, example: bytes | None = None
) -> PackageFiles:
    """Export the student to ONNX, quantise it if asked to, and write what it needs beside it.

    Args:
        config: `registry.precision` and `data.max_pixels` are used.
        workspace: for int8, the val images of `prepared` are read.
        folder: receives `student.onnx` and `package.json`.
        example: bytes of an encoded image; None draws one.

    Raises:
        DataError: the example is not an image, or int8 without a data set to calibrate it on.
        ConfigError: the backbone cannot be exported, or not quantised.
        DhoError: the ONNX file does not answer like the student.
    """
    example = draw_example() if example is None else example
    images = _network_input(trained.student, example, config.data.max_pixels)
    network = folder / ARTIFACTS["student"]
    export_onnx(trained.student, network)
    if config.registry.precision == "int8":
        if not (workspace.prepared / INDEX).is_file():
            raise DataError(
                f"registry.precision is 'int8', which is calibrated on val images, and {workspace.prepared} holds "
                "no data set; run the prepare stage"
            )
        quantise_onnx(network, network, calibration_batches(Index.load(workspace.prepared), trained.info.student))
        expected = quantised_answer(network, trained, images)
    else:
        expected = expected_answer(trained, images)

    content = package_content(config, trained) | {"onnx_sha256": sha256_file(network)}
    origin = package_origin(trained.info)
    write_atomically(folder / ARTIFACTS["package"], json.dumps(content | origin, indent=2, ensure_ascii=False) + "\n")
    return PackageFiles(folder, content, origin, example, expected)


def read_trained(workspace: Workspace) -> Trained:
    """Read the student and its metrics; a single head fixes alpha, as in `dho_runtime.mix`.

    Raises:
        DataError: no student, no metrics, or an alpha or beta that does not fit the student.
    """
    student, info = load_student(workspace.student)
    path = workspace.metrics
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        alpha, beta, _ = metrics.get("alpha"), metrics.get("beta"), metrics.get("test") or {}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: no metrics here ({error}); run the evaluate stage first") from error

    only = dho_runtime.only_alpha(info.heads)
    if only is not None:
        if alpha not in (None, only):
            raise DataError(
                f"{path}: alpha is {alpha!r}, but the student has only the {info.heads[0]} head (alpha {only:g})"
            )
        alpha = only
        # Without a kd head, beta divides nothing.
        beta = 1.0 if beta is None and "kd" not in info.heads else beta
    for key, value, low, high in (("alpha", alpha, 0.0, 1.0), ("beta", beta, sys.float_info.min, sys.float_info.max)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise DataError(
                f"{path}: {key} is {value!r}; expected {'0 to 1' if key == 'alpha' else 'a number > 0'}, from evaluate"
            )
    return Trained(student, info, float(alpha), float(beta), metrics)


def requirements() -> list[str]:
    """Return what the package needs, pinned to the versions installed here: pip lines, without torch."""
    return [f"{name}=={importlib.metadata.version(name)}" for name in REQUIREMENTS]


def signature(alpha: float, beta: float) -> ModelSignature:
    """Return the model's interface: encoded images in, labels out; alpha and beta are the parameters' defaults."""
    answers = [
        ColSpec(DataType.string, "label", required=False),
        ColSpec(DataType.double, "probability", required=False),
        ColSpec(Array(DataType.string), "top_labels", required=False),
        ColSpec(Array(DataType.double), "top_probabilities", required=False),
        ColSpec(DataType.string, "error", required=False),
        *(ColSpec(Array(DataType.double), dho_runtime.head_source(head), required=False) for head in dho_runtime.HEADS),
    ]
    params = [
        ParamSpec("alpha", DataType.double, alpha),
        ParamSpec("beta", DataType.double, beta),
        ParamSpec("top_k", DataType.long, 5),
        ParamSpec("batch_size", DataType.long, 64),
        ParamSpec("on_error", DataType.string, "raise"),
        ParamSpec("heads", DataType.boolean, False),
    ]
    return ModelSignature(Schema([ColSpec(DataType.binary, "image")]), Schema([*answers]), ParamSchema(params))


def package_content(config: Config, trained: Trained) -> dict[str, Any]:
    """Return the part of `package.json` that decides what is answered, but for the ONNX file's SHA-256."""
    info = trained.info
    student = {key: info.student[key] for key in ("input_size", "mean", "std", "interpolation")}
    names = {"class_names": info.class_names, "heads": info.heads, "alpha": trained.alpha, "beta": trained.beta}
    return names | student | {"max_pixels": config.data.max_pixels, "precision": config.registry.precision}


def package_origin(info: StudentInfo) -> dict[str, Any]:
    """Return the part of `package.json` that says where the student comes from."""
    names = ("method", "run_id", "steps", "fingerprints")
    return {name: getattr(info, name) for name in names} | {"model": info.student["model"]}


def expected_answer(trained: Trained, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return what torch answers to an image, float32 [1, 3, size, size] -> float32 [classes]."""
    student = trained.student
    answer: np.ndarray[Any, Any] = student.predict(torch.from_numpy(images), trained.alpha, trained.beta)[0].numpy()
    return answer


def quantised_answer(network: Path, trained: Trained, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return what an int8 file answers, as `expected_answer`: torch's answer differs by what 8 bits lose."""
    session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
    heads = list(trained.student.heads)
    logits = dict(zip(heads, session.run(heads, {"images": images}), strict=True))
    ce, kd = (logits.get(head) for head in dho_runtime.HEADS)
    answer: np.ndarray[Any, Any] = dho_runtime.mix(ce, kd, trained.alpha, trained.beta)[0]
    return answer


def _network_input(student: Student, example: bytes, max_pixels: int) -> np.ndarray[Any, Any]:
    """The example as the network sees it, float32 [1, 3, size, size]."""
    try:
        image = dho_runtime.decode(example, max_pixels)
    except dho_runtime.ImageRejected as error:
        raise DataError(f"the input example is not usable: {error}") from error
    config = student.config
    pixels = dho_runtime.render(image, dho_runtime.centre_box(*image.size), config.input_size, config.interpolation)
    return dho_runtime.normalise(pixels[None], config.mean, config.std)


def check_answer(served: Any, package: PackageFiles) -> None:
    """Raise `DhoError` unless the package, as downstream loads it, gives its example the expected probability."""
    probability = float(served.predict(pd.DataFrame({"image": [package.example]}))["probability"].iloc[0])
    expected = float(package.expected.max())
    if not abs(probability - expected) < 1e-3:
        raise DhoError(
            f"the package gives its example probability {probability:.4f}, its network {expected:.4f}; not registered"
        )


def draw_example() -> bytes:
    """Draw a small PNG that is the same on every machine: two colour ramps."""
    rows, columns = np.mgrid[0:48, 0:64]
    pixels = np.stack([columns * 4, rows * 5, 255 - columns * 4], axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
