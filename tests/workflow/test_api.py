"""The Python API: what the README shows, a stage in a cell of its own, one process or two."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Tiny, changed

import dho
from dho.core.errors import ClusterError, DhoError

ROOT = Path(__file__).parents[2]


def test_the_readmes_lines_run_the_stages_and_promote_the_student(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import yaml

    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(code.strip().splitlines()) == 6
    tree = tiny.tree | {
        "tracking": {"uri": f"sqlite:///{tmp_path / 'mlflow.db'}"},
        "teacher": tiny.tree["teacher"] | {"model": "local-dir:data/pretrained"},
        "train": tiny.tree["train"] | {"epochs": 1},
        "launch": {"processes": 1, "workers": 0},
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["decision"].promoted and names["decision"].version == "1"
    assert names["info"].class_names == tiny.index.class_names


def test_two_processes_train_in_a_cell_beside_the_projects_own_student(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny.workplace(tmp_path / "w")
    workspace = dho.Workspace(folder)
    cells = {processes: workspace.cell(f"{processes}-processes") for processes in (1, 2)}
    for processes, cell in cells.items():
        config = changed(
            tiny, train={"epochs": 1, "learning_rate": 1e-4}, launch={"processes": processes, "workers": 0},
            student={"model": "test_vit", "model_args": {}, "input_size": 160},
        )  # fmt: skip
        assert dho.run("train", config, cell) is True
    one, two = (np.load(cell.head_outputs / "val.npz") for cell in cells.values())
    np.testing.assert_allclose(one["ce"], two["ce"], rtol=2e-3, atol=2e-3)
    assert not workspace.trained.exists()


def test_what_fails_under_torchrun_is_an_error_here(
    tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    workspace = dho.Workspace(tmp_path, prepared=tiny.prepared, teacher=tmp_path / "none")
    with pytest.raises(DhoError, match="train ended with status 1 under torchrun"):
        dho.run("train", changed(tiny, launch={"processes": 2}), workspace)
    assert "no teacher store here" in capfd.readouterr().err


def test_launch_target_sends_a_stage_to_the_cluster_and_the_others_run_here(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dho.cluster import launcher

    def refuse(*_: Any) -> Any:
        raise ClusterError("no cluster here")

    monkeypatch.setattr(launcher, "published", refuse)
    config = changed(tiny, launch={"target": "kubernetes"})
    workspace = tiny.workspace.at(raw=tmp_path / "raw")
    dho.run("fetch", config, workspace)
    assert (tmp_path / "raw" / "listing.csv").is_file()
    with pytest.raises(ClusterError, match="no cluster here"):
        dho.run("train", config, workspace)


def test_a_folder_that_a_workspace_does_not_have_is_refused() -> None:
    with pytest.raises(TypeError, match="no folder 'model'; its folders are raw, prepared"):
        dho.Workspace(".", model="m")
