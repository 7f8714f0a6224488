"""Fixtures of the tests on a real cluster; `make cluster-test` runs them (cluster.sh), `make test` does not."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import ROOT, USER, Cluster
from servers import Platform

NAMESPACE = "dho"


@dataclass(frozen=True)
class Published:
    """A revision that pods can work from, and the folder that it was published from."""

    revision: str
    folder: Path


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:Unverified HTTPS request")  # our own kubeconfig says so
    config.addinivalue_line(
        "markers",
        "nodes: needs nodes, disks or a control plane that may be broken; on a cluster that is not ours skipped",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            if not any(item.iter_markers("timeout")):
                item.add_marker(pytest.mark.timeout(1500))
            if "DHO_CLUSTER" not in os.environ and any(item.iter_markers("nodes")):
                item.add_marker(
                    pytest.mark.skip("breaks nodes, disks or the control plane, and this cluster is not ours")
                )


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    """The cluster, with namespace `dho`: PodSecurity `restricted` enforced, a volume for claim dho-checkpoints."""
    if os.environ.get("DHO_TEST_CLUSTER") != "1" or "KUBECONFIG" not in os.environ:
        pytest.exit(
            "these tests need a cluster: `make cluster-test`, or KUBECONFIG and DHO_TEST_CLUSTER=1 for one of yours",
            returncode=2,
        )
    own = os.environ.get("DHO_CLUSTER")
    made = Cluster(Path(own) if own else None, NAMESPACE)
    made.make_namespace(NAMESPACE)
    made.make_volume(NAMESPACE, "dho-checkpoints", "10Gi", USER)
    return made


@pytest.fixture(scope="session")
def platform(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """MLflow on PostgreSQL and S3, in namespace dho-platform."""
    with (tmp_path_factory.getbasetemp().parent / "platform.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # with `-n 2` only one makes the passwords, the other finds them
        made = Platform(cluster, tmp_path_factory.mktemp("credentials"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def publish(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Published]:
    """`publish(train={"epochs": 1})`: `dho publish` of this checkout's real data with some parameters changed."""
    for path in ("data/prepared", "data/teacher", ".dvc/cache"):
        if not (ROOT / path).exists():
            pytest.exit(
                f"{ROOT / path} is missing: the cluster's jobs train on the real data, run `make repro` first",
                returncode=2,
            )

    # As they are now: a `dvc repro` that is still training changes the lock, and with it the revision.
    pipeline = {name: (ROOT / name).read_text() for name in ("dvc.yaml", "dvc.lock")}

    def publish(**changes: dict[str, Any]) -> Published:
        folder = tmp_path_factory.mktemp("published")
        for name, text in pipeline.items():
            (folder / name).write_text(text)
        for name in ("data/prepared", "data/teacher"):
            shutil.copytree(ROOT / name, folder / name)
        parameters = yaml.safe_load((ROOT / "params.yaml").read_text())
        for section, settings in changes.items():
            parameters[section].update(settings)
        (folder / "params.yaml").write_text(yaml.safe_dump(parameters, sort_keys=False))
        (folder / ".dvc").mkdir()
        remote = platform.environment
        (folder / ".dvc/config").write_text(
            "[core]\n    no_scm = true\n    analytics = false\n    remote = cluster\n"
            f"[cache]\n    dir = {ROOT / '.dvc/cache'}\n['remote \"cluster\"']\n    url = {remote['DHO_REMOTE']}\n"
            f"    endpointurl = {remote['AWS_ENDPOINT_URL']}\n"
        )
        platform.wait_for_s3()
        done = subprocess.run(
            [sys.executable, "-m", "dho", "publish"],
            cwd=folder,
            env=os.environ | remote,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"dho publish: {done.stdout}{done.stderr}"
        return Published(done.stdout.split()[-1], folder)

    return publish
