"""`dho launch` refuses what could not run, in one clear line each, and knows why a job does not start."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dho.cluster import reasons
from dho.cluster.checks import problems
from dho.cluster.manifest import Document, Launch, kind, render
from dho.core.errors import ClusterError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"nodes": 0}, "nodes is 0; expected 1 to 1024"),
        ({"nodes": 5000}, "nodes is 5000; expected 1 to 1024"),
        ({"gpus": 0}, "gpus is 0; expected 1 to 16 a node, or leave it out to train on CPUs"),
        ({"elastic": (4, 2), "nodes": 3}, "elastic is 4:2; expected MIN:MAX"),
        ({"elastic": (0, 2)}, "elastic is 0:2; expected MIN:MAX"),
        ({"elastic": (1, 4), "nodes": 8}, "nodes is 8; expected 1 to 4, as elastic says"),
        ({"stage": "evaluate"}, "stage is 'evaluate'; expected train or teach"),
        ({"revision": "main"}, "revision is 'main'; expected 64 hex digits"),
        ({"remote": "/srv/dvc"}, "remote is '/srv/dvc'; expected s3://bucket/prefix"),
        ({"queue": "Team A"}, "queue is 'Team A'; expected the name of a LocalQueue"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ClusterError) as caught:
        render(Launch(**options))
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def both(change: Callable[[Document], None]) -> Callable[[list[Document]], None]:
    """Do the same to both replicas' pods, as a person would who edits the manifest."""

    def apply(documents: list[Document]) -> None:
        for replica in kind(documents, "PyTorchJob")["spec"]["pytorchReplicaSpecs"].values():
            change(replica["template"]["spec"])

    return apply


def job(change: Callable[[Document], None]) -> Callable[[list[Document]], None]:
    return lambda documents: change(kind(documents, "PyTorchJob"))


def environment(**values: Any) -> Callable[[list[Document]], None]:
    return lambda documents: kind(documents, "ConfigMap")["data"].update(values)


def main(pod: Document) -> Document:
    container: Document = pod["containers"][0]
    return container


