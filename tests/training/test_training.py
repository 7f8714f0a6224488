"""Trainings under real torchrun: ended and broken in every way, they finish as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from conftest import ALONE, Tiny, change
from mlflow import MlflowClient

from dho.config import load
from dho.core.workspace import Workspace
from dho.student.saved import load_student
from dho.training.train import Trainer, train

MAX_WAIT_S = 120


def workplace(tiny: Tiny, folder: Path, **train: Any) -> Path:
    """Make one with a training long enough to be ended in the middle."""
    return tiny.workplace(folder, **{"epochs": 15, **train})


def train_whole(folder: Path, processes: int) -> None:
    """Train to the end: in this process, or in several as `dho train` starts them."""
    if processes == 1:
        train_here(folder)
    else:
        finish(start(folder, processes))


def train_here(folder: Path) -> None:
    """Do what `dho train` does with one process, without the time it takes to start one."""
    assert train(load(folder / "params.yaml"), Workspace(folder), ALONE)


def start(folder: Path, processes: int) -> subprocess.Popen[str]:
    """Start `dho train` with this many processes, in a process group of its own."""
    change(folder, "launch", processes=processes)
    return subprocess.Popen(
        [sys.executable, "-m", "dho", "train"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=MAX_WAIT_S)
    assert process.returncode == 0, output
    return output


def checkpoint_after(folder: Path, process: subprocess.Popen[str], step: int) -> None:
    """Wait until a checkpoint of at least `step` steps is there."""
    deadline = time.monotonic() + MAX_WAIT_S
    while time.monotonic() < deadline:
        if any(int(path.name.removeprefix("step-")) >= step for path in folder.glob("checkpoints/*/step-*")):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    raise AssertionError("no checkpoint in time")


def kill_all(process: subprocess.Popen[str]) -> None:
    """Kill torchrun, trainers and loader workers at once, as a lost machine does."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.communicate(timeout=MAX_WAIT_S)


def newest(folder: Path) -> Path:
    return max(folder.glob("checkpoints/*/step-*"), key=lambda path: path.name)


def runs_of(tiny: Tiny, folder: Path) -> list[Any]:
    client = MlflowClient(tiny.tree["tracking"]["uri"])
    run_id = load_student(folder / "outputs/train/student")[1].run_id
    return [client.get_run(run_id)]


@pytest.fixture(scope="module", params=[1, 2])
def pair(
    request: pytest.FixtureRequest, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path, Path, str]:
    """Train once without interruption, and once ended twice and resumed over a damaged checkpoint.

    Returns:
        Number of processes, folder of the first, folder of the second, output of its last start.
    """
    processes: int = request.param
    whole = workplace(tiny, tmp_path_factory.mktemp("whole") / "w")
    train_whole(whole, processes)

    broken = workplace(tiny, tmp_path_factory.mktemp("broken") / "b")
    first = start(broken, processes)
    checkpoint_after(broken, first, 4)
    first.send_signal(signal.SIGTERM)  # torchrun passes it to the trainers' groups, loader workers too
    output, _ = first.communicate(timeout=MAX_WAIT_S)
    assert first.returncode != 0, "a training that did not finish must not say it did"
    assert newest(broken).name > "step-00000004", output
    assert not (broken / "outputs/train/student").exists()

    second = start(broken, processes)
    checkpoint_after(broken, second, int(newest(broken).name.removeprefix("step-")) + 8)
    kill_all(second)

    damaged = newest(broken) / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    return processes, whole, broken, finish(start(broken, processes))


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(pair: tuple[int, Path, Path, str]) -> None:
    _, whole, broken, _ = pair
    for name in ("student/model.safetensors", "history.csv"):
        assert (whole / "outputs/train" / name).read_bytes() == (broken / "outputs/train" / name).read_bytes(), name
    for split in ("val", "test"):
        with (
            np.load(whole / f"outputs/train/head_outputs/{split}.npz") as a,
            np.load(broken / f"outputs/train/head_outputs/{split}.npz") as b,
        ):
            assert set(a) == set(b) == {"ce", "kd", "labels", "keys"}
            assert all(np.array_equal(a[name], b[name]) for name in a)


def test_a_checkpoint_that_fails_its_manifest_is_skipped_with_a_warning(pair: tuple[int, Path, Path, str]) -> None:
    output = pair[3]
    assert "model.safetensors is not what the manifest says" in output
    assert "resumes from" in output


def test_a_restarted_training_is_one_mlflow_run_with_each_metric_once(
    pair: tuple[int, Path, Path, str], tiny: Tiny
) -> None:
    processes, whole, broken, _ = pair
    client = MlflowClient(tiny.tree["tracking"]["uri"])
    histories = []
    for folder in (whole, broken):
        (run,) = runs_of(tiny, folder)
        assert run.info.status == "FINISHED"
        assert run.data.params["train.method"] == "dho"
        assert {entry.dataset.name for entry in run.inputs.dataset_inputs} == {"folder", "teacher store"}
        names = [name for name in run.data.metrics if name.startswith(("train/", "val/"))]
        assert {
            "train/loss/ce",
            "train/loss/kd_unlabelled",
            "train/learning_rate",
            "val/ce_head/top1",
            "val/kd_head/top1",
        } <= set(names)
        histories.append(
            {name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] for name in names}
        )
    whole_history, broken_history = histories
    assert all(
        count == 1 for name in broken_history for count in Counter(step for step, _ in broken_history[name]).values()
    )
    assert set(broken_history) == set(whole_history)
    for name, values in whole_history.items():
        np.testing.assert_allclose(
            sorted(broken_history[name]), sorted(values), rtol=1e-5 if processes > 1 else 0, err_msg=name
        )
    experiment = client.get_experiment_by_name("tests")
    run_ids = [load_student(folder / "outputs/train/student")[1].run_id for folder in (whole, broken)]
    with_these = client.search_runs([experiment.experiment_id])
    assert len(set(run_ids)) == 2
    assert all(run.info.status == "FINISHED" for run in with_these)


