"""k8s/: every document is one that Kubernetes knows, every overlay fits its base, every pod is locked down."""

from __future__ import annotations

import difflib
import itertools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from dho.cluster.checks import problems, quantity
from dho.cluster.job import Launch, containers
from dho.cluster.manifest import kustomized, render, to_yaml
from dho.cluster.pytorchjob import PyTorchJob

ROOT = Path(__file__).parents[2]
KIND = PyTorchJob()
KUBERNETES = "1.34"
OVERLAYS = sorted(path.name for path in (ROOT / "k8s/pytorchjob/overlays").iterdir())
FILES = sorted(
    path
    for path in (ROOT / "k8s").rglob("*.yaml")
    if path.parent.name in ("base", "platform") and path.name != "kustomization.yaml"
)
LAUNCHES = [
    Launch(nodes=nodes, gpus=gpus, elastic=elastic, queue=queue, stage=stage)
    for nodes, gpus, elastic, queue, stage in itertools.product(
        (1, 2, 64), (None, 1, 8), (None, (1, 64)), (None, "team"), ("train", "teach")
    )
]

GOLDEN = {
    "train": Launch(),
    "teach": Launch(stage="teach"),
    "gpu": Launch(gpus=8),
    "elastic-gpu": Launch(gpus=1, elastic=(1, 64)),
    "kueue": Launch(nodes=1, queue="team"),
    "named": Launch(name="mine", revision="a" * 64, remote="s3://elsewhere/dvc", image="r/x:1"),
    "64x8-elastic-kueue-teach": Launch(nodes=64, gpus=8, elastic=(1, 64), queue="team", stage="teach"),
}
"""File of golden/ -> the launch whose manifests it holds, as `to_yaml(render(launch))` wrote them."""


def pod_templates(document: dict[str, Any]) -> list[dict[str, Any]]:
    if document["kind"] == "PyTorchJob":
        return [replica["template"] for replica in document["spec"]["pytorchReplicaSpecs"].values()]
    return [document["spec"]["template"]] if "template" in document.get("spec", {}) else []


def validate(document: dict[str, Any]) -> None:
    """Against Kubernetes' own schemas, unknown fields refused; of a PyTorchJob its pods."""
    if document["kind"] != "PyTorchJob":
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    for template in pod_templates(document):
        metadata = {"name": "pod", **template["metadata"]}
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}, KUBERNETES, strict=True
        )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_document_is_one_that_kubernetes_knows(path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        validate(document)


@pytest.mark.parametrize(
    "launch", LAUNCHES, ids=lambda launch: "-".join([*launch.overlays(), str(launch.nodes), str(launch.gpus)])
)
def test_every_launch_keeps_every_rule_and_survives_yaml(launch: Launch) -> None:
    documents = render(launch)
    assert problems(documents, KIND) == []
    assert list(yaml.safe_load_all(to_yaml(documents))) == documents


@pytest.mark.parametrize("name", GOLDEN)
def test_manifests_are_those_of_before_to_the_last_byte(name: str) -> None:
    expected = (Path(__file__).parent / f"golden/{name}.yaml").read_text()
    rendered = to_yaml(render(GOLDEN[name]))
    difference = difflib.unified_diff(expected.splitlines(), rendered.splitlines(), name, "rendered now", n=1)
    assert rendered == expected, "\n".join(difference)


def test_every_golden_file_is_compared() -> None:
    assert sorted(path.stem for path in (Path(__file__).parent / "golden").iterdir()) == sorted(GOLDEN)


@pytest.mark.parametrize(
    "launch",
    [Launch(), Launch(gpus=8, queue="team"), Launch(gpus=1, elastic=(1, 4)), Launch(stage="teach")],
    ids=lambda launch: launch.overlays()[-1],
)
def test_pods_of_a_launch_are_pods_that_kubernetes_knows(launch: Launch) -> None:
    job = KIND.job(render(launch))
    *_, template = pod_templates(job)
    validate({**job, "spec": {"pytorchReplicaSpecs": {"one": {"template": template}}}})


def test_the_file_alone_is_complete_and_is_the_base() -> None:
    alone = ROOT / "k8s/pytorchjob.yaml"
    assert alone.resolve() == ROOT / "k8s/pytorchjob/base/pytorchjob.yaml"
    documents = list(yaml.safe_load_all(alone.read_text()))
    assert [document["kind"] for document in documents] == [
        "ConfigMap",
        "ServiceAccount",
        "PersistentVolumeClaim",
        "NetworkPolicy",
        "PyTorchJob",
    ]
    assert problems(documents, KIND) == []


def platform_pods() -> list[tuple[str, dict[str, Any]]]:
    documents = [d for path in FILES if path.parent.name == "platform" for d in yaml.safe_load_all(path.read_text())]
    return [(d["metadata"]["name"], template["spec"]) for d in documents for template in pod_templates(d)]


@pytest.mark.parametrize(("name", "pod"), platform_pods(), ids=lambda value: value if isinstance(value, str) else "")
def test_the_platforms_pods_are_locked_down_as_well(name: str, pod: dict[str, Any]) -> None:
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in containers(pod):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert ":" in container["image"].rsplit("/", 1)[1] and not container["image"].endswith(":latest")
        for key in ("requests", "limits"):
            assert set(container["resources"][key]) == {"cpu", "memory"}
    for container in pod["containers"]:
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container), name


