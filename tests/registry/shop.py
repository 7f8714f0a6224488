"""An MLflow server (SQLite), two data sets of coloured squares, and one registered version per kind of student."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from dho.config import Config, StudentConfig, from_dict, to_dict
from dho.core.workspace import Workspace
from dho.data.fetch import fetch
from dho.data.index import Index
from dho.data.prepare import prepare
from dho.registry.register import register
from dho.runtime.dho_runtime import centre_box, decode, render
from dho.student.model import Student
from dho.student.saved import StudentInfo, save_student
from dho.tracking.server import connect

STUDENT = StudentConfig(model="resnet18", model_args={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 32]}, input_size=32)
COLOURS = {"blue": (40, 60, 200), "green": (40, 190, 60), "red": (200, 50, 40)}
ALPHA, BETA = 0.4, 0.5


def paint(folder: Path, seed: int, each: int) -> None:
    """Noisy squares of one colour, one folder per class."""
    generator = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(each):
            noise = generator.normal(0, 25, (12, 12, 3)) + generator.normal(0, 10, 3)
            pixels = np.clip(np.asarray(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:03d}.png")


@dataclasses.dataclass
class Shop:
    """An MLflow server (SQLite), two prepared data sets, and one registered version per kind of student."""

    folder: Path
    config: Config
    client: MlflowClient
    versions: dict[str, Any]

    @property
    def workspace(self) -> Workspace:
        return self.at("data", "good")

    def at(self, place: str, kind: str, **elsewhere: Path) -> Workspace:
        """The data set of a place and the student of a kind, without teacher store, plots and repository."""
        return workspace(self.folder, place, kind).at(**elsewhere)

    def named(self, name: str, *kinds: str, **rules: Any) -> Config:
        """A registered model of its own with these versions, numbered from 1; the last one is the candidate."""
        self.client.create_registered_model(name)
        for kind in kinds:
            made = self.versions[kind]
            number = self.client.create_model_version(
                name, made.source, run_id=made.run_id, tags=made.tags, model_id=made.model_id
            ).version
            self.client.set_registered_model_alias(name, "candidate", number)
        tree = to_dict(self.config)
        tree["registry"] = {"name": name, "rules": rules}
        return from_dict(tree)

    def aliases(self, name: str) -> dict[str, str]:
        return {
            alias: str(number)
            for alias, number in self.client.get_registered_model(name).aliases.items()
            if alias != "candidate"
        }

    def state(self, name: str) -> Any:
        model = self.client.get_registered_model(name)
        return (
            model.tags,
            model.aliases,
            [version.tags for version in self.client.search_model_versions(f"name = '{name}'")],
        )


def workspace(folder: Path, place: str, kind: str) -> Workspace:
    made = folder / kind
    root = folder / "no repository"
    return Workspace(root, prepared=folder / place, trained=made, evaluated=made, registered=made / "register.json")


def write_metrics(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"alpha": ALPHA, "beta": BETA, "test": results}))


@contextlib.contextmanager
def open_shop(folder: Path) -> Iterator[Shop]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tree: dict[str, Any] = {"tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"}, "registry": {"name": "shop"}}
        for number, place in enumerate(("data", "other")):
            paint(folder / f"{place}-images", number, each=90)
            splits = {"shots": 4, "val_per_class": 5, "test_per_class": 60}
            config = from_dict(
                tree | {"data": {"name": "folder", "source": str(folder / f"{place}-images"), "splits": splits}}
            )
            data = Workspace(folder, raw=folder / f"{place}-raw", prepared=folder / place)
            fetch(config, data)
            prepare(config, data)
        config = from_dict(tree)
        client = connect(config.tracking)
        made = {
            kind: register_student(config, client, folder, kind, student)
            for kind, student in make_students(Index.load(folder / "data")).items()
        }
        yield Shop(folder, config, client, made)


def make_students(index: Index) -> dict[str, Student]:
    """`good` knows the colours; `poor` leans to green; `broken` never says blue; `elsewhere` has other test data."""
    torch.manual_seed(0)
    good = Student(STUDENT, len(COLOURS)).eval()
    rows = index.rows("labelled", "val", "unlabelled")
    with torch.inference_mode():
        z = good(network_inputs(index, rows))["z"]
        scale = z.std(0).clamp_min(1e-3)
        centred = torch.cat([(z - z.mean(0)) / scale, torch.ones(len(z), 1)], 1)
        names = [key.split("/")[0] for key in _paths(index)]
        truth = torch.tensor([index.class_names.index(names[row]) for row in rows])
        weights = (
            torch.linalg.lstsq(
                centred, torch.nn.functional.one_hot(truth, len(COLOURS)).float(), driver="gelsd"
            ).solution
            * 8
        )
        for head in (good.ce_head, good.kd_head):
            assert head is not None
            head.weight.copy_((weights[:-1] / scale[:, None]).T)
            head.bias.copy_(weights[-1] - (weights[:-1] / scale[:, None]).T @ z.mean(0))
    poor, broken, elsewhere = (copy.deepcopy(good) for _ in range(3))
    with torch.inference_mode():
        for student, change in ((poor, [0.0, 5.0, 0.0]), (broken, [-40.0, 0.0, 0.0]), (elsewhere, [0.0, 1e-5, 0.0])):
            for head in (student.ce_head, student.kd_head):
                assert head is not None
                head.bias.add_(torch.tensor(change))
    return {"poor": poor, "good": good, "broken": broken, "elsewhere": elsewhere}


def _paths(index: Index) -> list[str]:
    import pyarrow.parquet as pq

    return [str(path) for path in pq.read_table(index.folder / "index.parquet")["source"].to_pylist()]


def network_inputs(index: Index, rows: Any) -> torch.Tensor:
    views = [decode(index.read(int(row))) for row in rows]
    pixels = np.stack([render(view, centre_box(*view.size), STUDENT.input_size, "bilinear") for view in views])
    return Student.normalise(Student(STUDENT, 2), torch.from_numpy(pixels))


def register_student(config: Config, client: MlflowClient, folder: Path, kind: str, student: Student) -> Any:
    place = "other" if kind == "elsewhere" else "data"
    index = Index.load(folder / place)
    experiment = client.get_experiment_by_name("shop")
    number = (
        experiment.experiment_id if experiment else client.create_experiment("shop", (folder / "artifacts").as_uri())
    )
    run = client.create_run(
        number, tags={"mlflow.source.git.commit": "c" * 40, "git.dirty": "true", "hardware": "2 x test"}
    )
    client.log_param(run.info.run_id, "train.seed", 7)
    client.log_param(run.info.run_id, "teacher.model", "ViT-B-16")
    prints = {"dataset": index.fingerprint, "teacher_store": "s" * 64}
    info = StudentInfo(to_dict(STUDENT), ["ce", "kd"], index.class_names, "dho", run.info.run_id, 9, prints)
    made = workspace(folder, place, kind)
    save_student(made.student, student, info)
    right = (
        student.predict(network_inputs(index, index.rows("test")), ALPHA, BETA).argmax(1).numpy()
        == index.labels[index.rows("test")]
    )
    write_metrics(made.metrics, {"combined": {"top1": float(right.mean())}})
    done = register(config, made)
    version = client.get_model_version(done["name"], str(done["version"]))
    assert float(version.tags["test/combined/top1"]) == round(float(right.mean()), 4)
    return version