def test_a_finished_training_leaves_no_checkpoints_and_a_whole_card(pair: tuple[int, Path, Path, str]) -> None:
    _, whole, _, _ = pair
    assert not list(whole.glob("checkpoints/*/step-*"))
    student, info = load_student(whole / "outputs/train/student")
    assert info.class_names == ["circle", "square", "stripes"] and info.heads == ["ce", "kd"] and not student.training


def test_two_processes_train_on_the_same_batches_as_one(tiny: Tiny, tmp_path: Path) -> None:
    # Without BatchNorm, whose statistics are each rank's own, the sum over ranks is the whole batch but for rounding.
    students = []
    for processes in (1, 2):
        folder = workplace(tiny, tmp_path / str(processes), epochs=1, learning_rate=1e-4)
        tree = yaml.safe_load((folder / "params.yaml").read_text()) | {
            "student": {"model": "test_vit", "input_size": 160}
        }
        (folder / "params.yaml").write_text(yaml.safe_dump(tree))
        train_whole(folder, processes)
        students.append(np.load(folder / "outputs/train/head_outputs/val.npz"))
    one, two = students
    for head in ("ce", "kd"):
        np.testing.assert_allclose(one[head], two[head], rtol=2e-3, atol=2e-3)


def test_a_disk_that_is_full_for_a_while_costs_checkpoints_but_neither_the_training_nor_a_metric(
    pair: tuple[int, Path, Path, str], tiny: Tiny, tmp_path: Path
) -> None:
    processes, whole, _, _ = pair
    folder = workplace(tiny, tmp_path / "w")
    training = start(folder, processes)
    checkpoint_after(folder, training, 4)
    trainers = [child for child in psutil.Process(training.pid).children() if "dho" in child.cmdline()]
    assert len(trainers) == processes
    unlimited = trainers[0].rlimit(psutil.RLIMIT_FSIZE)
    for trainer in trainers:
        trainer.rlimit(psutil.RLIMIT_FSIZE, (100, unlimited[1]))
    assert training.stdout is not None
    output = ""
    while "warning: no checkpoint at step" not in output:
        line = training.stdout.readline()
        assert line, output
        output += line
    before = newest(folder)
    time.sleep(0.2)  # several checkpoints' time, and a small part of the training
    assert newest(folder) == before, "checkpoints continued although no file could grow beyond 100 bytes"
    for trainer in trainers:
        trainer.rlimit(psutil.RLIMIT_FSIZE, unlimited)
    output += training.stdout.read()
    assert training.wait(MAX_WAIT_S) == 0, output
    assert output.count("warning: no checkpoint at step") == 1 and "checkpoints are written again" in output
    assert (whole / "outputs/train/history.csv").read_bytes() == (folder / "outputs/train/history.csv").read_bytes()
    client = MlflowClient(tiny.tree["tracking"]["uri"])
    ((run,), (undisturbed,)) = runs_of(tiny, folder), runs_of(tiny, whole)
    for name in ("train/loss/ce", "val/combined/top1"):
        steps = [[m.step for m in client.get_metric_history(r.info.run_id, name)] for r in (run, undisturbed)]
        assert sorted(steps[0]) == sorted(steps[1])


def test_mlflow_down_at_the_start_is_one_clear_line(tiny: Tiny, tmp_path: Path) -> None:
    folder = workplace(tiny, tmp_path / "w")
    environment = os.environ | {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    result = subprocess.run(
        [sys.executable, "-m", "dho", "train"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=MAX_WAIT_S,
        check=False,
    )
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("dho: ")]
    assert len(lines) == 1 and "http://127.0.0.1:9" in lines[0]
    assert "Traceback" not in result.stderr.split("torch/distributed")[0]


def test_a_changed_parameter_starts_anew_and_not_from_another_trainings_checkpoint(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(trainer: Trainer, batch: Any, step: int) -> Any:
        return original(trainer, batch, step) if step < 5 else pytest.fail("on purpose")

    folder, original = workplace(tiny, tmp_path / "w"), Trainer.step
    with monkeypatch.context() as patched, pytest.raises(pytest.fail.Exception, match="on purpose"):
        patched.setattr(Trainer, "step", breaks)
        train_here(folder)
    assert newest(folder).name == "step-00000004"
    change(folder, "train", eta=3.0, epochs=1)
    train_here(folder)
    assert "resumes from" not in capsys.readouterr().out
    info = json.loads((folder / "outputs/train/student/student.json").read_text())
    assert info["steps"] == 9


def test_a_store_of_other_views_is_refused_by_name(tiny: Tiny, tmp_path: Path) -> None:
    folder = workplace(tiny, tmp_path / "w")
    change(folder, "views", seed=7)
    process = start(folder, 1)
    output, _ = process.communicate(timeout=MAX_WAIT_S)
    assert process.returncode != 0
    assert "views.seed is 0 in the store and 7 here" in output