def test_no_secret_is_in_any_file() -> None:
    for path in (ROOT / "k8s").rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert "kind: Secret" not in text, path
            assert "secretKeyRef" not in text, path


def test_pods_of_a_lost_node_are_given_up_within_a_minute_and_checkpoints_fit_into_the_grace_period() -> None:
    for pod in KIND.pods(render(Launch())).values():
        lost = {toleration["key"]: toleration.get("tolerationSeconds") for toleration in pod["tolerations"]}
        assert lost == {"node.kubernetes.io/not-ready": 30, "node.kubernetes.io/unreachable": 30}
        assert pod["terminationGracePeriodSeconds"] == 60


def test_gpus_bring_their_share_of_processors_memory_and_shared_memory() -> None:
    pods = {}
    for gpus in (1, 3, 8):
        documents = render(Launch(gpus=gpus))
        assert KIND.job(documents)["spec"]["nprocPerNode"] == str(gpus)
        pods[gpus] = KIND.pods(documents)["Worker"]
    for gpus, pod in pods.items():
        resources = pod["containers"][0]["resources"]
        assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] == str(gpus)
        for key in ("requests", "limits"):
            for name in ("cpu", "memory"):
                one = quantity(pods[1]["containers"][0]["resources"][key][name])
                assert quantity(resources[key][name]) == one * gpus
        (shm,) = [volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if volume["name"] == "shm"]
        assert quantity(shm) == gpus * 8 * 2**30


@pytest.mark.parametrize(
    ("nodes", "elastic", "limit"), [(1, None, 10), (2, None, 20), (64, None, 640), (2, (1, 4), 40)]
)
def test_the_backoff_limit_grows_with_the_replicas(nodes: int, elastic: tuple[int, int] | None, limit: int) -> None:
    job = KIND.job(render(Launch(nodes=nodes, elastic=elastic)))
    assert job["spec"]["runPolicy"]["backoffLimit"] == limit


def test_a_named_launch_has_a_configmap_of_its_own() -> None:
    documents = render(Launch(name="mine", revision="a" * 64, remote="s3://elsewhere/dvc"))
    environment = KIND.environment(documents)
    assert environment["metadata"]["name"] == "mine"
    assert (environment["data"]["DHO_REVISION"], environment["data"]["DHO_REMOTE"]) == ("a" * 64, "s3://elsewhere/dvc")
    for pod in KIND.pods(documents).values():
        assert {source["configMapRef"]["name"] for container in containers(pod) for source in container["envFrom"]} == {
            "mine"
        }


def kubectl() -> str | None:
    """The one of KUBECTL, of the path, or of the cluster that tests/cluster/machine has built."""
    built = sorted((Path.home() / ".cache/dho-cluster").glob("programs/*/bin/kubectl"))
    return os.environ.get("KUBECTL") or shutil.which("kubectl") or (str(built[0]) if built else None)


@pytest.mark.skipif(kubectl() is None, reason="no kubectl here; tests/cluster/machine has one")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_dho_launch_renders_what_kustomize_renders(overlay: str) -> None:
    done = subprocess.run(
        [str(kubectl()), "kustomize", str(ROOT / "k8s/pytorchjob/overlays" / overlay)],
        check=True,
        capture_output=True,
        text=True,
    )
    theirs = {(d["kind"], d["metadata"]["name"]): d for d in yaml.safe_load_all(done.stdout)}
    assert {(d["kind"], d["metadata"]["name"]): d for d in kustomized(KIND, [overlay])} == theirs
    launch = {"cpu": Launch(), "gpu": Launch(gpus=8)}.get(overlay)  # the numbers of the overlay itself
    if launch is not None:
        assert {(d["kind"], d["metadata"]["name"]): d for d in render(launch)} == theirs


def test_every_overlay_is_one_that_dho_launch_can_choose() -> None:
    chosen = {overlay for launch in LAUNCHES for overlay in launch.overlays()}
    assert sorted(chosen) == OVERLAYS
