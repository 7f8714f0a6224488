"""Metrics outlive a full disk, and a real MLflow server that is frozen, killed and started again."""

from __future__ import annotations

import logging
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow_process import Server, expected, history, log_steps, one_line, shorten_waits, started

from dho.config import TrackingConfig
from dho.core.errors import TrackingError
from dho.tracking.run import Tracker


@pytest.fixture(scope="module")
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


def test_metrics_wait_in_memory_while_the_disk_is_full(
    config: TrackingConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Tracker.open(config, tmp_path) as tracker:
        tracker.log_metrics({"train/loss": 1.0}, 1)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        # The kernel takes half of the next line and refuses the rest, as a disk that fills up does.
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / f"{tracker.run_id}.jsonl").stat().st_size + 20, hard))
        try:
            for step in range(2, 50):
                tracker.log_metrics({"train/loss": 1 / step}, step)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "metrics wait in memory" in caplog.text
        tracker.log_metrics({"train/loss": 0.0}, 50)
    assert [step for step, _ in history(tracker, "train/loss")] == list(range(1, 51))
    assert "lost" not in caplog.text


def test_frozen_server_delays_neither_logging_nor_the_end(
    server: Server, config: TrackingConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker.open(config, tmp_path)
    with server.frozen():
        assert log_steps(tracker, range(50)) < 0.05
        caplog.clear()
        start = time.monotonic()
        tracker.close(timeout_s=2)
        assert time.monotonic() - start < 3
    (warning,) = [record.getMessage() for record in caplog.records if "unsent" in record.getMessage()]
    assert " lines of metrics" in warning and str(tmp_path) in warning and server.uri in warning
    with Tracker.open(config, tmp_path, run_id=tracker.run_id) as stage:
        pass
    assert history(stage, "train/loss") == expected(range(50))


KILLED = """
import sys, time
from pathlib import Path
from dho.config import TrackingConfig
from dho.tracking.run import Tracker
config = TrackingConfig(uri=sys.argv[1], experiment="tests", system_metrics_every=1000.0)
tracker = Tracker.open(config, Path(sys.argv[2]))
print(tracker.run_id, flush=True)
input()
for step in range(100):
    tracker.log_metrics({"train/loss": step / 10}, step)
print("logged", flush=True)
time.sleep(100)
"""


def test_process_killed_in_an_outage_loses_nothing(server: Server, config: TrackingConfig, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, server.uri, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout
    run_id = process.stdout.readline().strip()
    with server.frozen():
        print("go", file=process.stdin, flush=True)
        assert process.stdout.readline().strip() == "logged"
        process.kill()
        process.communicate()
    with (tmp_path / f"{run_id}.jsonl").open("a") as spool:
        spool.write('{"step": 100, "timest')  # killed while it wrote
    with Tracker.open(config, tmp_path, run_id=run_id) as tracker:
        tracker.log_metrics({"train/loss": 10.0}, 100)
    assert history(tracker, "train/loss") == expected(range(101))


def test_server_killed_and_started_again_has_every_metric_once(
    server: Server,
    config: TrackingConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.WARNING)
    with Tracker.open(config, tmp_path) as tracker:
        slowest = log_steps(tracker, range(50))
        server.kill()
        slowest = max(slowest, log_steps(tracker, range(50, 150)))
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with pytest.raises(TrackingError) as error:
            tracker.log_artifacts(Path(__file__))
        assert server.uri in one_line(error)
        server.start()
        slowest = max(slowest, log_steps(tracker, range(150, 200)))
        server.wait()
    assert slowest < 0.05
    assert history(tracker, "train/loss") == expected(range(200))
    assert history(tracker, "val/combined/top1") == [(step, step / 100) for step in range(200)]
    assert tracker._client.get_run(tracker.run_id).info.status == "FINISHED"
    messages = [record.getMessage() for record in caplog.records if record.name == "dho.tracking.run"]
    assert [("wait in" in m, "is back" in m) for m in messages] in ([(True, False)], [(True, False), (False, True)])
