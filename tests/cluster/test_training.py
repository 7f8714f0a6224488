"""The main job on the cluster, undisturbed and then hurt in every way: each ends Succeeded, as one run, with the same result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jobs import Job, measured, with_revision

ROOT = Path(__file__).parent.parent.parent
TRAIN = {"epochs": 1, "log_every": 20, "checkpoint_every": 30}
"""Of these jobs, but for the one that needs time for five troubles."""


@pytest.fixture(scope="session")
def revision(publish: Callable[..., str]) -> str:
    """The real prepared data and teacher store, with one epoch of training."""
    return publish(train=TRAIN)


@pytest.fixture
def start(cluster: Any, platform: Any, revision: str, request: pytest.FixtureRequest) -> Iterator[Callable[..., Job]]:
    """`start()` applies k8s/pytorchjob.yaml, `start("elastic")` an overlay, `start(of=...)` another revision.

    Checkpoints of an earlier test are gone, jobs go at the end.
    """
    jobs: list[Job] = []

    def start(overlay: str | None = None, of: str = revision) -> Job:
        documents = list(yaml.safe_load_all((ROOT / "k8s/pytorchjob.yaml").read_text())) if overlay is None else cluster.kustomize(overlay)
        name = f"t{len(jobs)}-" + request.node.name.removeprefix("test_").replace("_", "-")[:30].strip("-")
        job = Job(cluster, name, with_revision(documents, name, of), platform.mlflow)
        jobs.append(job)
        return job.apply()

    cluster.kubectl("delete", "pytorchjobs", "--all", "--wait=true")  # what an interrupted run left
    cluster.clear_checkpoints()
    yield start
    for job in jobs:
        cluster.kubectl("delete", "pytorchjob", job.name, "--wait=true", check=False)
    cluster.heal()


@pytest.fixture(scope="session")
def here(platform: Any, revision: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Test metrics of the same job on this machine."""
    return trained_here(platform, revision, tmp_path_factory.mktemp("here"))


def trained_here(platform: Any, revision: str, work: Path) -> dict[str, float]:
    """Test metrics of a revision's job on this machine: `torchrun --nproc-per-node 2`, on what `dho job pull` brings."""
    environment = os.environ | platform.environment | {"DHO_REVISION": revision, "OMP_NUM_THREADS": "1"}
    environment |= {"MLFLOW_TRACKING_URI": f"sqlite:///{work}/mlflow.db", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in (
        ["dho", "job", "pull"],
        ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "dho", "train"],
        ["dho", "evaluate"],
    ):
        subprocess.run(command, cwd=work, env=environment, check=True, timeout=500)
    metrics = json.loads((work / "outputs/evaluate/metrics.json").read_text())["test"]
    return {
        f"test/{source}/{name}": value for source, values in metrics.items() for name, value in values.items() if isinstance(value, float)
    }


def same(run: Any, here: dict[str, float]) -> None:
    assert measured(run) == pytest.approx(here, abs=1e-6)


def test_kubectl_apply_trains_on_two_nodes_and_registers_what_torchrun_makes_here(
    start: Callable[..., Job], here: dict[str, float], platform: Any, cluster: Any
) -> None:
    job = start()
    job.wait_for_step(20)
    assert job.node_of("master-0") != job.node_of("worker-0")
    for pod in job.pods():
        assert pod["spec"]["securityContext"]["runAsUser"] == 10001
    assert "Read-only file system" in cluster.kubectl(
        "exec", job.pod("master-0"), "-c", "pytorch", "--", "python", "-c", "open('/x', 'w')", check=False
    )
    assert cluster.kubectl("exec", job.pod("master-0"), "-c", "pytorch", "--", "id", "-u").strip() == "10001"
    job.wait_for_success()
    run = job.check_record()
    same(run, here)
    version = platform.mlflow.get_model_version_by_alias("dho-student", "candidate")
    # On a platform that has seen this job before, the same package is the version that it was then.
    same(platform.mlflow.get_run(version.run_id), here)
    assert float(version.tags["test/combined/top1"]) == pytest.approx(here["test/combined/top1"], abs=1e-4)


