"""Tracking against a real MLflow server that is killed, frozen and started again; nothing of MLflow is replaced."""

from __future__ import annotations

import contextlib
import http.server
import json
import logging
import math
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from dho.config import TrackingConfig
from dho.core.errors import TrackingError
from dho.core.files import sha256_file
from dho.tracking import run as tracking
from dho.tracking import server as mlflow_server
from dho.tracking.provenance import provenance_tags
from dho.tracking.run import Tracker
from dho.tracking.server import connect, tracking_uri


class Server:
    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.uri, self.folder = f"http://127.0.0.1:{self.port}", folder
        self.start()

    def start(self) -> None:
        address = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        stores = [
            "--backend-store-uri",
            f"sqlite:///{self.folder}/server.db",
            "--artifacts-destination",
            str(self.folder / "artifacts"),
        ]
        # Without the job runner, of which these tests use nothing, the server is up in half the time.
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            command = [sys.executable, "-m", "mlflow", "server", *address, *stores]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def wait(self) -> None:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                return
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            time.sleep(0.1)
        raise AssertionError("the MLflow server did not start")

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """It takes connections and never answers."""
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)


@pytest.fixture(scope="module", autouse=True)  # it comes up while the tests that need no server run
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.kill()


@pytest.fixture
def server(started: Server) -> Server:
    started.wait()
    return started


@pytest.fixture
def config(server: Server) -> TrackingConfig:
    return TrackingConfig(uri=server.uri, experiment="tests", system_metrics_every=1000.0)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(tracking, "TICK_S", 0.1)
    monkeypatch.setattr(tracking, "LONGEST_PAUSE_S", 1.0)


def history(tracker: Tracker, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in tracker._client.get_metric_history(tracker.run_id, key)]


def not_given_a_cpu() -> float:
    """Seconds for which this thread could have run and others did; what it waits for, a lock or an answer, is not in it."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def log_steps(tracker: Tracker, steps: range) -> float:
    """Log one metric at each step, 20 ms apart; returns the seconds of the slowest call, without those in which it was not given a CPU."""
    slowest = 0.0
    for step in steps:
        start = time.perf_counter() - not_given_a_cpu()
        tracker.log_metrics({"train/loss": step / 10, "val/combined/top1": step / 100}, step)
        slowest = max(slowest, time.perf_counter() - not_given_a_cpu() - start)
        time.sleep(0.02)
    return slowest


def expected(steps: range) -> list[tuple[int, float]]:
    return [(step, step / 10) for step in steps]


def one_line(error: pytest.ExceptionInfo[TrackingError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_server_down_at_the_start_is_one_clear_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start = time.monotonic()
    with pytest.raises(TrackingError) as error:
        Tracker.open(TrackingConfig(uri=f"http://127.0.0.1:{port}"), tmp_path)
    assert time.monotonic() - start < 15
    assert all(part in one_line(error) for part in (f"http://127.0.0.1:{port}", "refused", "MLFLOW_TRACKING_URI"))


def test_server_that_never_answers_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_server, "REQUEST_S", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(TrackingError) as error:
        Tracker.open(TrackingConfig(uri=f"http://127.0.0.1:{silent.getsockname()[1]}"), tmp_path)
    assert "timed out" in one_line(error)


def test_wrong_credentials_are_one_clear_line_without_the_password(tmp_path: Path) -> None:
    class Guard(http.server.BaseHTTPRequestHandler):  # what stands in front of MLflow in most places
        def do_POST(self) -> None:
            self.send_error(401)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Guard) as guard:
        threading.Thread(target=guard.serve_forever, daemon=True).start()
        with pytest.raises(TrackingError) as error:
            Tracker.open(TrackingConfig(uri=f"http://me:secret@127.0.0.1:{guard.server_port}"), tmp_path)
        guard.shutdown()
    text = one_line(error)
    assert "credentials" in text and "MLFLOW_TRACKING_PASSWORD" in text and "secret" not in text


def test_unusable_database_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(TrackingError) as error:
        Tracker.open(TrackingConfig(uri=f"sqlite:///{tmp_path}/missing/mlflow.db"), tmp_path)
    assert "unable to open database file" in one_line(error)


def test_environment_wins_over_params(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking_uri(TrackingConfig(uri="sqlite:///here.db")) == "sqlite:///here.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    assert tracking_uri(TrackingConfig(uri="sqlite:///here.db")) == "http://elsewhere:5000"


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


def test_two_servers_in_one_process_are_not_mixed_up(tmp_path: Path) -> None:
    for name in ("one", "two"):
        connect(TrackingConfig(uri=f"sqlite:///{tmp_path}/{name}.db")).create_registered_model(f"model-{name}")
    for name in ("one", "two"):
        models = connect(TrackingConfig(uri=f"sqlite:///{tmp_path}/{name}.db")).search_registered_models()
        assert [model.name for model in models] == [f"model-{name}"]


def test_sources_are_tagged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    assert "mlflow.source.git.commit" not in provenance_tags(tmp_path) and "no git commit" in caplog.text
    monkeypatch.setenv("GIT_COMMIT", "abc")
    tags = provenance_tags(tmp_path)
    assert tags["mlflow.source.git.commit"] == "abc" and "git.dirty" not in tags

    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    (tmp_path / "dvc.lock").write_text("stages: {}\n")
    tags = provenance_tags(tmp_path)
    assert len(tags["mlflow.source.git.commit"]) == 40 and tags["git.dirty"] == "false"
    assert tags["dvc.lock.sha256"] == sha256_file(tmp_path / "dvc.lock")
    assert tags["hardware"] and tags["version.torch"] and tags["version.dho"]
    (tmp_path / "new.py").touch()
    assert provenance_tags(tmp_path)["git.dirty"] == "true"


def test_telemetry_is_off() -> None:
    # In a process of its own: MLflow also turns it off where it sees pytest or CI.
    code = (
        "import dho.tracking.run; from mlflow.telemetry import get_telemetry_client as client; assert client() is None"
    )
    keep = {key: os.environ[key] for key in ("PATH", "HOME", "PYTHONPATH") if key in os.environ}
    subprocess.run([sys.executable, "-c", code], env=keep, check=True)


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
tracker = Tracker.open(TrackingConfig(uri=sys.argv[1], experiment="tests", system_metrics_every=1000.0), Path(sys.argv[2]))
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
