"""A launch or a manifest that could not run is refused, in one clear line for each thing that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dho.cluster.checks import problems
from dho.cluster.job import Document, Launch, of_kind
from dho.cluster.manifest import render
from dho.cluster.pytorchjob import PyTorchJob
from dho.core.errors import ClusterError

KIND = PyTorchJob()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"nodes": 0}, "nodes is 0; expected 1 to 1024"),
        ({"nodes": 5000}, "nodes is 5000; expected 1 to 1024"),
        ({"gpus": 0}, "gpus is 0; expected 1 to 16 per node, or leave it out to train on CPUs"),
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
        for pod in KIND.pods(documents).values():
            change(pod)

    return apply


def job(change: Callable[[Document], None]) -> Callable[[list[Document]], None]:
    return lambda documents: change(KIND.job(documents))


def environment(**values: Any) -> Callable[[list[Document]], None]:
    return lambda documents: KIND.environment(documents)["data"].update(values)


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
        "spec.pytorchReplicaSpecs.Worker.restartPolicy is Sometimes; expected one of OnFailure, Always, ExitCode, "
        "Never",
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
        "securityContext does not drop ALL capabilities",
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
        lambda documents: of_kind(documents, "PersistentVolumeClaim")["spec"].update(accessModes=["ReadWriteOnce"]),
        "PersistentVolumeClaim 'dho-checkpoints' is not ReadWriteMany; 2 nodes share it",
    ),
    "no revision": (environment(DHO_REVISION="main"), "DHO_REVISION is 'main'; expected 64 hex digits"),
    "remote on a disk": (environment(DHO_REMOTE="/srv/dvc"), "DHO_REMOTE is '/srv/dvc'; expected s3://bucket/prefix"),
    "GPUs without as many processes": (
        both(lambda p: [main(p)["resources"][key].update({"nvidia.com/gpu": "4"}) for key in ("requests", "limits")]),
        "4 GPUs for spec.nprocPerNode 1; expected one process per GPU",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_manifest_is_refused_with_a_line_that_names_what_is_wrong(name: str) -> None:
    change, expected = WRONG[name]
    documents = render(Launch())
    assert problems(documents, KIND) == []
    change(documents)
    lines = problems(documents, KIND)
    assert any(expected in line for line in lines), lines
    assert all("\n" not in line and len(line) < 300 for line in lines)
