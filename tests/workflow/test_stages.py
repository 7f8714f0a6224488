"""The stage table, `dvc.yaml`, pipelines/ and the code itself say the same."""

from __future__ import annotations

import ast
import inspect
import shutil
import subprocess
from pathlib import Path
from typing import Any

import grimp
import pytest
import yaml

import dho
from dho.catalogue import resolve
from dho.config import from_dict, to_dict
from dho.core.workspace import FOLDERS, Workspace
from dho.stages import STAGES, Stage

ROOT = Path(__file__).parents[2]
DVC: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
EACH = pytest.mark.parametrize("stage", STAGES.values(), ids=lambda stage: stage.name)


def paths(entries: list[Any]) -> set[str]:
    """Paths of deps or outs, with or without settings."""
    return {next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries}


def written(stage: Stage) -> set[str]:
    return {str(getattr(Workspace(), name)) for name in stage.writes}


def test_dvc_has_the_stages_of_the_table_in_its_order() -> None:
    assert list(DVC) == list(STAGES)


@EACH
def test_deps_outs_and_params_of_dvc_are_those_of_the_table(stage: Stage) -> None:
    entry = DVC[stage.name]
    code = {f"dho/{room}" for room in stage.code}
    reads = {str(getattr(Workspace(), name)) for name in stage.reads}
    source = {"${data.source}"} if stage.name in ("fetch", "prepare") else set()
    assert set(entry["deps"]) == {f"pipelines/{stage.name}.py"} | code | reads | source
    assert set(entry["params"]) == set(stage.params)
    outs = [*entry.get("outs", []), *entry.get("metrics", []), *entry.get("plots", [])]
    assert paths(outs) == written(stage)
    assert entry["cmd"] == f"python pipelines/{stage.name}.py" and entry["desc"] == stage.title


@EACH
def test_what_a_stage_reads_an_earlier_one_writes(stage: Stage) -> None:
    earlier = list(STAGES.values())[: list(STAGES).index(stage.name)]
    available = {name for one in earlier for name in one.writes}
    assert set(stage.reads) <= available


@EACH
def test_the_code_of_a_stage_is_all_that_it_imports(stage: Stage) -> None:
    graph = grimp.build_graph("dho")
    module = stage.function.partition(":")[0]
    imported = {module, *graph.find_upstream_modules(module)}
    rooms = {name.split(".")[1] for name in imported if name.count(".")}
    missing = rooms - set(stage.code) - {name for name in rooms if not (ROOT / "dho" / name).is_dir()}
    assert not missing, f"{stage.name} imports {missing}, whose change would not make it run again"


@EACH
def test_params_of_a_stage_are_settings_that_there_are(stage: Stage) -> None:
    for key in stage.params:
        tree: Any = to_dict(from_dict({}))
        for part in key.split("."):
            assert part in tree, key
            tree = tree[part]


@EACH
def test_a_stage_is_a_function_of_config_workspace_and_process(stage: Stage) -> None:
    parameters = list(inspect.signature(resolve(stage.function)).parameters)
    expected = ["config", "workspace", *(["process"] if stage.torchrun else [])]
    assert parameters[: len(expected)] == expected


@EACH
def test_a_stage_is_a_public_name(stage: Stage) -> None:
    assert getattr(dho, stage.name) is resolve(stage.function)


@EACH
def test_a_pipeline_script_is_thin_and_names_its_stage(stage: Stage) -> None:
    tree = ast.parse((ROOT / "pipelines" / f"{stage.name}.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert [ast.literal_eval(call.args[0]) for call in calls] == [stage.name]
    assert len(tree.body) == 3


def test_every_folder_of_the_workspace_is_written_by_a_stage() -> None:
    outputs = {Path(path) for stage in STAGES.values() for path in written(stage)}
    for name, path in FOLDERS.items():
        if name != "checkpoints":
            assert any(Path(path) in (output, output.parent) for output in outputs), name


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of code and parameters with something in the place of every output, all of it recorded as up to date."""
    project = tmp_path_factory.mktemp("project")
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    for name in names:
        if name.startswith(("dho/", "pipelines/", ".dvc", "data/", "dvc.yaml", "params.yaml")):
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, project / name)
    for stage in STAGES.values():
        for path in written(stage):
            (project / path).parent.mkdir(parents=True, exist_ok=True)
            (project / path).write_text(stage.name)
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    subprocess.run(["dvc", "commit", "--force", "--quiet"], cwd=project, check=True)
    return project


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ("dho/runtime/dho_runtime.py", list(STAGES)),  # `render`: whatever changes pixels changes all that follows
        ("dho/methods/dual_head.py", ["train"]),
        ("dho/registry/rules.py", ["register"]),
        ("dho/cli/show.py", []),
    ],
)
def test_dvc_status_names_every_stage_whose_result_a_change_of_code_may_change(
    recorded: Path, change: str, stages: list[str]
) -> None:
    def status() -> dict[str, Any]:
        done = subprocess.run(["dvc", "status", "--json"], cwd=recorded, check=True, capture_output=True, text=True)
        return dict(yaml.safe_load(done.stdout))

    assert status() == {}
    path = recorded / change
    before = path.read_text()
    path.write_text(before.replace("INTERPOLATIONS[interpolation]", "Image.Resampling.NEAREST") + "\n# changed\n")
    try:
        assert list(status()) == stages
    finally:
        path.write_text(before)
