"""Small real stand-ins, made once per session: drawn images, their data set, an open_clip teacher, its store."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ["OMP_NUM_THREADS"] = "1"  # before torch reads it: test workers share the CPUs
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.pop("MLFLOW_REGISTRY_URI", None)

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageDraw

from dho.config import Config, from_dict
from dho.core.process import Process
from dho.core.workspace import Workspace
from dho.data.fetch import fetch
from dho.data.index import Index
from dho.data.prepare import prepare
from dho.teacher.pretrain import pretrain
from dho.teacher.store import TeacherStore
from dho.teacher.teach import teach

CLASSES = ("circle", "square", "stripes")
ALONE = Process(0, 1, torch.device("cpu"))


def draw_image(name: str, seed: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    """Draw a small picture of one of CLASSES, different for every seed."""
    generator = np.random.default_rng([seed, CLASSES.index(name)])
    image = Image.fromarray(generator.integers(0, 90, (size[1], size[0], 3), dtype=np.uint8))
    pen, colour = ImageDraw.Draw(image), tuple(int(value) for value in generator.integers(120, 256, 3))
    x, y = (int(value) for value in generator.integers(4, 12, 2))
    if name == "circle":
        pen.ellipse((x, y, x + 20, y + 20), fill=colour)
    elif name == "square":
        pen.rectangle((x, y, x + 18, y + 18), fill=colour)
    else:
        for left in range(x % 6, size[0], 6):
            pen.line((left, 0, left, size[1]), fill=colour, width=2)
    return image


def write_folder(root: Path, each: int = 30, unlabelled: int = 30) -> None:
    """Draw images in the layout of a user's own: root/<class>/*.jpg and root/unlabelled/*.png."""
    for name in CLASSES:
        (root / name).mkdir(parents=True, exist_ok=True)
        for seed in range(each):
            draw_image(name, seed).save(root / name / f"{seed:03d}.jpg", quality=92)
    (root / "unlabelled").mkdir(parents=True, exist_ok=True)
    for seed in range(unlabelled):
        draw_image(CLASSES[seed % len(CLASSES)], 10_000 + seed).save(root / "unlabelled" / f"{seed:03d}.png")


def tiny_tree(source: Path, folder: Path) -> dict[str, Any]:
    """Return parameters of a workflow over `write_folder`'s images that takes seconds."""
    return {
        "data": {
            "name": "folder",
            "source": str(source),
            "splits": {"shots": 4, "val_per_class": 5, "test_per_class": 5, "captions": 24},
        },
        "views": {"count": 2},
        "teacher": {"model": f"local-dir:{Workspace(folder).pretrained}", "batch_size": 16, "shard_images": 16},
        "pretrain": {"epochs": 2, "batch_size": 8},
        "student": {
            "model": "resnet18",
            "model_args": {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 32]},
            "input_size": 32,
        },
        "train": {"epochs": 2, "batch_labelled": 8, "batch_unlabelled": 8, "log_every": 3, "checkpoint_every": 4},
        "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}", "experiment": "tests"},
        "launch": {"workers": 1, "processes": 1},
    }


def change(folder: Path, section: str, **values: Any) -> None:
    """Change parameters in a folder's params.yaml."""
    tree = yaml.safe_load((folder / "params.yaml").read_text())
    tree[section] |= values
    (folder / "params.yaml").write_text(yaml.safe_dump(tree))


@dataclass(frozen=True)
class Tiny:
    """A prepared data set and a complete teacher store; do not write to its folders."""

    folder: Path
    tree: dict[str, Any]
    """Parameters, to be copied and changed."""

    @property
    def config(self) -> Config:
        return from_dict(self.tree)

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.folder)

    @property
    def prepared(self) -> Path:
        return self.workspace.prepared

    @property
    def store_folder(self) -> Path:
        return self.workspace.teacher

    @property
    def index(self) -> Index:
        return Index.load(self.prepared)

    @property
    def store(self) -> TeacherStore:
        return TeacherStore.open(self.store_folder, self.index, self.config)

    def workplace(self, folder: Path, **train: Any) -> Path:
        """Make a folder as stages `prepare` and `teach` leave it, with these `train` parameters changed."""
        workspace = Workspace(folder)
        for link, target in ((workspace.prepared, self.prepared), (workspace.teacher, self.store_folder)):
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(target)
        tree = self.tree | {"train": self.tree["train"] | train}
        (folder / "params.yaml").write_text(yaml.safe_dump(tree))
        return folder


def changed(tiny: Tiny, **sections: dict[str, object]) -> Config:
    """Return the parameters of `tiny` with some settings of a section changed."""
    tree = copy.deepcopy(tiny.tree)
    for section, values in sections.items():
        tree[section] |= values
    return from_dict(tree)


@pytest.fixture(scope="module", autouse=True)
def no_address_left_behind() -> Iterator[None]:
    """Clear MLflow's addresses, which it keeps in the process and in the environment, for the next module."""
    yield
    assert "MLFLOW_TRACKING_URI" not in os.environ and "MLFLOW_REGISTRY_URI" not in os.environ
    if (mlflow := sys.modules.get("mlflow")) is not None:
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)


@pytest.fixture(scope="session", autouse=True)
def short_measurements() -> Iterator[None]:
    """Shorten the measurement of latencies, which are not judged here."""
    from dho.registry import evidence as measurement

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurement, "SECONDS", 0.02)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    write_folder(folder / "images")
    result = Tiny(folder, tiny_tree(folder / "images", folder))
    config, workspace = result.config, result.workspace
    fetch(config, workspace)
    prepare(config, workspace)
    pretrain(config, workspace)
    teach(config, workspace, ALONE)
    return result
