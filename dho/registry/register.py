"""Make the trained student a version in MLflow's model registry, for teams that have neither torch nor this repository.

    from dho.config import load
    from dho.core.workspace import Workspace
    registered = register(load("params.yaml"), Workspace())

A version is whole as soon as it can be seen: the package is built and measured here, logged to the training run,
fetched back, hashed and asked the example; only then is the version added, with all its tags in one request, and alias
`candidate` moved to it. If interrupted anywhere, running it again ends with one version. `champion` is moved by
`dho/registry/promote.py` only.
"""

from __future__ import annotations

import functools
import json
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus, Metric, Run
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from dho.config import Config
from dho.core.errors import DhoError, TrackingError
from dho.core.files import write_atomically
from dho.core.workspace import Workspace
from dho.data.index import DATASET, INDEX, Index
from dho.evaluation.metrics import COMBINED
from dho.registry import CANDIDATE
from dho.registry.evidence import (
    Evidence,
    TestSet,
    folder_bytes,
    folder_digest,
    measure_speed,
    measure_test,
    open_package,
    serving_imports,
)
from dho.registry.lease import lease
from dho.registry.lineage import gather, write_lineage
from dho.registry.model_card import ModelCard, write_card
from dho.registry.package import PackageFiles, Trained, build, check_answer, read_trained
from dho.registry.promote import print_decision, promote, recover
from dho.student.saved import StudentInfo
from dho.tracking.server import connect, one_line, tracking_uri, who

MAX_DIFFERENCE = 0.002
"""Of the test accuracy between package and training: none on a CPU, but training on a GPU rounds differently."""
MAX_SPEED_IMAGES = 64
"""Test images that speed is measured with."""


def register(config: Config, workspace: Workspace, example: bytes | None = None) -> dict[str, Any]:
    """Log the student's package to its training run, make it a model version and point alias `candidate` at it.

    Where `registry.promote` is `auto`, the version is then promoted if the rules allow it, and the decision is printed.

    Args:
        config: `tracking`, `registry`, `evaluate.ece_bins` and `data.max_pixels` are used.
        workspace: `student` and `metrics` are read, and for measurement, model card and lineage `prepared`, `teacher`,
            `plots` and `root`; `registered` is written, whole or not at all. Where `prepared` holds no data set, only
            speed is measured, which is printed; `promote` then measures the rest.
        example: bytes of an encoded image for the model's input example; None draws one.

    Returns:
        name, version (int), uri, run_id, model_id, sha256 (of the ONNX file), package_sha256. An identical package that
        is registered already gives that version.

    Raises:
        DataError: no student, no metrics, metrics that do not fit the student, an example that is not an image, or int8
            without data.
        ConfigError: the backbone cannot be exported, or not quantised.
        DhoError: the package does not answer like the student.
        TrackingError: the MLflow server cannot be reached or refuses, or does not know the student's run.
        PromotionRefused: `registry.promote` is `auto`, and champion or candidate changed while they were compared.
    """
    trained = read_trained(workspace)
    client, name, uri = connect(config.tracking), config.registry.name, tracking_uri(config.tracking)
    with one_line(uri, "cannot find the student's run"):
        run = _run_of(client, trained.info, workspace.student)

    with tempfile.TemporaryDirectory() as temporary:
        package = build(config, workspace, trained, Path(temporary), example)
        with one_line(uri, f"cannot look up or make registered model {name!r}"):
            _make_registered_model(client, name)
            version = _existing_version(client, name, package.digest)
        if version is None:
            record = measure(config, workspace, trained, package, run)
            version = publish(config, client, trained, package, record, run)
    with one_line(uri, f"cannot set alias {CANDIDATE} of {name}"):
        client.set_registered_model_alias(name, CANDIDATE, version.version)

    registered = {
        "name": name,
        "version": int(version.version),
        "uri": f"models:/{name}/{version.version}",
        "run_id": version.run_id,
        # MLflow's SQL store keeps the logged model of a version nowhere else.
        "model_id": version.source.removeprefix("models:/"),
        "sha256": package.content["onnx_sha256"],
        "package_sha256": package.digest,
    }
    write_atomically(workspace.registered, json.dumps(registered, indent=2) + "\n")
    print(f"register: models:/{name}@{CANDIDATE} is version {version.version}", flush=True)

    if config.registry.promote == "auto":
        print_decision(promote(config, workspace))
    return registered


