"""The package that downstream teams load: an ONNX file, `card.json`, and two Python files (`dho/runtime/`); no pickle.

    content = package_content(config, card, alpha, beta)
    save_package(folder, parts)

`package_digest` names what a package answers with (weights, alpha, beta, class names, input, code, pinned requirements), so that the same
package is registered once.
"""

from __future__ import annotations

import importlib.metadata
import io
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
from dho.core.files import sha256_file
from dho.registry.evidence import CODE
from dho.runtime import dho_runtime
from dho.student.model import Student
from dho.student.saved import StudentCard

REQUIREMENTS = ("mlflow-skinny", "numpy", "onnxruntime", "pandas", "pillow")


@dataclass(frozen=True)
class Parts:
    """What a package is made of."""

    content: dict[str, Any]
    """`package_content` and the ONNX file's SHA-256: what decides the answers."""
    origin: dict[str, Any]
    """Where the student comes from."""
    artifacts: dict[str, str]
    """Name -> file or folder: `student`, `card`, and for the registry `model_card`, `evidence`, `lineage`."""
    example: bytes
    """An encoded image."""

    def options(self) -> dict[str, Any]:
        """Arguments for MLflow's pyfunc flavour."""
        return {
            "python_model": str(CODE / "pyfunc_model.py"),
            "code_paths": [str(CODE / "dho_runtime.py")],
            "artifacts": self.artifacts,
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
        ColSpec(Array(DataType.double), "ce_head", required=False),
        ColSpec(Array(DataType.double), "kd_head", required=False),
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


def package_content(config: Config, card: StudentCard, alpha: float, beta: float) -> dict[str, Any]:
    """The part of `card.json` that decides what is answered."""
    student = {key: card.student[key] for key in ("input_size", "mean", "std", "interpolation")}
    names = {"class_names": card.class_names, "heads": card.heads, "alpha": alpha, "beta": beta}
    return names | student | {"max_pixels": config.data.max_pixels, "precision": config.registry.precision}


def package_origin(card: StudentCard) -> dict[str, Any]:
    """The part of `card.json` that says where the student comes from."""
    names = ("method", "run_id", "steps", "fingerprints")
    return {name: getattr(card, name) for name in names} | {"model": card.student["model"]}


def package_digest(content: dict[str, Any]) -> str:
    """SHA-256 over all that a package answers with; where it comes from is left out."""
    code = {path.name: sha256_file(path) for path in (CODE / "pyfunc_model.py", CODE / "dho_runtime.py")}
    return digest({"content": content, "code": code, "requirements": requirements()})


def expected_answer(
    student: Student, example: bytes, max_pixels: int, alpha: float, beta: float
) -> np.ndarray[Any, Any]:
    """What torch answers to the example, float32 [classes]; raises `DataError` when the example is not an image."""
    images = _seen(student, example, max_pixels)
    answer: np.ndarray[Any, Any] = student.predict(torch.from_numpy(images), alpha, beta)[0].numpy()
    return answer


def quantised_answer(
    network: Path, student: Student, example: bytes, max_pixels: int, alpha: float, beta: float
) -> np.ndarray[Any, Any]:
    """What an int8 file answers to the example, as `expected_answer`: torch's answer differs by what 8 bits lose."""
    session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
    logits = dict(
        zip(
            student.heads,
            session.run(list(student.heads), {"images": _seen(student, example, max_pixels)}),
            strict=True,
        )
    )
    answer: np.ndarray[Any, Any] = dho_runtime.mix(logits.get("ce"), logits.get("kd"), alpha, beta)[0]
    return answer


def _seen(student: Student, example: bytes, max_pixels: int) -> np.ndarray[Any, Any]:
    """The example as the network sees it, float32 [1, 3, size, size]."""
    try:
        image = dho_runtime.decode(example, max_pixels)
    except dho_runtime.ImageRejected as error:
        raise DataError(f"the input example is not usable: {error}") from error
    config = student.config
    pixels = dho_runtime.render(image, dho_runtime.centre_box(*image.size), config.input_size, config.interpolation)
    return dho_runtime.normalise(pixels[None], config.mean, config.std)


def check_answer(package: Any, example: bytes, expected: np.ndarray[Any, Any]) -> None:
    """Raise `DhoError` unless the package, loaded as downstream loads it, gives the expected probability for the example."""
    served = float(package.predict(pd.DataFrame({"image": [example]}))["probability"].iloc[0])
    if not abs(served - float(expected.max())) < 1e-3:
        raise DhoError(
            f"the package gives its example probability {served:.4f}, its network {expected.max():.4f}; not registered"
        )


def draw_example() -> bytes:
    """A small PNG that is the same on every machine: two colour ramps."""
    rows, columns = np.mgrid[0:48, 0:64]
    pixels = np.stack([columns * 4, rows * 5, 255 - columns * 4], axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