def test_a_killed_process_a_deleted_pod_the_memory_limit_a_full_volume_and_mlflow_away_one_after_the_other(
    start: Callable[..., Job], publish: Callable[..., str], platform: Any, cluster: Any, tmp_path: Path
) -> None:
    two_epochs = publish(train=TRAIN | {"epochs": 2})
    job = start(of=two_epochs)
    # That there is a later checkpoint shows each time that the job has gone on.
    job.wait_for_checkpoint(0)
    job.kill_trainers("worker-0")

    time.sleep(2)  # a checkpoint that was being written is there
    newest = cluster.newest_checkpoint()
    for _ in range(2):
        before = job.wait_for_checkpoint(newest)
        cluster.kubectl("delete", "pod", job.pod("worker-0"), "--wait=true")
        newest = cluster.newest_checkpoint()
        if newest % TRAIN["checkpoint_every"]:  # else it may be one that was due; once more
            break
    found = f"the newest checkpoint is of step {newest}, the last due one of {before}: none was made for the signal in the grace period"
    assert newest > before and newest % TRAIN["checkpoint_every"], f"{found}\n{job.story()}"

    job.wait_for_checkpoint(newest)
    # Shared memory counts for the container, and the kernel then kills its largest process: the trainer.
    cluster.overfill_memory(job.pod("worker-0"))
    job.wait_for_log("(exitcode: -9)")

    time.sleep(2)
    job.wait_for_checkpoint(cluster.newest_checkpoint())
    with platform.without("mlflow"):
        with cluster.full_checkpoint_volume():
            job.wait_for_log("no checkpoint at step")
        time.sleep(60)
    job.wait_for_success()
    same(job.check_record(epochs=2), trained_here(platform, two_epochs, tmp_path))


def test_launch_follows_although_s3_and_the_api_server_are_down_for_a_while(
    platform: Any, cluster: Any, revision: str, here: dict[str, float], tmp_path: Path
) -> None:
    started = time.time()
    cluster.clear_checkpoints()
    command = [sys.executable, "-m", "dho", "launch", "--namespace", cluster.namespace, "--name", "launched", "--revision", revision]
    with (tmp_path / "log").open("w") as log, platform.without("s3"):
        launched = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=os.environ | platform.environment)
        time.sleep(60)
    job = Job(cluster, "launched", [], platform.mlflow, started)
    job.wait_for_step(40)
    with cluster.without_api_server():
        time.sleep(30)
    assert launched.wait(timeout=400) == 0, (tmp_path / "log").read_text()
    same(job.check_record(), here)
    cluster.kubectl("delete", "pytorchjob", "launched")


@pytest.mark.nodes
def test_a_node_that_is_lost_for_good(start: Callable[..., Job], here: dict[str, float], cluster: Any) -> None:
    job = start()
    job.wait_for_step(60)
    node = job.node_of("worker-0")
    cluster.lose_node(node)
    cluster.kubectl("delete", "node", node)  # what a cloud's controller does
    job.wait_for_success()
    same(job.check_record(), here)


@pytest.mark.nodes
def test_a_node_that_is_lost_and_comes_back(start: Callable[..., Job], here: dict[str, float], cluster: Any) -> None:
    job = start()
    job.wait_for_step(60)
    node = job.node_of("worker-0")
    cluster.lose_node(node)
    cluster.start_node(node)
    job.wait_for_success()
    same(job.check_record(), here)


@pytest.mark.nodes
@pytest.mark.parametrize("replica", ["worker-1", "worker-0"], ids=["another", "the-rendezvous-host"])
def test_an_elastic_node_that_is_lost_and_comes_back(start: Callable[..., Job], cluster: Any, replica: str) -> None:
    job = start("elastic")
    job.wait_for_step(60)
    node = job.node_of(replica)
    cluster.lose_node(node)
    cluster.start_node(node)
    job.wait_for_success()
    run = job.check_record()
    # With one node for a while BatchNorm has seen other batches, so the result is alike and not the same.
    assert run.data.metrics["test/combined/top1"] > 0.5