@dataclass(frozen=True)
class VersionRecord:
    """What a version says of itself.

    Attributes:
        tags: where it comes from and how it was made.
        metrics: test metrics by their MLflow name, `test/<source>/<metric>`.
        description: the model card, shortened.
    """

    tags: dict[str, str]
    metrics: dict[str, float]
    description: str


def measure(config: Config, workspace: Workspace, trained: Trained, package: PackageFiles, run: Run) -> VersionRecord:
    """Measure the package as it will be served, and add evidence, lineage and model card to its files.

    Raises:
        DhoError: the package does not answer like its network, or is not as accurate on test as `evaluate` measured.
        DataError: the data set has no test images, or other classes.
    """
    index = Index.load(workspace.prepared) if (workspace.prepared / INDEX).is_file() else None
    float32 = config.registry.precision == "float32"
    bare = package.folder / "bare"
    with serving_imports():
        mlflow.pyfunc.save_model(str(bare), mlflow_model=Model(metadata=package.metadata), **package.options())

    evidence, images, dataset = None, [package.example], {}
    measured: dict[str, Any] = {"class_names": trained.info.class_names, "ece_bins": config.evaluate.ece_bins}
    with open_package(bare) as served:
        check_answer(served, package)
        if index is None:
            print(
                f"register: {workspace.prepared} holds no data set, so only speed is measured here; "
                "`dho promote` measures the rest",
                flush=True,
            )
        else:
            test = TestSet.of(index)
            evidence = measure_test(served, test, config.evaluate.ece_bins)
            if float32:
                _check_accuracy(evidence, trained)
            evidence.save(package.folder / "evidence" / "test.parquet", index.keys[test.rows])
            measured["test"] = {"fingerprint": test.fingerprint, "images": len(test.rows), "metrics": evidence.metrics}
            images = [index.read(int(row)) for row in test.rows[:MAX_SPEED_IMAGES]]
            dataset = json.loads((workspace.prepared / DATASET).read_text())
    measured["latency_ms"] = measure_speed(bare, images)
    write_atomically(package.folder / "evidence" / "measured.json", json.dumps(measured, indent=2) + "\n")

    tags = gather(trained.info, run, trained.alpha, trained.beta, workspace) | {"precision": config.registry.precision}
    write_lineage(package.folder / "lineage", tags, run, workspace)
    card = ModelCard(config.registry, trained, tags, evidence, dataset, measured["latency_ms"], package.network_bytes)
    description = write_card(package.folder / "model_card", card, workspace.plots)

    # What training measured is true of the network in float32 only.
    results = trained.metrics.get("test") if float32 or evidence is None else {COMBINED: evidence.metrics}
    return VersionRecord(tags, _by_mlflow_name(results or {}), description)


def publish(
    config: Config, client: MlflowClient, trained: Trained, package: PackageFiles, record: VersionRecord, run: Run
) -> Any:
    """Log the package to the training run, fetch it back to check it, and add the version with all its tags.

    Returns:
        MLflow's model version, which is READY.

    Raises:
        DhoError: the package that was fetched back does not answer like its network.
        TrackingError: the MLflow server cannot be reached or refuses.
    """
    name, uri = config.registry.name, tracking_uri(config.tracking)
    with one_line(uri, "cannot take the student's package"):
        model_id = _log(client, run, trained.info, package)
        tags = record.tags | _fetch_back(client, model_id, package)
    tags |= {"package.sha256": package.digest, "onnx.sha256": package.content["onnx_sha256"]}
    tags |= {key: f"{value:.4f}" for key, value in record.metrics.items()}
    with one_line(uri, f"cannot add a version to {name}"):
        _log_metrics(client, trained.info, model_id, record.metrics)
        return _create_version(client, name, trained.info, model_id, tags, record.description)


