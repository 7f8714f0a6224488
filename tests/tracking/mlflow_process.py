"""A real MLflow server that can be killed, frozen and started again, and what tests of tracking ask it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from dho.core.errors import TrackingError
from dho.tracking import run as tracking
from dho.tracking.run import Tracker


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
        # Without the job runner, which these tests do not use, the server is up in half the time.
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
        """Let it take connections and never answer."""
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Server]:
    """Start a server, which is killed at the end; it may take a while to answer."""
    server = Server(folder)
    yield server
    server.kill()


def shorten_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a tracker send at once and try again soon."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(tracking, "TICK_S", 0.1)
    monkeypatch.setattr(tracking, "MAX_PAUSE_S", 1.0)


def history(tracker: Tracker, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in tracker._client.get_metric_history(tracker.run_id, key)]


def not_given_a_cpu() -> float:
    """Return the seconds for which this thread could have run and others did; its own waiting is not in it."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def log_steps(tracker: Tracker, steps: range) -> float:
    """Log metrics at each step, 20 ms apart; return the seconds of the slowest call, but those without a CPU."""
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
