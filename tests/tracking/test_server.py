"""Which MLflow server, what is wrong with it in one line, and what a run says of where it comes from."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from mlflow_process import one_line

from dho.config import TrackingConfig
from dho.core.errors import TrackingError
from dho.core.files import sha256_file
from dho.tracking import server as mlflow_server
from dho.tracking.provenance import provenance_tags
from dho.tracking.run import Tracker
from dho.tracking.server import connect, tracking_uri


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


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