def _by_mlflow_name(results: dict[str, Any]) -> dict[str, float]:
    """Metrics on test as `test/<source>/<metric>`; those per class are left out, as MLflow may refuse the names."""
    return {
        f"test/{source}/{metric}": float(value)
        for source, values in results.items()
        if isinstance(values, dict)
        for metric, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _check_accuracy(evidence: Evidence, trained: Trained) -> None:
    top1 = ((trained.metrics.get("test") or {}).get(COMBINED) or {}).get("top1")
    if top1 is not None and abs(evidence.metrics["top1"] - top1) > MAX_DIFFERENCE:
        raise DhoError(
            f"the package's top-1 on test is {evidence.metrics['top1']:.4f}, evaluate measured {top1:.4f}; not "
            "registered. Was the data prepared again since? `dvc repro` brings both together"
        )


def _run_of(client: MlflowClient, info: StudentInfo, folder: Path) -> Run:
    try:
        return client.get_run(info.run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise TrackingError(
            f"{folder}: its run {info.run_id!r} is not on this MLflow server; register where it was trained, or train "
            "again"
        ) from error


def _make_registered_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _existing_version(client: MlflowClient, name: str, digest: str) -> Any:
    """The newest READY version with this package, or None."""
    versions = client.search_model_versions(f"tags.`package.sha256` = '{digest}'")
    ready = [version for version in versions if version.name == name and version.status == "READY"]
    return max(ready, key=lambda version: int(version.version), default=None)


def _log(client: MlflowClient, run: Run, info: StudentInfo, package: PackageFiles) -> str:
    """Log the package as model `student` of the training run, in that run's experiment; its id."""
    # What an interrupted registration left: a package that is whole is taken, another one goes.
    models = client.search_logged_models([run.info.experiment_id], f"tags.`package.sha256` = '{package.digest}'")
    for model in models:
        if model.source_run_id == info.run_id and not client.search_model_versions(
            f"source_path = 'models:/{model.model_id}'"
        ):
            if model.status == LoggedModelStatus.READY:
                return str(model.model_id)
            client.delete_logged_model(model.model_id)
    # Not mlflow.pyfunc.log_model, which takes the run from mlflow.start_run: that would set a finished run to running
    # and move its end. Model.log takes the run's id, but by itself puts the model into whichever experiment is active.
    tags = {"package.sha256": package.digest}
    model = client.create_logged_model(run.info.experiment_id, "student", info.run_id, tags, run.data.params)
    with serving_imports():
        Model.log(
            artifact_path=None,
            name="student",
            flavor=mlflow.pyfunc,
            run_id=info.run_id,
            model_id=model.model_id,
            step=info.steps,
            metadata=package.metadata,
            **package.options(),
        )
    return str(model.model_id)


def _fetch_back(client: MlflowClient, model_id: str, package: PackageFiles) -> dict[str, str]:
    """Download the package as downstream would, check that it answers, and return the tags that its content decides."""
    folder = package.folder / "fetched"
    mlflow.artifacts.download_artifacts(f"models:/{model_id}", dst_path=str(folder), tracking_uri=client.tracking_uri)
    # Before it is loaded, which leaves compiled code in it.
    tags = {"artifact.sha256": folder_digest(folder), "artifact.bytes": str(folder_bytes(folder))}
    measured = json.loads((folder / "artifacts/evidence/measured.json").read_text())
    with open_package(folder) as served:
        check_answer(served, package)
    tags |= {f"latency_ms/{key}": f"{value:.3f}" for key, value in measured["latency_ms"].items()}
    if "test" in measured:
        tags |= {"fingerprint.test": measured["test"]["fingerprint"]}
    return tags


def _log_metrics(client: MlflowClient, info: StudentInfo, model_id: str, test: dict[str, float]) -> None:
    """Show the test metrics on the logged model. What the run has already is linked, not logged a second time."""
    metrics = []
    for key, value in test.items():
        same = [point for point in client.get_metric_history(info.run_id, key) if point.value == value]
        moment, step = (same[-1].timestamp, same[-1].step) if same else (int(time.time() * 1000), info.steps)
        metrics.append(Metric(key, value, moment, step, model_id=model_id, run_id=info.run_id))
    if metrics:
        client.log_batch(info.run_id, metrics=metrics)


def _create_version(
    client: MlflowClient, name: str, info: StudentInfo, model_id: str, tags: dict[str, str], description: str
) -> Any:
    """Add the version and wait for it.

    Its tags go in the same request: a version without `package.sha256` would be added a second time.
    """
    digest = tags["package.sha256"]
    with lease(client, name, f"register package {digest[:12]}", who(), functools.partial(recover, client, name)):
        existing = _existing_version(client, name, digest)  # of a second registration of the same package, meanwhile
        if existing is not None:
            client.delete_logged_model(model_id)
            return existing
        version = client.create_model_version(
            name, f"models:/{model_id}", run_id=info.run_id, tags=tags, description=description, model_id=model_id
        )
    version = client.get_model_version(name, version.version)
    if version.status != "READY":
        raise TrackingError(
            f"version {version.version} of {name} is {version.status}, not READY; alias {CANDIDATE} is left where it "
            "was"
        )
    return version
