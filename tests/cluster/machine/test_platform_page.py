"""The commands of docs/platform.md are ones that a shell, kubectl and the API server take."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import ROOT, Cluster
from servers import Platform

PAGE = (ROOT / "docs/platform.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```\n", PAGE, re.MULTILINE | re.DOTALL)
ELSEWHERE = {
    "kubectl apply --server-side -k": "fetches the operator's manifests from GitHub; the cluster has the same version",
    "kubectl -n kubeflow": "the operator of the tests is no Deployment; test_manifests.py applies the patch to one",
    "dho publish": "test_platform.py",
    "dho logs": "test_launcher.py and test_training.py, as is dho stop",
    "dho stop": "",
}
# What would change the cluster is sent to the API server as a dry run; what an earlier test has made may be there
# already.
SHELL = """
set -euo pipefail
kubectl() {
  case " $* " in
    *" create "*|*" apply "*|*" label "*|*" delete "*) set -- "$@" --dry-run=server ;;
  esac
  said=$(command kubectl "$@" 2>&1) || case $said in
    *AlreadyExists*|*"already exists"*) ;;
    *) echo "kubectl $*: $said" >&2; return 1 ;;
  esac
  echo "$said"
}
"""


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_commands_of_the_platform_page_are_accepted(
    number: int, platform: Platform, cluster: Cluster, tmp_path: Path
) -> None:
    node = json.loads(cluster.kubectl("get", "nodes", "-o", "json"))["items"][0]["metadata"]["name"]
    (tmp_path / "k8s").symlink_to(ROOT / "k8s")
    lines = [line for line in BLOCKS[number].splitlines() if not line.startswith(tuple(ELSEWHERE))]
    text = "\n".join(lines).replace("delete node NAME", f"delete node {node}")
    if any("secrets/credentials" in line and "create" in line for line in lines) and "openssl" not in text:
        (tmp_path / "secrets").mkdir()
        (tmp_path / "secrets/credentials").write_text("[default]\n")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", SHELL + text], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{text}\n{done.stderr}"
    if "openssl" in text:
        identities = json.loads((tmp_path / "secrets/config.json").read_text())["identities"]
        key = identities[0]["credentials"][0]["accessKey"]
        assert f"aws_access_key_id = {key}\n" in (tmp_path / "secrets/credentials").read_text()
        assert (tmp_path / "secrets/password").stat().st_mode & 0o77 == 0
    assert platform.cluster is cluster  # the servers that the page speaks of are there


def test_every_object_of_the_manifest_is_on_the_page() -> None:
    table = PAGE[PAGE.index("## What each object is for") : PAGE.index("## What to change")]
    for name in (
        "ConfigMap `dho`",
        "ServiceAccount `dho`",
        "PersistentVolumeClaim `dho-checkpoints`",
        "NetworkPolicy `dho`",
        "PyTorchJob `dho-train`",
    ):
        assert name in table
