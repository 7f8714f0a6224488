"""Every block of YAML on a page that says "in params.yaml" fits params.yaml, and the workflow begins with it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_folder

from dho.config import from_dict
from dho.core.workspace import Workspace

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PARAMS: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
SPLITS = {"shots": 4, "val_per_class": 5, "test_per_class": 5}


def blocks() -> list[tuple[str, str]]:
    """(page and number, YAML) of every block whose paragraph before it, or whose text, says params.yaml."""
    found = []
    for page in PAGES:
        pieces = re.split(r"```yaml\n(.*?)```", page.read_text(), flags=re.DOTALL)
        for number in range(1, len(pieces), 2):
            paragraph = pieces[number - 1].rstrip().split("\n\n")[-1]
            if "`params.yaml`" in paragraph or "params.yaml" in pieces[number]:
                found.append((f"{page.name}-{number // 2}", pieces[number]))
    return found


BLOCKS = blocks()


def merged(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A tree with the keys of another set in it, as somebody does who edits the file."""
    result = dict(tree)
    for key, value in changes.items():
        both = isinstance(value, dict) and value and isinstance(result.get(key), dict)  # {} replaces what was there
        result[key] = merged(result[key], value) if both else value
    return result


def test_the_pages_that_promise_it_have_such_blocks() -> None:
    assert {"README.md-0", "own-images.md-0"} <= {name for name, _ in BLOCKS}


@pytest.mark.parametrize(("name", "text"), BLOCKS, ids=[name for name, _ in BLOCKS])
def test_a_block_fits_params_yaml(name: str, text: str) -> None:
    del name
    from_dict(merged(PARAMS, yaml.safe_load(text)), "params.yaml")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_folder(folder, each=20, unlabelled=10)
    return folder


OWN = [(name, text) for name, text in BLOCKS if "source:" in text]


@pytest.mark.parametrize("sections", ["keys set", "sections replaced"])
@pytest.mark.parametrize(("name", "text"), OWN, ids=[name for name, _ in OWN])
def test_dvc_repro_prepare_works_with_a_block_for_ones_own_images(
    name: str, text: str, sections: str, photos: Path, tmp_path: Path
) -> None:
    changes = yaml.safe_load(text)
    if sections == "sections replaced":
        if name == "README.md-0":
            pytest.skip("the README says which keys to set")
        tree = PARAMS | changes
    else:
        tree = merged(PARAMS, changes)
    tree["data"]["source"] = str(photos)
    tree["data"]["splits"] = merged(tree["data"]["splits"], SPLITS)

    for path in ("dho", "pipelines", ".dvc", "dvc.yaml", ".dvcignore"):
        copy = shutil.copytree if (ROOT / path).is_dir() else shutil.copy2
        ignored = {"ignore": shutil.ignore_patterns("__pycache__", "tmp", "cache")} if (ROOT / path).is_dir() else {}
        copy(ROOT / path, tmp_path / path, **ignored)  # type: ignore[operator]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tree))
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["dvc", "repro", "prepare"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 labelled" in done.stdout and (Workspace(tmp_path).prepared / "index.parquet").is_file()
