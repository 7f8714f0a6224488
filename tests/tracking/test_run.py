"""One MLflow run on a real server, of which nothing is replaced: what it holds, refuses, and how it continues."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow_process import Server, expected, history, log_steps, one_line, shorten_waits, started

from dho.config import TrackingConfig
from dho.core.errors import TrackingError
from dho.tracking.run import Tracker


@pytest.fixture(scope="module", autouse=True)  # it comes up while the test that needs no server runs
def starting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with started(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


@pytest.fixture
def server(starting: Server) -> Server:
    starting.wait()
    return starting


@pytest.fixture
def config(server: Server) -> TrackingConfig:
    return TrackingConfig(uri=server.uri, experiment="tests", system_metrics_every=1000.0)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_waits(monkeypatch)


def test_sqlite_keeps_artifacts_beside_the_database(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    folder.mkdir()
    plot = tmp_path / "plot.png"
    plot.write_bytes(b"pixels")
    with Tracker.open(TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db"), tmp_path / "spool") as tracker:
        tracker.log_metrics({"train/loss": 0.5, "bad!": 1.0, "diverged": math.nan}, 1)
        tracker.log_artifacts(plot, "plots")
    assert (folder / "mlflow.db").is_file()
    assert [path.read_bytes() for path in (folder / "mlartifacts").rglob("plot.png")] == [b"pixels"]
    assert history(tracker, "train/loss") == [(1, 0.5)] and math.isnan(history(tracker, "diverged")[0][1])
    assert tracker._client.get_run(tracker.run_id).info.status == "FINISHED"
    assert "MLFLOW_TRACKING_URI" not in os.environ and "MLFLOW_REGISTRY_URI" not in os.environ


def test_run_holds_parameters_tags_inputs_metrics_and_artifacts(config: TrackingConfig, tmp_path: Path) -> None:
    params = {"train.eta": 2.0, "data.source": None, "data.name": "", "data.class_names": ["name"] * 2000} | {
        f"p{i}": i for i in range(120)
    }
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "losses.svg").write_text("<svg/>")
    with Tracker.open(
        config, tmp_path / "spool", run_name="first", params=params, tags={"git.dirty": "false"}
    ) as tracker:
        tracker.log_input("fashion_mnist", "ab" * 32, "data/prepared", "training")
        tracker.log_input("fashion_mnist", "ab" * 32, "data/prepared", "training")
        tracker.log_metrics({"nan": math.nan, "up": math.inf, "down": -math.inf, "fine": 1.0}, 7)
        tracker.log_metrics({f"many/{i}": i for i in range(2500)}, 8)  # over MLflow's limit for one request
        tracker.log_artifacts(tmp_path / "plots", "plots")
    run = tracker._client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "first" and run.data.tags["git.dirty"] == "false"
    assert (
        run.data.params["train.eta"] == "2.0"
        and run.data.params["data.source"] == "null"
        and run.data.params["p119"] == "119"
    )
    parts = [run.data.params[key] for key in ("data.class_names", "data.class_names.2", "data.class_names.3")]
    assert json.loads("".join(parts)) == ["name"] * 2000
    (entry,) = run.inputs.dataset_inputs
    assert entry.dataset.name == "fashion_mnist" and entry.dataset.digest == "ab" * 18
    assert {tag.key: tag.value for tag in entry.tags} == {"mlflow.data.context": "training", "fingerprint": "ab" * 32}
    assert math.isnan(run.data.metrics["nan"]) and run.data.metrics["up"] > 1e308 and run.data.metrics["down"] < -1e308
    assert history(tracker, "many/2499") == [(8, 2499.0)]
    assert [file.path for file in tracker._client.list_artifacts(tracker.run_id, "plots")] == ["plots/losses.svg"]
    assert run.data.metrics["system/system_memory_usage_percentage"] > 0


def test_system_metrics_go_on(server: Server, tmp_path: Path) -> None:
    with Tracker.open(
        TrackingConfig(uri=server.uri, experiment="tests", system_metrics_every=0.5), tmp_path
    ) as tracker:
        time.sleep(2.5)
    assert len(history(tracker, "system/cpu_utilization_percentage")) >= 4
    assert max(step for step, _ in history(tracker, "system/disk_usage_percentage")) >= 2  # seconds


def test_refused_metric_does_not_hold_up_the_others(
    config: TrackingConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Tracker.open(config, tmp_path) as tracker:
        for step in range(5):
            tracker.log_metrics({"before": step, "what?": step, "after": step}, step)
    assert history(tracker, "before") == history(tracker, "after") == [(step, float(step)) for step in range(5)]
    warnings = [record.getMessage() for record in caplog.records if "refuses" in record.getMessage()]
    assert len(warnings) == 1 and "'what?'" in warnings[0]


def test_restart_continues_the_same_run(
    config: TrackingConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    params = {"train.eta": 2.0, "train.workers": 1}
    with pytest.raises(ValueError), Tracker.open(config, tmp_path, params=params) as first:
        log_steps(first, range(5))
        raise ValueError
    assert first._client.get_run(first.run_id).info.status == "FAILED"
    (tmp_path / f"{first.run_id}.sent").unlink()  # everything is sent again
    with Tracker.open(config, tmp_path, run_id=first.run_id, params=params | {"train.workers": 4, "new": 1}) as second:
        assert second.run_id == first.run_id
        assert second._client.get_run(second.run_id).info.status == "RUNNING"
        log_steps(second, range(5, 10))
    run = second._client.get_run(second.run_id)
    assert history(second, "train/loss") == expected(range(10))
    assert run.info.status == "FINISHED" and run.data.params == {"train.eta": "2.0", "train.workers": "1", "new": "1"}
    assert run.data.tags["changed.train.workers"] == "4" and "train.workers" in caplog.text


def test_forked_workers_do_no_harm(config: TrackingConfig, tmp_path: Path) -> None:
    def work() -> None:
        tracker.log_metrics({"from/worker": 1.0}, 1)
        tracker.close("FAILED")

    with Tracker.open(config, tmp_path) as tracker:
        workers = [multiprocessing.get_context("fork").Process(target=work) for _ in range(4)]
        for i, worker in enumerate(workers):
            tracker.log_metrics({"from/parent": 1.0}, i)
            worker.start()
        for worker in workers:
            worker.join(20)
        assert [worker.exitcode for worker in workers] == [0] * 4
        assert tracker._client.get_run(tracker.run_id).info.status == "RUNNING"
    assert [step for step, _ in history(tracker, "from/parent")] == [0, 1, 2, 3]
    assert history(tracker, "from/worker")[0] == (1, 1.0)


def test_deleted_run_and_experiment_are_one_clear_line(server: Server, tmp_path: Path) -> None:
    config = TrackingConfig(uri=server.uri, experiment="deleted", system_metrics_every=1000.0)
    with Tracker.open(config, tmp_path) as tracker:
        client = tracker._client
        client.delete_run(tracker.run_id)
        tracker.log_metrics({"train/loss": 0.0}, 0)
        time.sleep(0.5)
        client.restore_run(tracker.run_id)
    assert history(tracker, "train/loss") == [(0, 0.0)]
    client.delete_run(tracker.run_id)
    with pytest.raises(TrackingError) as error:
        Tracker.open(config, tmp_path, run_id=tracker.run_id)
    assert f"run {tracker.run_id} was deleted" in one_line(error)
    client.delete_experiment(client.get_experiment_by_name("deleted").experiment_id)
    with pytest.raises(TrackingError) as error:
        Tracker.open(config, tmp_path)
    assert "experiment 'deleted' was deleted" in one_line(error) and "restore" in one_line(error)
