"""Record where a version comes from, as its tags and as files in its package, and how to make it again.

dho lineage models:/dho-student@champion
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dho.config import TrackingConfig
from dho.core.errors import DataError
from dho.core.files import sha256_file, write_atomically
from dho.core.workspace import FOLDERS, Workspace
from dho.tracking.server import connect, one_line, tracking_uri

if TYPE_CHECKING:
    from mlflow.entities import Run

    from dho.student.saved import StudentInfo

SEEDS = ("train.seed", "data.splits.seed", "views.seed", "pretrain.seed")
RECIPE = (
    "train.method_args",
    "train.epochs",
    "train.batch_labelled",
    "train.batch_unlabelled",
    "train.lambda_ce",
    "train.eta",
    "train.learning_rate",
    "train.weight_decay",
    "student.model",
    "student.input_size",
    "data.splits.shots",
    "data.splits.labelled_fraction",
    "views.count",
)
TEACHER = ("teacher.model", "teacher.pretrained", "teacher.classifier")
KEPT = ("params.yaml", "dvc.yaml", "dvc.lock")
"""Files of the repository that travel in the package."""


def gather(info: StudentInfo, run: Run, alpha: float, beta: float, workspace: Workspace) -> dict[str, str]:
    """Gather what made a student, by the name of its tag: commit, data, teacher, seeds, recipe, machine, software.

    Args:
        info, run: the student's and its training's.
        alpha, beta: as tuned.
        workspace: `dvc.lock` and the meta of the teacher store are read, where they are there.
    """
    # It brings torch, which nobody needs who only reads what made a version.
    from dho.teacher.store import read_meta

    params, tags = run.data.params, run.data.tags
    facts = {
        "method": info.method,
        "heads": ",".join(info.heads),
        "alpha": f"{alpha:g}",
        "beta": f"{beta:g}",
        "steps": str(info.steps),
    }
    for new, old in (("git.commit", "mlflow.source.git.commit"), ("git.dirty", "git.dirty"), ("hardware", "hardware")):
        if old in tags:
            facts[new] = tags[old]
    facts |= {key: value for key, value in tags.items() if key.startswith("version.")}
    facts |= {f"fingerprint.{name}": value for name, value in info.fingerprints.items()}
    facts |= {key: params[key] for key in (*SEEDS, *RECIPE, *TEACHER) if key in params}

    meta = read_meta(workspace.teacher)
    if meta is not None and "weights_sha256" in meta["teacher"]:
        facts["teacher.weights_sha256"] = meta["teacher"]["weights_sha256"]
    if (lock := workspace.root / "dvc.lock").is_file():
        facts["dvc.lock.sha256"] = sha256_file(lock)
        facts |= {f"dvc.{path}": md5 for path, md5 in _revisions(lock).items()}
    return facts


def _revisions(lock: Path) -> dict[str, str]:
    """DVC's hash of every output named in a `dvc.lock`."""
    stages = (yaml.safe_load(lock.read_text()) or {}).get("stages", {})
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", []) if "md5" in out}


def write_lineage(folder: Path, facts: dict[str, str], run: Run, workspace: Workspace) -> None:
    """Write `lineage.json` (facts and every parameter of the training) and copies of the files `dvc repro` needs."""
    write_atomically(
        folder / "lineage.json",
        json.dumps({"facts": facts, "params": run.data.params}, indent=2, sort_keys=True) + "\n",
    )
    for name in KEPT:
        if (file := workspace.root / name).is_file():
            shutil.copyfile(file, folder / name)


def resolve(config: TrackingConfig, uri: str) -> tuple[Any, Any]:
    """Return the client, and the version that `models:/<name>@<alias>` or `models:/<name>/<version>` names.

    Raises:
        DataError: the address has another form.
        TrackingError: MLflow cannot be reached, or has no such version.
    """
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", uri)
    if match is None:
        raise DataError(f"{uri!r} is not a model's address; expected models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, number = match.groups()
    client = connect(config)
    with one_line(tracking_uri(config), f"has no {uri}", "`dho registry` lists what there is"):
        return client, client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(
            name, number
        )


def lineage(config: TrackingConfig, uri: str) -> tuple[dict[str, str], list[str]]:
    """Return what made a version, and the commands that make it again; raises as `resolve`."""
    _, version = resolve(config, uri)
    facts = {
        "model": version.name,
        "version": str(version.version),
        "run_id": version.run_id or "",
        **dict(sorted(version.tags.items())),
    }
    return facts, commands(version.name, str(version.version), version.tags)


def commands(name: str, version: str, tags: dict[str, str]) -> list[str]:
    """Return the shell lines that make a version again in a clone; lines with # say what they cannot restore."""
    lines = []
    commit = tags.get("git.commit")
    lines.append(f"git checkout {shlex.quote(commit)}" if commit else "# no commit is known: the code may differ")
    if tags.get("git.dirty") == "true":
        lines.append("# the working tree differed from this commit: the code may differ")
    lines.append(f"mlflow artifacts download -u models:/{name}/{version} -d version-{version}")
    lines.append(f"cp version-{version}/artifacts/lineage/params.yaml version-{version}/artifacts/lineage/dvc.lock .")
    if f"dvc.{FOLDERS['prepared']}" in tags:
        lines.append(f"dvc pull {FOLDERS['prepared']} {FOLDERS['teacher']} || dvc repro teach")
    lines.append("dvc repro register")
    return lines
