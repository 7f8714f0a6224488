"""The recipes of CONTRIBUTING.md, followed to the letter on a copy of the tree: copy the file, add the row, use it."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from conftest import ALONE, CLASSES, Tiny, change, draw_image
from safetensors import safe_open

from dho.config import load
from dho.core.workspace import Workspace
from dho.training.train import train

ROOT = Path(__file__).parents[2]
PATIENCE_S = 120


class Tree:
    """A copy of dho/ that a recipe is followed on, and commands that run from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("dho", "k8s"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored, symlinks=True)
        self.environment = os.environ | {"PYTHONPATH": str(folder)}

    def follow(self, title: str) -> None:
        """Do what the steps of a recipe say."""
        page = (ROOT / "CONTRIBUTING.md").read_text()
        recipe = page.split(f"### {title}\n")[1].split("\n### ")[0]
        steps = re.findall(r"^\d\. (.*(?:\n   .*)*)", recipe, re.MULTILINE)
        assert len(steps) >= 2 and len(recipe.strip().splitlines()) <= 5, recipe
        for step in steps:
            if match := re.match(r"Copy `(.+?)` to `(.+?)`", step):
                (self.folder / match[2]).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / match[1], self.folder / match[2])
            elif match := re.match(r"Add to `(\w+)` in `(.+?)`:\n   `(.*)`", step):
                self._add(match[1], self.folder / match[2], match[3])
            else:
                assert step.startswith(("Choose it: ", "Set it: ", "It is in ")), step

    @staticmethod
    def _add(name: str, path: Path, row: str) -> None:
        """Add a row before the end of a table, or a field at the end of a class."""
        lines = path.read_text().splitlines()
        start = next(i for i, line in enumerate(lines) if re.match(rf"(class )?{name}\b", line))
        if lines[start].startswith("class"):
            end = next(i for i in range(start + 1, len(lines)) if lines[i] and not lines[i].startswith(" "))
            while not lines[end - 1].strip() or lines[end - 1].startswith("@"):
                end -= 1
        else:
            end = next((i for i in range(start + 1, len(lines)) if lines[i] in ("}", ")")), start)
        assert end > start, f"{name} in {path} is not a table with one row per line"
        lines.insert(end, f"    {row}")
        path.write_text("\n".join(lines) + "\n")

    def python(self, code: str, cwd: Path, ok: bool = True) -> str:
        return self._run([sys.executable, "-c", code], cwd, ok)

    def dho(self, *arguments: str, cwd: Path, ok: bool = True) -> str:
        return self._run([sys.executable, "-m", "dho", *arguments], cwd, ok)

    def start(self, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "dho", *arguments]
        return subprocess.Popen(
            command, cwd=cwd, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def _run(self, command: list[str], cwd: Path, ok: bool) -> str:
        done = subprocess.run(
            command, cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert (done.returncode == 0) == ok, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A copy on which all recipes are followed, one after the other, as they would be in a year of work."""
    made = Tree(tmp_path_factory.mktemp("tree"))
    titles = re.findall(r"^### (Add .*)$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert len(titles) == 6
    for title in titles:
        made.follow(title)
    return made


def test_a_copy_of_the_tree_is_what_runs(tree: Tree, tmp_path: Path) -> None:
    assert str(tree.folder) in tree.python("import dho; print(dho.__file__)", tmp_path)


# A method: its projection is trained, and survives a kill


def newest(folder: Path) -> Path:
    return max(folder.glob("checkpoints/*/step-*"), key=lambda path: path.name)


def tensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    with safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def kill_at_a_checkpoint(tree: Tree, folder: Path, step: int) -> Path:
    """Start a training and kill all of it once a checkpoint of at least `step` steps is there; returns that."""
    training = tree.start("train", cwd=folder)
    deadline = time.monotonic() + PATIENCE_S
    while not any(int(path.name[5:]) >= step for path in folder.glob("checkpoints/*/step-*")):
        assert training.poll() is None and time.monotonic() < deadline, training.communicate()[0]
        time.sleep(0.005)
    for member in [*psutil.Process(training.pid).children(recursive=True), psutil.Process(training.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    training.communicate(timeout=PATIENCE_S)
    return newest(folder)


def test_a_new_methods_projection_is_in_optimizer_and_checkpoint_moves_and_survives_a_kill(
    tree: Tree, tiny: Tiny, tmp_path: Path
) -> None:
    folders = {}
    for name in ("whole", "broken"):
        folders[name] = tiny.workplace(tmp_path / name, method="ce_fd", epochs=8, keep_checkpoints=50)
        change(folders[name], "launch", processes=1, workers=0)
    broken = folders["broken"]
    kept = kill_at_a_checkpoint(tree, broken, 8)

    first, later = (tensors(path / "model.safetensors") for path in (kept.parent / "step-00000000", kept))
    names = {"extras.projection.weight", "extras.projection.bias"}
    assert names <= set(later)
    assert all(not np.array_equal(first[name], later[name]) for name in names), "the projection never moved"
    moments = tensors(kept / "optimizer.safetensors")
    assert {f"{name}|{key}" for name in names for key in ("step", "exp_avg", "exp_avg_sq")} <= set(moments)

    assert "resumes from" in tree.dho("train", cwd=broken)
    tree.dho("train", cwd=folders["whole"])
    for name in ("student/model.safetensors", "history.csv"):
        whole, resumed = (Workspace(folder).trained / name for folder in folders.values())
        assert whole.read_bytes() == resumed.read_bytes(), name
    losses = csv.DictReader(Workspace(broken).history.open())
    assert next(losses)["val_ce_head_top1"]


def test_a_new_methods_projection_is_in_ddp_and_two_ranks_take_the_step_of_one(
    tree: Tree, tiny: Tiny, tmp_path: Path
) -> None:
    # Two ranks with half of each batch take the step of one process with all of it: without BatchNorm, but for
    # rounding.
    weights = []
    for processes in (1, 2):
        folder = tiny.workplace(
            tmp_path / str(processes), method="ce_fd", epochs=1, checkpoint_every=1, keep_checkpoints=50
        )
        change(folder, "launch", processes=processes, workers=0)
        change(folder, "student", model="test_vit", model_args={}, input_size=160)
        weights.append(tensors(kill_at_a_checkpoint(tree, folder, 3).parent / "step-00000003" / "model.safetensors"))
    one, two = weights
    for name in ("extras.projection.weight", "student.ce_head.weight"):
        np.testing.assert_allclose(one[name], two[name], rtol=1e-3, atol=1e-4, err_msg=name)


# A classifier, a metric and a rule, in one short workflow


@pytest.fixture(scope="module")
def shop(tree: Tree, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that was trained, evaluated and registered by the copy, with the new classifier and rule chosen."""
    folder = tiny.workplace(tmp_path_factory.mktemp("shop") / "s", epochs=1)
    change(folder, "launch", workers=0)
    change(folder, "teacher", classifier="prototypes")
    parameters = yaml.safe_load((folder / "params.yaml").read_text())
    parameters["registry"] = {"name": "recipes", "rules": {"max_nll": 0.0001}}
    parameters["tracking"]["uri"] = "sqlite:///mlflow.db"
    (folder / "params.yaml").write_text(yaml.safe_dump(parameters))
    for stage in ("train", "evaluate", "register"):
        (folder / f"{stage}.log").write_text(tree.dho(stage, cwd=folder))
    return folder


def test_a_new_classifier_is_what_teaches_and_what_is_compared(tree: Tree, shop: Path) -> None:
    metrics = json.loads(Workspace(shop).metrics.read_text())
    code = (
        "from dho.config import load; from dho.data.index import Index; from dho.teacher.store import TeacherStore\n"
        "from dho.core.workspace import Workspace; from dho.teacher.classifier import open_classifier\n"
        "from dho.evaluation.metrics import measure; from dho.runtime.dho_runtime import softmax\n"
        "config, workspace = load(), Workspace()\n"
        "index = Index.load(workspace.prepared); store = TeacherStore.open(workspace.teacher, index, config)\n"
        "classifier, rows = open_classifier(config.teacher.classifier, store), index.rows('test')\n"
        "logits = classifier.logits(store.embeddings(rows, part_name='eval'))\n"
        "print(type(classifier).__name__, measure(softmax(logits), index.labels[rows])['nll'])"
    )
    name, value = tree.python(code, shop).split()[-2:]
    assert name == "Prototypes" and metrics["test"]["teacher"]["nll"] == pytest.approx(float(value), rel=1e-6)


def test_a_new_metric_is_measured_printed_tracked_and_registered(tree: Tree, shop: Path) -> None:
    metrics = json.loads(Workspace(shop).metrics.read_text())
    for values in metrics["test"].values():
        assert 0 <= values["brier"] <= 2
    assert list(metrics["test"]["combined"])[:5] == ["top1", "top5", "nll", "ece", "brier"]
    assert "Brier" in (shop / "evaluate.log").read_text()
    code = (
        "import mlflow; client = mlflow.MlflowClient('sqlite:///mlflow.db')\n"
        "version = client.get_model_version_by_alias('recipes', 'candidate')\n"
        "metrics = client.get_run(version.run_id).data.metrics\n"
        "print(metrics['test/combined/brier'], version.tags['test/combined/brier'])\n"
        "print(version.description)"
    )
    output = tree.python(code, shop)
    run, tag = output.splitlines()[0].split()
    assert (
        float(run)
        == pytest.approx(float(tag), abs=1e-4)
        == pytest.approx(metrics["test"]["combined"]["brier"], abs=1e-4)
    )
    assert "Brier" in output
    assert "brier" in tree.dho("registry", cwd=shop).lower()


def test_a_new_rule_refuses_by_its_setting_and_is_printed_by_its_name(tree: Tree, shop: Path) -> None:
    output = tree.dho("promote", cwd=shop, ok=False)
    assert "NLL" in output and "REFUSED" in output and "as measured" in output
    change(shop, "registry", rules={"max_nll": 1000.0})
    assert "recipes@champion is version 1" in tree.dho("promote", cwd=shop)


# A data set and a kind of job


def test_a_new_data_set_is_one_row_and_a_class_list(tree: Tree, tmp_path: Path) -> None:
    images = tmp_path / "shapes"
    splits: dict[str, list[Any]] = {"train": [], "val": [], "test": []}
    for split, count in (("train", 8), ("val", 2), ("test", 2)):
        for label, name in enumerate(CLASSES):
            for number in range(count):
                path = Path("images", f"{name}_{split}_{number}.png")
                (images / path).parent.mkdir(parents=True, exist_ok=True)
                draw_image(name, 1000 * len(split) + number).save(images / path)
                splits[split].append([path.name, label, name])
    (images / "split_zhou_Shapes.json").write_text(json.dumps(splits))
    data = {"name": "shapes", "source": str(images), "splits": {"shots": 2}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"data": data}))
    tree.dho("fetch", cwd=tmp_path)
    output = tree.dho("prepare", cwd=tmp_path)
    assert "6 labelled" in output and "18 unlabelled" in output and "6 val" in output and "6 test" in output
    card = json.loads((Workspace(tmp_path).prepared / "dataset.json").read_text())
    assert (card["name"], card["class_names"], card["licence"]) == ("shapes", list(CLASSES), "CC0")


def test_a_new_kind_of_job_is_rendered_and_refuses_what_it_cannot_do(tree: Tree) -> None:
    parameters = tree.folder / "params.yaml"
    parameters.write_text(yaml.safe_dump({"launch": {"kubernetes": {"kind": "QuietJob"}}}))
    documents = list(yaml.safe_load_all(tree.dho("launch", "--dry-run", cwd=tree.folder)))
    assert documents[-1]["kind"] == "PyTorchJob"
    output = tree.dho("launch", "--elastic", "1:4", "--dry-run", cwd=tree.folder, ok=False)
    assert "its operator keeps the number of nodes" in output and output.count("\n") == 1


def test_a_method_of_ones_own_needs_no_row(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(ROOT / "tests/workflow/recipes/feature.py", tmp_path / "my_feature.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tiny.workplace(tmp_path / "w", method="my_feature:FeatureDistillation", epochs=1)
    assert train(load(folder / "params.yaml"), Workspace(folder), ALONE)
    info = json.loads((Workspace(folder).student / "student.json").read_text())
    assert info["method"] == "my_feature:FeatureDistillation" and info["heads"] == ["ce"]
