"""The shape of the house: few files at the root, small rooms, short files; light to enter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dho

ROOT = Path(__file__).parents[2]
HOUSE = ROOT / "dho"
MAX_FILES, MAX_LINES, MAX_COLUMNS = 13, 400, 120
ROOMS = sorted(path.parent for path in HOUSE.rglob("__init__.py") if path.parent != HOUSE)


def test_three_files_lie_at_the_root() -> None:
    assert {path.name for path in HOUSE.glob("*.py")} == {"__init__.py", "__main__.py", "stages.py"}


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: str(room.relative_to(HOUSE)))
def test_a_room_is_small_and_says_what_it_is(room: Path) -> None:
    files = [path for path in room.glob("*.py") if path.name != "__init__.py"]
    assert len(files) <= MAX_FILES
    assert not {"utils.py", "helpers.py", "common.py"} & {path.name for path in files}
    assert (room / "__init__.py").read_text().startswith('"""')


def test_files_are_short_and_lines_fit_120_columns() -> None:
    files = [path for place in ("dho", "tests", "benchmarks", "pipelines") for path in (ROOT / place).rglob("*.py")]
    too_long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert not {name: count for name, count in too_long.items() if count > MAX_LINES}
    wide = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(re.sub(r"  # (noqa|type:).*", "", line)) > MAX_COLUMNS
    ]
    assert not wide


def test_every_room_is_in_the_layers_and_in_the_pages() -> None:
    contributing, readme = (ROOT / "CONTRIBUTING.md").read_text(), (ROOT / "README.md").read_text()
    for room in (room for room in ROOMS if room.parent == HOUSE):
        assert f"`{room.name}`" in contributing, room
        assert f" {room.name} " in readme, room


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LIGHT = """
import importlib, pkgutil, sys
import dho, dho.catalogue, dho.cli, dho.cluster, dho.config
for room in (dho.catalogue, dho.cli, dho.cluster, dho.config):
    for module in pkgutil.walk_packages(room.__path__, room.__name__ + "."):
        importlib.import_module(module.name)
print(*sorted({"torch", "mlflow", "pandas", "torchvision", "timm", "open_clip"} & set(sys.modules)))
"""


def test_who_chooses_checks_and_launches_loads_no_torch() -> None:
    assert python(LIGHT) == "\n"


def test_importing_dho_changes_no_environment_variable_and_loads_nothing_heavy() -> None:
    code = (
        "import os, sys; before = dict(os.environ); import dho; assert dict(os.environ) == before; print(*sys.modules)"
    )
    loaded = set(python(code).split())
    assert not {"torch", "mlflow", "numpy", "yaml", "typer", "pandas"} & loaded


def test_every_public_name_is_there_and_no_other() -> None:
    for name in dho.__all__:
        assert getattr(dho, name) is not None
    assert set(dho.__all__) <= set(dir(dho))
    with pytest.raises(AttributeError, match="no attribute 'magic'"):
        dho.magic  # noqa: B018
    assert "dho" in dho.list_methods() and "fashion_mnist" in dho.list_data_sets() and dho.list_classifiers()
