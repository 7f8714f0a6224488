"""The main job on the cluster, undisturbed and then hurt in every way: each succeeds, as one run, with one result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from jobs import Job, measured, with_revision

ROOT = Path(__file__).parents[3]
TRAIN = {"log_every": 20, "checkpoint_every": 30}
NARROW = {"model_args": {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128]}}
"""A quarter of the work per step: it shows that training continues. The undisturbed job trains the real student."""
EPOCHS = 2
"""Of the narrow student, so that there is time for several troubles."""


@dataclass(frozen=True)
class Revision:
    """What jobs are pinned to, and what comes of the same training on this machine."""

    name: str
    epochs: int
    here: Future[dict[str, float]]
    """Test metrics; trained while the jobs wait for something."""


@pytest.fixture(scope="module")
def trainings() -> Iterator[ThreadPoolExecutor]:
    """Runs trainings on this machine, one after the other."""
    with ThreadPoolExecutor(1) as pool:
        yield pool
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def real(publish: Callable[..., Any], trainings: ThreadPoolExecutor) -> Revision:
    """The real prepared data, teacher store and student, for an epoch."""
    made = publish(train=TRAIN | {"epochs": 1})
    return Revision(made.revision, 1, trainings.submit(trained_here, made.folder))


@pytest.fixture(scope="module")
def narrow(publish: Callable[..., Any], trainings: ThreadPoolExecutor) -> Revision:
    """The same for the narrow student."""
    made = publish(train=TRAIN | {"epochs": EPOCHS}, student=NARROW)
    return Revision(made.revision, EPOCHS, trainings.submit(trained_here, made.folder))


@pytest.fixture
def start(cluster: Any, platform: Any, request: pytest.FixtureRequest) -> Iterator[Callable[..., Job]]:
    """`start(revision)` applies k8s/pytorchjob.yaml, `start(revision, "elastic")` an overlay.

    Checkpoints of an earlier test are gone, jobs go at the end.
    """
    jobs: list[Job] = []

    def start(revision: Revision, overlay: str | None = None) -> Job:
        documents = (
            list(yaml.safe_load_all((ROOT / "k8s/pytorchjob.yaml").read_text()))
            if overlay is None
            else cluster.kustomize(overlay)
        )
        name = f"t{len(jobs)}-" + request.node.name.removeprefix("test_").replace("_", "-")[:30].strip("-")
        job = Job(cluster, name, with_revision(documents, name, revision.name), platform.mlflow)
        jobs.append(job)
        return job.apply()

    cluster.kubectl("delete", "pytorchjobs", "--all", "--wait=true")  # what an interrupted run left
    cluster.clear_checkpoints()
    cluster.heal()
    yield start
    for job in jobs:
        cluster.kubectl("delete", "pytorchjob", job.name, "--wait=true", check=False)
    cluster.heal()


def trained_here(work: Path) -> dict[str, float]:
    """Test metrics of the training that a folder was published for: 2 processes, with what CPU time the pods leave."""
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{work}/mlflow.db"}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in (["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "dho", "train"], ["dho", "evaluate"]):
        subprocess.run(["nice", "-n", "19", *command], cwd=work, env=environment, check=True, timeout=1200)
    metrics = json.loads((work / "outputs/evaluate/metrics.json").read_text())["test"]
    return {
        f"test/{source}/{name}": value
        for source, values in metrics.items()
        for name, value in values.items()
        if isinstance(value, float)
    }


def same(run: Any, revision: Revision) -> None:
    assert measured(run) == pytest.approx(revision.here.result(), abs=1e-6)


def test_launch_follows_although_s3_and_the_api_server_are_down_for_a_while(
    platform: Any, cluster: Any, real: Revision, tmp_path: Path
) -> None:
    started = time.time()
    cluster.clear_checkpoints()
    command = [
        sys.executable,
        "-m",
        "dho",
        "launch",
        "--namespace",
        cluster.namespace,
        "--name",
        "launched",
        "--revision",
        real.name,
    ]
    with (tmp_path / "log").open("w") as log, platform.without("s3"):
        launched = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=os.environ | platform.environment
        )
        time.sleep(60)
    job = Job(cluster, "launched", [], platform.mlflow, started)
    job.wait_for_step(40)
    with cluster.without_api_server():
        time.sleep(30)
    assert launched.wait(timeout=400) == 0, (tmp_path / "log").read_text()
    same(job.check_record(real.epochs), real)
    cluster.kubectl("delete", "pytorchjob", "launched")


def test_a_killed_process_a_deleted_pod_the_memory_limit_a_full_volume_and_mlflow_away_one_after_the_other(
    start: Callable[..., Job], narrow: Revision, platform: Any, cluster: Any
) -> None:
    job = start(narrow)
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
    steps = f"the newest checkpoint is of step {newest}, the last due one of {before}"
    late = f"{steps}: none was made for the signal in the grace period"
    assert newest > before and newest % TRAIN["checkpoint_every"], f"{late}\n{job.story()}"

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
    same(job.check_record(narrow.epochs), narrow)


def test_kubectl_apply_trains_on_two_nodes_and_registers_what_torchrun_makes_here(
    start: Callable[..., Job], real: Revision, platform: Any, cluster: Any
) -> None:
    job = start(real)
    job.wait_for_step(20)
    assert job.node_of("master-0") != job.node_of("worker-0"), job.story()
    for pod in job.pods():
        assert pod["spec"]["securityContext"]["runAsUser"] == 10001
    assert "Read-only file system" in cluster.kubectl(
        "exec", job.pod("master-0"), "-c", "pytorch", "--", "python", "-c", "open('/x', 'w')", check=False
    )
    assert cluster.kubectl("exec", job.pod("master-0"), "-c", "pytorch", "--", "id", "-u").strip() == "10001"
    job.wait_for_success()
    same(job.check_record(real.epochs), real)
    version = platform.mlflow.get_model_version_by_alias("dho-student", "candidate")
    # On a platform that has seen this job before, the same package is the version that it was then.
    same(platform.mlflow.get_run(version.run_id), real)
    assert float(version.tags["test/combined/top1"]) == pytest.approx(
        real.here.result()["test/combined/top1"], abs=1e-4
    )


@pytest.mark.nodes
def test_a_node_that_is_lost_and_comes_back_and_is_then_lost_for_good(
    start: Callable[..., Job], narrow: Revision, cluster: Any
) -> None:
    job = start(narrow)
    job.wait_for_checkpoint(0)
    node = job.node_of("worker-0")
    cluster.lose_node(node)
    cluster.start_node(node)
    job.wait_for_checkpoint(cluster.newest_checkpoint())
    assert job.node_of("worker-0") == node
    cluster.lose_node(node)
    cluster.kubectl("delete", "node", node)  # what a cloud's controller does
    job.wait_for_success()
    same(job.check_record(narrow.epochs), narrow)


@pytest.mark.nodes
def test_an_elastic_node_and_then_the_rendezvous_host_is_lost_and_comes_back(
    start: Callable[..., Job], narrow: Revision, cluster: Any
) -> None:
    job = start(narrow, "elastic")
    for replica in ("worker-1", "worker-0"):
        job.wait_for_checkpoint(cluster.newest_checkpoint())
        node = job.node_of(replica)
        cluster.lose_node(node)
        cluster.start_node(node)
    job.wait_for_success()
    run = job.check_record(narrow.epochs)
    # With one node for a while BatchNorm has seen other batches, so the result is alike and not the same.
    assert run.data.metrics["test/combined/top1"] == pytest.approx(narrow.here.result()["test/combined/top1"], abs=0.1)
