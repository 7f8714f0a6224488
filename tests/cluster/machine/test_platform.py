"""The servers of k8s/platform: they come up from an empty cluster, and a revision can be published to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from servers import NAMESPACE, Platform


def test_the_platform_answers_and_keeps_its_runs_when_mlflow_restarts(platform: Platform) -> None:
    run = platform.mlflow.create_run(platform.mlflow.create_experiment("restart"))
    platform.mlflow.log_text(run.info.run_id, "kept", "note.txt")
    with platform.without("mlflow"):
        pass
    assert platform.mlflow.get_run(run.info.run_id).info.run_id == run.info.run_id
    assert [file.path for file in platform.mlflow.list_artifacts(run.info.run_id)] == ["note.txt"]
    platform.mlflow.delete_experiment(run.info.experiment_id)


def test_every_pod_of_the_platform_is_locked_down(platform: Platform) -> None:
    pods = platform.cluster.pods("app.kubernetes.io/part-of=dho", namespace=NAMESPACE)
    assert len(pods) == 3
    for pod in pods:
        for container in pod["spec"]["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"], pod["metadata"]["name"]


def test_a_revision_is_published_once(publish: Callable[..., Any]) -> None:
    revision = publish(train={"epochs": 1}).revision
    assert len(revision) == 64
    assert publish(train={"epochs": 1}).revision == revision
    assert publish(train={"epochs": 2}).revision != revision
