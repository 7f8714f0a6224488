"""With `launch.target: kubernetes` in params.yaml `dvc repro` runs teach and train on the cluster, the rest here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import ROOT, USER, Cluster
from servers import Platform

STAGES = ["fetch", "prepare", "pretrain", "teach", "train", "evaluate", "register"]
NAMESPACE = "t-stages"


@pytest.fixture
def project(cluster: Cluster, platform: Platform, tiny: Any, tmp_path: Path) -> Iterator[Path]:
    """A clone of this checkout for a few small images, with the cluster's S3 server as its DVC remote."""
    cluster.make_namespace(NAMESPACE)
    cluster.make_volume(NAMESPACE, "dho-checkpoints", "10Gi", USER)
    cluster.make_secret(NAMESPACE, "dho-s3", {"credentials": platform.folder / "credentials"})
    folder = tmp_path / "clone"
    for name in subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith("tests/") and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    tree = yaml.safe_load((ROOT / "params.yaml").read_text())
    for section, values in tiny.tree.items():
        tree[section] |= values
    tree["pretrain"]["confusions"] = {"circle": {"square": 0.2}}
    tree["teacher"]["model"] = "local-dir:data/pretrained"
    tree["launch"] |= {"target": "kubernetes", "kubernetes": {"namespace": NAMESPACE}}
    (folder / "params.yaml").write_text(yaml.safe_dump(tree))
    shutil.rmtree(folder / ".dvc")
    dvc(folder, platform, "init", "--no-scm", "-q")
    dvc(folder, platform, "remote", "add", "--default", "cluster", platform.environment["DHO_REMOTE"])
    dvc(folder, platform, "remote", "modify", "cluster", "endpointurl", platform.environment["AWS_ENDPOINT_URL"])
    yield folder
    cluster.kubectl("delete", "pytorchjobs", "--all", "--cascade=foreground", check=False, namespace=NAMESPACE)
    cluster.kubectl("delete", "namespace", NAMESPACE)
    cluster.kubectl("delete", "persistentvolume", f"{NAMESPACE}-dho-checkpoints", "--ignore-not-found")


def dvc(folder: Path, platform: Platform, *arguments: str) -> str:
    environment = os.environ | platform.environment | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["dvc", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, f"dvc {' '.join(arguments)}:\n{done.stdout}"
    return done.stdout


def ran(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def test_dvc_repro_teaches_and_trains_on_the_cluster(project: Path, platform: Platform, cluster: Cluster) -> None:
    output = dvc(project, platform, "repro")
    assert ran(output) == STAGES
    jobs = cluster.kubectl("get", "pytorchjobs", "-o", "name", namespace=NAMESPACE).split()
    assert sorted(job.split("/")[1].rsplit("-", 1)[0] for job in jobs) == ["dho-teach", "dho-train"]
    for job in jobs:
        assert f"launch: {job.split('/')[1]} Succeeded after " in output, output
    committed = subprocess.run(
        ["git", "show", "HEAD:dvc.lock"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    here, there = (
        yaml.safe_load(text)["stages"]["train"]["outs"] for text in (committed, (project / "dvc.lock").read_text())
    )
    assert [out["path"] for out in there] == [out["path"] for out in here]
    assert (project / "outputs/register.json").exists()
    assert ran(dvc(project, platform, "repro")) == []
