"""The command line tells the whole story, and what a user can mend is one line."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ALONE, Tiny

from dho import __version__
from dho.cli import main

STAGES = ("fetch", "prepare", "pretrain", "teach", "train", "evaluate", "register")


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(*arguments)
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_help_lists_the_stages_in_the_order_of_the_story(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "--help")
    assert code == 0
    commands = out[out.index("Workflow") :]
    places = [commands.index(f" {stage} ") for stage in STAGES]
    assert places == sorted(places) and "predict" in commands


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "--version")[:2] == (0, f"dho {__version__}\n")


def test_params_prints_every_setting_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "params")
    assert code == 0
    words = " ".join(out.split())
    for key in ("data.splits.shots", "views.count", "train.lambda_ce", "evaluate.betas", "registry.name"):
        assert key in words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("prepare", "--params", "nowhere.yaml"), "nowhere.yaml"),
        (("evaluate",), "params.yaml"),
        (("results",), "run the evaluate stage"),
        (("predict", "some.jpg"), "run the train stage"),
        (("promote", "--params", "nowhere.yaml"), "nowhere.yaml"),
    ],
)
def test_what_is_missing_is_one_line_that_says_what_to_do(
    arguments: tuple[str, ...],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = said(capsys, *arguments)
    assert code == 1
    assert err.startswith("dho: ") and err.count("\n") == 1 and words in err


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tiny.tree))
    (tmp_path / "data").mkdir()
    shutil.copytree(tiny.workspace.raw, tmp_path / "data/raw")
    done = subprocess.run(
        [sys.executable, "-m", "dho", "prepare"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )
    assert done.returncode == 1
    assert (
        done.stderr.startswith("dho: ")
        and done.stderr.endswith("; make room, then run it again\n")
        and done.stderr.count("\n") == 1
    )
    assert not (tmp_path / "data/prepared").exists()


LIGHT = """
import sys
import dho.cli, dho.registry.lineage
assert not {"torch", "mlflow", "pandas"} & set(sys.modules)
import dho.cluster.pod, dho.training.train
print(*({"mlflow", "matplotlib", "scipy", "pandas", "torchmetrics"} & set(sys.modules)))
"""


def test_a_rank_that_starts_again_imports_nothing_that_only_rank_0_needs_at_the_end() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


def test_a_folder_without_a_store_is_refused_before_anything_is_written(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dho.core.errors import StoreMismatch
    from dho.core.workspace import Workspace
    from dho.training.train import train

    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreMismatch, match="no teacher store"):
        train(tiny.config, Workspace(tmp_path, prepared=tiny.prepared, teacher=tmp_path / "none"), ALONE)
    assert not list(tmp_path.iterdir())
