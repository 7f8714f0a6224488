"""Everything under k8s/ is accepted by a real API server, strictly; pods run under PodSecurity `restricted`."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator

import pytest
import yaml
from cluster import ROOT, Cluster

from dho.cluster import schema
from dho.cluster.job import Launch, of_kind
from dho.cluster.manifest import render
from dho.cluster.pytorchjob import PyTorchJob

STRICT = ("--dry-run=server", "--validate=strict")
OVERLAYS = sorted(path.name for path in (ROOT / "k8s/pytorchjob/overlays").iterdir())


def test_the_file_alone_is_accepted(cluster: Cluster) -> None:
    said = cluster.kubectl("apply", "-f", str(ROOT / "k8s/pytorchjob.yaml"), *STRICT).splitlines()
    assert len(said) == 5 and all("(server dry run)" in line for line in said), said


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_is_accepted(cluster: Cluster, overlay: str) -> None:
    said = cluster.kubectl("apply", "-k", str(ROOT / "k8s/pytorchjob/overlays" / overlay), *STRICT).splitlines()
    assert len(said) == 5 and all("(server dry run)" in line for line in said), said


def test_the_platform_is_accepted(cluster: Cluster) -> None:
    cluster.make_namespace("dho-platform")
    said = cluster.kubectl("apply", "-k", str(ROOT / "k8s/platform"), *STRICT, namespace="dho-platform").splitlines()
    assert len(said) == 10 and all("(server dry run)" in line for line in said), said


@pytest.mark.parametrize(
    "launch",
    [
        Launch(nodes=64, gpus=8, queue="team"),
        Launch(gpus=1, elastic=(1, 4), stage="teach"),
        Launch(nodes=1, name="alone"),
    ],
    ids=lambda launch: "-".join(launch.overlays()),
)
def test_what_dho_launch_renders_is_accepted(cluster: Cluster, launch: Launch) -> None:
    assert cluster.apply(render(launch), *STRICT).count("(server dry run)") == 5


def test_a_document_that_is_wrong_is_not(cluster: Cluster) -> None:
    documents = render(Launch())
    documents[-1]["spec"]["runPolicy"]["backofLimit"] = 3
    with pytest.raises(AssertionError, match=r"unknown field .*backofLimit"):
        cluster.apply(documents, *STRICT)


@pytest.fixture(scope="module")
def restricted(cluster: Cluster) -> Iterator[str]:
    """A namespace that no job of another test is in."""
    cluster.make_namespace("t-pods")
    yield "t-pods"
    cluster.kubectl("delete", "namespace", "t-pods", "--wait=false")


@pytest.mark.parametrize("role", ["Master", "Worker"])
def test_pods_are_ones_that_podsecurity_restricted_admits(cluster: Cluster, restricted: str, role: str) -> None:
    """A PyTorchJob is admitted whatever its pods are; test_training.py runs them with what the operator adds."""
    template = render(Launch(gpus=8))[-1]["spec"]["pytorchReplicaSpecs"][role]["template"]
    metadata = {**template["metadata"], "name": f"check-{role.lower()}"}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
    cluster.apply([of_kind(render(Launch()), "ServiceAccount")], namespace=restricted)
    said = cluster.apply([pod], *STRICT, namespace=restricted)
    assert said == f"pod/check-{role.lower()} created (server dry run)\n"
    template["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    with pytest.raises(AssertionError, match='violates PodSecurity "restricted'):
        cluster.apply([pod], *STRICT, namespace=restricted)


def test_the_schema_that_dho_launch_checks_with_is_the_operators_own(cluster: Cluster) -> None:
    if cluster.own is None:
        pytest.skip("the operator's files are not at hand on this cluster")
    crd = yaml.load((cluster.own / "programs/manifests/kubeflow.org_pytorchjobs.yaml").read_text(), yaml.CSafeLoader)
    assert json.loads(gzip.decompress(PyTorchJob.schema.read_bytes())) == schema.schema_of_crd(crd)


def test_the_patch_of_the_operator_fits_its_deployment(cluster: Cluster) -> None:
    """As docs/platform.md tells: the init container that the operator adds has to be one that `restricted` admits."""
    cluster.make_namespace("t-operator")  # never the operator's own, which may be in use
    container = {
        "name": "training-operator",
        "image": "kubeflow/training-operator:v1.9.4",
        "volumeMounts": [{"name": "cert", "mountPath": "/tmp"}],
    }
    pod = {
        "metadata": {"labels": {"a": "b"}},
        "spec": {"containers": [container], "volumes": [{"name": "cert", "emptyDir": {}}]},
    }
    spec = {"replicas": 0, "selector": {"matchLabels": {"a": "b"}}, "template": pod}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "training-operator"},
        "spec": spec,
    }
    cluster.apply([deployment], namespace="t-operator")
    folder = ROOT / "k8s/platform/operator"
    try:
        patch = ("patch", "deployment", "training-operator", "--patch-file", str(folder / "deployment-patch.yaml"))
        cluster.kubectl(*patch, namespace="t-operator")
        patched = cluster.get("deployment", "training-operator", namespace="t-operator")["spec"]["template"]["spec"]
    finally:
        cluster.kubectl("delete", "namespace", "t-operator", "--wait=false")
    assert {mount["mountPath"] for mount in patched["containers"][0]["volumeMounts"]} == {"/tmp", "/etc/config"}
    assert {volume["name"] for volume in patched["volumes"]} == {"cert", "init-container"}
