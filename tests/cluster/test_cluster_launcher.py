"""`dho launch` as a command, and why a job does not start."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from dho.cluster import reasons
from dho.cluster.job import Document, of_kind
from dho.cluster.pytorchjob import PyTorchJob

ROOT = Path(__file__).parents[2]


def dho(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dho", *arguments], cwd=cwd, capture_output=True, text=True, timeout=60
    )


def test_a_manifest_edited_in_the_project_is_what_is_launched_and_checked(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s", symlinks=True)
    file = tmp_path / "k8s/pytorchjob/base/pytorchjob.yaml"
    file.write_text(file.read_text().replace("s3://dho/dvc", "s3://ours/dvc"))
    done = dho("launch", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert of_kind(list(yaml.safe_load_all(done.stdout)), "ConfigMap")["data"]["DHO_REMOTE"] == "s3://ours/dvc"
    file.write_text(file.read_text().replace("cleanPodPolicy: Running", "cleanPodPolicy: Sometimes"))
    done = dho("launch", "--dry-run", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr
        == "dho: PyTorchJob: spec.runPolicy.cleanPodPolicy is Sometimes; expected one of All, Running, None\n"
    )


def test_an_installed_package_brings_the_manifests(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "wheel"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = (tmp_path / "wheel").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-m", "dho", "launch", "--nodes", "4", "--gpus", "2", "--dry-run"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    installed = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=60)
    assert installed.returncode == 0, installed.stderr
    assert installed.stdout == dho("launch", "--nodes", "4", "--gpus", "2", "--dry-run", cwd=ROOT).stdout


def test_64_nodes_of_8_gpus_are_rendered_and_checked_in_under_2_seconds() -> None:
    took = []
    for _ in range(3):
        before = os.times()
        done = dho("launch", "--nodes", "64", "--gpus", "8", "--dry-run", cwd=ROOT)
        after = os.times()
        assert done.returncode == 0, done.stderr
        # The process's own time: how long it waits for a CPU is a matter of what else runs.
        took.append(after.children_user + after.children_system - before.children_user - before.children_system)
    job = of_kind(list(yaml.safe_load_all(done.stdout)), "PyTorchJob")
    assert job["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 63
    assert job["spec"]["runPolicy"]["backoffLimit"] == 640
    assert min(took) < 2


def test_without_a_cluster_that_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    done = dho("jobs", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("dho: no cluster to talk to: ") and done.stderr.count("\n") == 1
    assert "set KUBECONFIG" in done.stderr


def test_an_api_server_that_does_not_answer_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "t", "cluster": {"server": "https://127.0.0.1:9"}}],
        "users": [{"name": "t", "user": {"token": "t"}}],
        "contexts": [{"name": "t", "context": {"cluster": "t", "user": "t"}}],
        "current-context": "t",
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    done = dho("jobs", cwd=tmp_path)
    assert done.returncode == 1
    assert (
        done.stderr.startswith("dho: the jobs: no answer from https://127.0.0.1:9 (") and done.stderr.count("\n") == 1
    )


def pod(status: dict[str, Any], node: str | None = "node-1", replica: str = "master", index: int = 0) -> Document:
    labels = {"training.kubeflow.org/replica-type": replica, "training.kubeflow.org/replica-index": str(index)}
    metadata = {"name": f"train-{replica}-{index}", "uid": f"{replica}-{index}", "namespace": "dho", "labels": labels}
    return {"metadata": metadata, "spec": {"nodeName": node} if node else {}, "status": status}


def event(about: str, reason: str, message: str) -> Document:
    return {
        "metadata": {"creationTimestamp": "2026-01-01T00:00:00Z"},
        "involvedObject": {"uid": about},
        "reason": reason,
        "message": message,
    }


def why(
    pods: list[Document], events: list[Document] | None = None, replicas: int = 1, log: str = "dho: no such revision"
) -> dict[str, list[str]]:
    asked = {
        "metadata": {"name": "train", "uid": "job"},
        "spec": {"pytorchReplicaSpecs": {"Master": {"replicas": replicas}}},
    }
    return reasons.waiting(PyTorchJob(), asked, pods, events or [], lambda _pod, _container: log)


def container(name: str, restarts: int = 0, last: dict[str, Any] | None = None, **state: Any) -> Document:
    return {"name": name, "image": "dho:1", "restartCount": restarts, "state": state, "lastState": last or {}}


# What kubelet 1.34 and the scheduler write; tests/cluster/machine makes them write it.
UNSCHEDULABLE = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}


@pytest.mark.parametrize(
    ("pods", "events", "line"),
    [
        (
            [
                pod(
                    {
                        "containerStatuses": [
                            container("pytorch", waiting={"reason": "ErrImagePull", "message": "not found"})
                        ]
                    }
                )
            ],
            [],
            "image dho:1 cannot be pulled: not found",
        ),
        (
            [
                pod(
                    {
                        "containerStatuses": [
                            container(
                                "pytorch",
                                waiting={"reason": "ImagePullBackOff", "message": 'Back-off pulling image "dho:1"'},
                            )
                        ]
                    }
                )
            ],
            [event("master-0", "Failed", 'Failed to pull image "dho:1": no such host')],
            'image dho:1 cannot be pulled: Failed to pull image "dho:1": no such host',
        ),
        (
            [
                pod(
                    {
                        "conditions": [
                            {
                                **UNSCHEDULABLE,
                                "message": "0/2 nodes are available: 2 Insufficient nvidia.com/gpu. preemption: 0/2",
                            }
                        ]
                    },
                    None,
                )
            ],
            [],
            "no node fits: 0/2 nodes are available: 2 Insufficient nvidia.com/gpu.",
        ),
        (
            [
                pod(
                    {
                        "conditions": [
                            {**UNSCHEDULABLE, "message": "0/2 nodes: pod has unbound immediate PersistentVolumeClaims."}
                        ]
                    },
                    None,
                )
            ],
            [],
            "its PersistentVolumeClaim is not bound",
        ),
        (
            [
                pod(
                    {"conditions": [{**UNSCHEDULABLE, "message": 'persistentvolumeclaim "dho-checkpoints" not found'}]},
                    None,
                )
            ],
            [],
            "PersistentVolumeClaim dho-checkpoints is missing",
        ),
        (
            [],
            [
                event(
                    "job",
                    "FailedCreatePod",
                    'Error creating: pods "train-master-0" is forbidden: exceeded quota: small, requested: cpu=1',
                )
            ],
            "no pod, for the namespace's quota: exceeded quota: small, requested: cpu=1",
        ),
        (
            [],
            [
                event(
                    "job",
                    "FailedCreatePod",
                    'Error creating: pods "x" is forbidden: violates PodSecurity "restricted:latest": privileged',
                )
            ],
            "no pod, for the namespace's PodSecurity: violates PodSecurity",
        ),
        (
            [
                pod(
                    {
                        "initContainerStatuses": [
                            container(
                                "pull", 2, {"terminated": {"exitCode": 1}}, waiting={"reason": "CrashLoopBackOff"}
                            )
                        ]
                    }
                )
            ],
            [],
            "init container pull fails (exit code 1): dho: no such revision",
        ),
        (
            [pod({"initContainerStatuses": [container("pull", waiting={"reason": "PodInitializing"})]})],
            [event("master-0", "FailedMount", 'MountVolume.SetUp failed for volume "s3" : secret "dho-s3" not found')],
            "Secret dho-s3 is missing in namespace dho",
        ),
        (
            [
                pod(
                    {
                        "initContainerStatuses": [
                            container(
                                "pull",
                                waiting={"reason": "CreateContainerConfigError", "message": 'configmap "x" not found'},
                            )
                        ]
                    }
                )
            ],
            [],
            'container pull cannot start: configmap "x" not found',
        ),
        (
            [
                pod(
                    {
                        "containerStatuses": [
                            container(
                                "pytorch",
                                3,
                                {"terminated": {"exitCode": 137, "reason": "OOMKilled"}},
                                waiting={"reason": "CrashLoopBackOff"},
                            )
                        ]
                    }
                )
            ],
            [],
            "container pytorch ends again and again (exit code 137, OOMKilled)",
        ),
    ],
)
def test_why_a_job_does_not_start_is_read_off_its_pods_and_events(
    pods: list[Document], events: list[Document], line: str
) -> None:
    (reason,) = why(pods, events)
    assert reason.startswith(line)
    assert "\n" not in reason


def test_64_pods_with_the_same_trouble_are_one_line() -> None:
    status = {"conditions": [{**UNSCHEDULABLE, "message": "0/2 nodes are available"}]}
    ((_, names),) = why([pod(status, None, "worker", index) for index in range(64)], replicas=64).items()
    assert reasons.several(names) == "worker-0 and 63 more"


def test_a_pod_that_starts_is_no_trouble() -> None:
    running = {"phase": "Running", "containerStatuses": [container("pytorch", running={})]}
    pulling = {"phase": "Pending", "initContainerStatuses": [container("pull", running={})]}
    assert why([pod(running), pod(pulling, replica="worker")], replicas=2) == {}