WRONG: dict[str, tuple[Callable[[list[Document]], None], str]] = {
    "unknown field": (
        job(lambda j: j["spec"].update(runPolcy={})),
        "spec.runPolcy is an unknown field; did you mean runPolicy?",
    ),
    "unknown field in a container": (
        both(lambda p: main(p).update(comand=[])),
        "comand is an unknown field; did you mean command?",
    ),
    "number for text": (
        job(lambda j: j["spec"].update(nprocPerNode=4)),
        "spec.nprocPerNode is 4; expected text in quotes",
    ),
    "text for a number": (
        job(lambda j: j["spec"]["runPolicy"].update(backoffLimit="20")),
        'backoffLimit is "20"; expected a whole number',
    ),
    "no replicas": (job(lambda j: j["spec"].pop("pytorchReplicaSpecs")), "spec has no pytorchReplicaSpecs"),
    "wrong cleanPodPolicy": (
        job(lambda j: j["spec"]["runPolicy"].update(cleanPodPolicy="Sometimes")),
        "spec.runPolicy.cleanPodPolicy is Sometimes; expected one of All, Running, None",
    ),
    "wrong restartPolicy": (
        job(lambda j: j["spec"]["pytorchReplicaSpecs"]["Worker"].update(restartPolicy="Sometimes")),
        "spec.pytorchReplicaSpecs.Worker.restartPolicy is Sometimes; expected one of OnFailure, Always, ExitCode, Never",
    ),
    "a restartPolicy that ends the job": (
        job(lambda j: j["spec"]["pytorchReplicaSpecs"]["Worker"].update(restartPolicy="Never")),
        "Worker's restartPolicy is Never; expected OnFailure",
    ),
    "wrong imagePullPolicy": (
        both(lambda p: main(p).update(imagePullPolicy="Daily")),
        "imagePullPolicy is Daily; expected one of",
    ),
    "container of another name": (
        both(lambda p: main(p).update(name="trainer")),
        "container 'trainer' is not named pytorch",
    ),
    "volume that is not mounted": (
        both(lambda p: p["volumes"].append({"name": "spare", "emptyDir": {}})),
        "volume 'spare' is defined and no container mounts it",
    ),
    "mount without a volume": (
        both(lambda p: main(p)["volumeMounts"].append({"name": "nowhere", "mountPath": "/n"})),
        "container pytorch mounts volume 'nowhere', which is not under volumes",
    ),
    "two volumes at one place": (
        both(lambda p: main(p)["volumeMounts"].append({"name": "work", "mountPath": "/tmp"})),
        "container pytorch mounts two volumes at /tmp",
    ),
    "backoffLimit too small": (
        job(lambda j: j["spec"]["runPolicy"].update(backoffLimit=3)),
        "backoffLimit is 3; expected 20 or more, since the operator adds up the restarts of all 2 pods",
    ),
    "no deadline": (
        job(lambda j: j["spec"]["runPolicy"].pop("activeDeadlineSeconds")),
        "spec.runPolicy has no activeDeadlineSeconds",
    ),
    "secret in the environment": (
        both(lambda p: main(p)["env"].append({"name": "AWS_SECRET_ACCESS_KEY", "value": "abc"})),
        "env AWS_SECRET_ACCESS_KEY has what looks like a secret as its value",
    ),
    "password in an address": (
        environment(MLFLOW_TRACKING_URI="http://me:pass@mlflow:5000"),
        "MLFLOW_TRACKING_URI looks like a secret",
    ),
    "Secret as a variable": (
        both(
            lambda p: main(p)["env"].append(
                {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "dho-s3", "key": "k"}}}
            )
        ),
        "env KEY takes a Secret into the environment",
    ),
    "no limits": (both(lambda p: main(p)["resources"]["limits"].pop("memory")), "resources.limits has no memory"),
    "request above the limit": (
        both(lambda p: main(p)["resources"]["requests"].update(memory="64Gi")),
        "it requests memory 64Gi, more than its limit 4Gi",
    ),
    "image without a tag": (
        both(lambda p: main(p).update(image="registry:5000/dho")),
        "image registry:5000/dho has no fixed tag",
    ),
    "latest image": (both(lambda p: main(p).update(image="dho:latest")), "image dho:latest has no fixed tag"),
    "two masters": (
        job(lambda j: j["spec"]["pytorchReplicaSpecs"]["Master"].update(replicas=2)),
        "Master has 2 replicas; expected 1",
    ),
    "no worker": (
        job(lambda j: j["spec"]["pytorchReplicaSpecs"]["Worker"].update(replicas=0)),
        "Worker has 0 replicas; expected 1 or more",
    ),
    "neither master nor elastic": (
        job(lambda j: j["spec"]["pytorchReplicaSpecs"].pop("Master")),
        "no Master and no elasticPolicy",
    ),
    "elastic with a master": (
        job(lambda j: j["spec"].update(elasticPolicy={"minReplicas": 1, "maxReplicas": 2})),
        "an elastic job has a Master; expected Workers only",
    ),
    "elastic bounds the wrong way round": (
        job(lambda j: j["spec"].update(elasticPolicy={"minReplicas": 4, "maxReplicas": 2})),
        "minReplicas 4 and maxReplicas 2; expected 1 <= minReplicas <= maxReplicas",
    ),
    "name with capitals": (
        job(lambda j: j["metadata"].update(name="My_Job")),
        "the job's name is 'My_Job'; expected small letters",
    ),
    "name too long": (job(lambda j: j["metadata"].update(name="a" * 60)), "has 60 characters; expected at most 50"),
    "runs as root": (both(lambda p: p["securityContext"].update(runAsUser=0)), "securityContext lets it run as root"),
    "privileges": (
        both(lambda p: main(p)["securityContext"].update(allowPrivilegeEscalation=True)),
        "allowPrivilegeEscalation is not false",
    ),
    "capabilities": (
        both(lambda p: main(p)["securityContext"].pop("capabilities")),
        "securityContext drops not ALL capabilities",
    ),
    "host network": (both(lambda p: p.update(hostNetwork=True)), "hostNetwork is true; expected false"),
    "hostPath": (
        both(
            lambda p: (
                p["volumes"][0].update({"emptyDir": None, "hostPath": {"path": "/"}}) or p["volumes"][0].pop("emptyDir")
            )
        ),
        "volume 'work' is a hostPath",
    ),
    "token": (both(lambda p: p.pop("automountServiceAccountToken")), "automountServiceAccountToken is not false"),
    "grace too short": (
        both(lambda p: p.update(terminationGracePeriodSeconds=30)),
        "terminationGracePeriodSeconds is 30; expected more than 30",
    ),
    "no toleration of a lost node": (
        both(lambda p: p["tolerations"].pop(0)),
        "no toleration of node.kubernetes.io/not-ready",
    ),
    "shared memory on disk": (
        both(lambda p: p["volumes"][3]["emptyDir"].pop("medium")),
        "container pytorch has no memory-backed /dev/shm",
    ),
    "more shared memory than memory": (
        both(lambda p: p["volumes"][3]["emptyDir"].update(sizeLimit="8Gi")),
        "/dev/shm may take 8 GiB of container pytorch's memory limit of 4 GiB",
    ),
    "no init container": (
        both(lambda p: p.pop("initContainers")),
        "no init container; expected one that runs `dho job pull`",
    ),
    "ConfigMap that is not there": (
        both(lambda p: main(p).update(envFrom=[{"configMapRef": {"name": "other"}}])),
        "it uses ConfigMap 'other', which is not among the documents",
    ),
    "volume for one node": (
        lambda documents: kind(documents, "PersistentVolumeClaim")["spec"].update(accessModes=["ReadWriteOnce"]),
        "PersistentVolumeClaim 'dho-checkpoints' is not ReadWriteMany; 2 nodes share it",
    ),
    "no revision": (environment(DHO_REVISION="main"), "DHO_REVISION is 'main'; expected 64 hex digits"),
    "remote on a disk": (environment(DHO_REMOTE="/srv/dvc"), "DHO_REMOTE is '/srv/dvc'; expected s3://bucket/prefix"),
    "GPUs without as many processes": (
        both(lambda p: [main(p)["resources"][part].update({"nvidia.com/gpu": "4"}) for part in ("requests", "limits")]),
        "4 GPUs for spec.nprocPerNode 1; expected one process a GPU",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_manifest_is_refused_with_a_line_that_names_what_is_wrong(name: str) -> None:
    change, expected = WRONG[name]
    documents = render(Launch())
    assert problems(documents) == []
    change(documents)
    lines = problems(documents)
    assert any(expected in line for line in lines), lines
    assert all("\n" not in line and len(line) < 300 for line in lines)


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
    assert kind(list(yaml.safe_load_all(done.stdout)), "ConfigMap")["data"]["DHO_REMOTE"] == "s3://ours/dvc"
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
    job = kind(list(yaml.safe_load_all(done.stdout)), "PyTorchJob")
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
    return reasons.waiting(asked, pods, events or [], lambda _pod, _container: log)


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
    found = why([pod(status, None, "worker", index) for index in range(64)], replicas=64)
    ((_, names),) = found.items()
    assert reasons.several(names) == "worker-0 and 63 more"


def test_a_pod_that_starts_is_no_trouble() -> None:
    running = {"phase": "Running", "containerStatuses": [container("pytorch", running={})]}
    pulling = {"phase": "Pending", "initContainerStatuses": [container("pull", running={})]}
    assert why([pod(running), pod(pulling, replica="worker")], replicas=2) == {}
