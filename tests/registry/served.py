"""A registered student on an MLflow server (SQLite), and images of every kind to ask it about."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from dho.config import Config, StudentConfig, from_dict, to_dict
from dho.core.workspace import Workspace
from dho.registry.register import register
from dho.runtime import dho_runtime
from dho.student.model import Student
from dho.student.saved import StudentInfo, save_student
from dho.tracking.server import connect

STUDENT = StudentConfig(
    model="resnet18", model_args={"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 32]}, input_size=32
)
CLASSES = [f"class {i}" for i in range(7)]
ALPHA, BETA = 0.4, 0.3


@dataclasses.dataclass
class House:
    """One MLflow server (SQLite) with one registered student."""

    folder: Path
    config: Config
    client: MlflowClient
    student: Student
    result: dict
    images: list[bytes]
    model: mlflow.pyfunc.PyFuncModel

    def workspace(self, folder: Path, student: Path | None = None) -> Workspace:
        """A folder of its own for metrics and result, with the house's student or the one in another folder."""
        return make_workspace(folder, student or self.folder)

    def predict(self, images: list, **params: object) -> pd.DataFrame:
        return self.model.predict(pd.DataFrame({"image": images}), params=params)


def make_workspace(folder: Path, student: Path | None = None) -> Workspace:
    """A workspace without a data set: `student/` (perhaps elsewhere), `metrics.json` and `out.json` in a folder."""
    return Workspace(folder, trained=student or folder, evaluated=folder, registered=folder / "out.json")


@contextlib.contextmanager
def registered_house(folder: Path) -> Iterator[House]:
    """Register a student; the folder is the working directory meanwhile, as MLflow makes a folder mlruns there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(folder)
        config = from_dict({"tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"}})
        client = connect(config.tracking)
        client.create_experiment("served", (folder / "artifacts").as_uri())
        student = make_student(folder / "student", make_run(client), ("ce", "kd"))
        write_metrics(folder / "metrics.json", ALPHA, BETA)
        images = draw_images()
        result = register(config, make_workspace(folder), example=images[0])
        model = mlflow.pyfunc.load_model(f"models:/{config.registry.name}@candidate")
        yield House(folder, config, client, student, result, images, model)


def make_run(client: MlflowClient) -> str:
    experiment = client.get_experiment_by_name("served")
    run = client.create_run(experiment.experiment_id, run_name="a training that ended")
    client.log_metric(run.info.run_id, "test/combined/top1", 0.75, step=90)
    client.log_param(run.info.run_id, "train.eta", 2.0)
    client.set_terminated(run.info.run_id, "FAILED", end_time=1_700_000_000_000)
    return run.info.run_id


def make_student(folder: Path, run_id: str, heads: tuple[str, ...], seed: int = 0) -> Student:
    torch.manual_seed(seed)
    student = Student(STUDENT, len(CLASSES), heads).eval()
    for head in (student.ce_head, student.kd_head):
        if head is not None:
            # Heads of a fresh network answer the same to every image; these have opinions.
            torch.nn.init.normal_(head.weight, std=3.0)
    method = "dho" if len(heads) == 2 else heads[0]
    fingerprints = {"data": "d" * 64, "parameters": "p" * 64}
    save_student(
        folder, student, StudentInfo(to_dict(STUDENT), list(heads), CLASSES, method, run_id, 100, fingerprints)
    )
    return student


def write_metrics(path: Path, alpha: float | None, beta: float | None) -> None:
    per_class = {"a (b) & c": 0.5, "never seen": None}
    test = {
        "combined": {"top1": 0.75, "ece": 0.1, "per_class": per_class},
        "ce_head": {"top1": 0.5},
        "teacher": {},
        "images": 100,
    }
    path.write_text(json.dumps({"alpha": alpha, "beta": beta, "val": {}, "test": test}))


def draw_images() -> list[bytes]:
    """Encoded images of many formats, modes and sizes; photographs are smooth, and so are these."""
    generator = np.random.default_rng(0)

    def picture(width: int, height: int, bands: int) -> np.ndarray:
        coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 4), np.uint8), "RGBA").resize(
            (width, height), Image.Resampling.BICUBIC
        )
        return np.asarray(coarse)[..., :bands]

    def encode(image: Image.Image, kind: str, **options: object) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    rotated = Image.Exif()
    rotated[0x0112] = 6
    dark = picture(40, 40, 3).copy()
    dark[:20] = 0  # the first rows come last in a BMP file, which then ends in zero bytes
    grey16 = (picture(50, 30, 1)[..., 0].astype(np.uint16) << 8) + 77
    return [
        encode(Image.fromarray(picture(64, 48, 3)), "JPEG"),
        encode(Image.fromarray(picture(20, 90, 3)), "JPEG", exif=rotated),
        encode(Image.fromarray(picture(80, 60, 4), "CMYK"), "JPEG"),
        encode(Image.fromarray(picture(33, 32, 4)), "PNG"),
        encode(Image.fromarray(picture(28, 28, 1)[..., 0]), "PNG"),
        encode(Image.fromarray(picture(100, 45, 3)).quantize(16), "GIF"),
        encode(Image.fromarray(grey16), "PNG"),
        encode(Image.fromarray(picture(200, 150, 3)), "WEBP"),
        encode(Image.fromarray(picture(47, 53, 3)).convert("1"), "TIFF"),
        encode(Image.fromarray(dark), "BMP"),
        encode(Image.fromarray(picture(1, 7, 3)), "PNG"),
    ]


def network_input(images: list[bytes]) -> torch.Tensor:
    views = [dho_runtime.decode(data) for data in images]
    pixels = np.stack([dho_runtime.render(view, dho_runtime.centre_box(*view.size), 32, "bilinear") for view in views])
    return torch.from_numpy(dho_runtime.normalise(pixels, STUDENT.mean, STUDENT.std))
