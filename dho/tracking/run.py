"""MLflow tracking of one training run, written by rank 0 only.

    from dho.config import flatten, to_dict
    from dho.tracking.provenance import provenance_tags

    params, tags = flatten(to_dict(config)), provenance_tags(Path())
    with Tracker.open(config.tracking, Path("outputs/spool"), params=params, tags=tags) as tracker:
        tracker.log_input("fashion_mnist", fingerprint, "data/prepared", "training")
        tracker.log_metrics({"train/loss/ce": 0.7}, step=20)
        tracker.log_artifacts(Path("outputs/plots"), "plots")

Starting without MLflow is an error. From then on MLflow may come and go: `log_metrics` only appends a line to a file,
the spool, and a background thread sends what the file holds and the server has not acknowledged. A later process that
opens the same run with the same spool folder (a restart, the next stage) sends what an earlier one could not.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dho.config import TrackingConfig
from dho.core.errors import TrackingError
from dho.core.files import sync, write_atomically
from dho.tracking.server import REQUEST_S, connect, experiment_id, one_line, post, reason, shown, tracking_uri
from dho.tracking.system_metrics import SystemMetrics

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

TICK_S = 0.5
"""How long metrics wait for others before they are sent together, seconds."""
MAX_PAUSE_S = 30.0
"""Between attempts while the server is down, seconds."""
# MLflow's limits: metrics per request, characters of a parameter, characters of a digest.
BATCH_METRICS, PARAM_LENGTH, DIGEST_LENGTH = 1000, 6000, 36

log = logging.getLogger(__name__)


class Tracker:
    """One MLflow run, opened by `Tracker.open`; metrics go through the spool, everything else is sent directly.

    Forked processes (data-loading workers) do not have the sending thread; `close` does nothing there.
    """

    def __init__(
        self, client: MlflowClient, uri: str, run_id: str, started_ms: int, spool: Path, system_metrics_every: float
    ) -> None:
        self.run_id = run_id
        self._client, self._uri, self._started_ms = client, uri, started_ms
        self._spool, self._acknowledged = spool / f"{run_id}.jsonl", spool / f"{run_id}.sent"
        try:
            spool.mkdir(parents=True, exist_ok=True)
            self._file = self._spool.open("ab", buffering=0)  # one write per line: nothing is lost with the process
        except OSError as error:
            raise TrackingError(
                f"{self._spool}: cannot be written ({error.strerror}); metrics need it while MLflow is down"
            ) from error

        content = self._spool.read_bytes()
        # What is not in the spool yet; first the end of a line that an earlier process did not finish.
        self._unspooled = bytearray(b"\n" if content and not content.endswith(b"\n") else b"")
        self._disk_full, self._spooling = False, threading.Lock()
        self._sent = 0  # bytes
        with contextlib.suppress(OSError, ValueError):
            self._sent = min(int(self._acknowledged.read_text()), len(content))

        self._batch = BATCH_METRICS
        self._refused: set[str] = set()
        self._every, self._system = system_metrics_every, SystemMetrics()
        self._process, self._status, self._deadline = os.getpid(), "", math.inf
        self._stop, self._ended, self._failure = threading.Event(), False, "no answer yet"
        self._thread = threading.Thread(target=self._work, name="mlflow-sender", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls,
        config: TrackingConfig,
        spool: Path,
        *,
        run_id: str | None = None,
        run_name: str | None = None,
        params: dict[str, Any] | None = None,
        tags: dict[str, str] | None = None,
    ) -> Tracker:
        """Start a run, or continue the run `run_id` and send what an earlier process left unsent in the spool.

        Args:
            config: server, experiment and interval of the system metrics.
            spool: folder on a disk that outlives the process; it holds two small files per run.
            run_id: None starts a run.
            run_name: shown in MLflow.
            params, tags: as for `log_params` and `set_tags`.

        Raises:
            TrackingError: MLflow does not answer or refuses, or the experiment or the run was deleted there.
        """
        client, uri = connect(config), tracking_uri(config)
        with one_line(uri, f"cannot open run {run_id or run_name or ''}"):
            if run_id is None:
                run = client.create_run(experiment_id(client, uri, config.experiment), run_name=run_name)
            else:
                run = client.get_run(run_id)
                if run.info.lifecycle_stage != "active":
                    raise TrackingError(
                        f"MLflow at {shown(uri)}: run {run_id} was deleted; `mlflow runs restore --run-id {run_id}`"
                    )
                client.update_run(run_id, status="RUNNING", name=run_name)

        tracker = cls(client, uri, run.info.run_id, run.info.start_time, spool, config.system_metrics_every)
        try:
            tracker.log_params(params or {})
            tracker.set_tags(tags or {})
        except BaseException:
            tracker.close("FAILED", timeout_s=REQUEST_S)
            raise
        return tracker

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Append metrics to the spool, from which they are sent in the background.

        The state of MLflow can neither delay this nor make it fail. While the spool's disk is full, metrics wait in
        memory; they reach the spool with the first call after there is room.

        Args:
            metrics: name -> value; NaN and infinity are allowed.
            step: of the training.
        """
        line = {
            "step": step,
            "timestamp": time.time_ns() // 1_000_000,
            "metrics": {key: float(value) for key, value in metrics.items()},
        }
        with self._spooling:
            self._unspooled += json.dumps(line).encode() + b"\n"
            self._spool_more()

    def _spool_more(self) -> None:
        """Move what waits in memory to the spool, as far as the disk takes it; `_spooling` must be held."""
        try:
            while self._unspooled:
                del self._unspooled[: self._file.write(self._unspooled)]
        except OSError as error:
            if not self._disk_full:
                log.warning("%s: %s; metrics wait in memory", self._spool, error.strerror)
            self._disk_full = True
        else:
            self._disk_full = False

    def last_recorded(self, prefix: str) -> int:
        """Return the last step at which the spool has a metric of this prefix, from any process; -1 for none."""
        last = -1
        for line in self._spool.read_bytes().splitlines():
            with contextlib.suppress(ValueError):  # half a line, of a process that was killed while it wrote it
                entry = json.loads(line)
                if any(key.startswith(prefix) for key in entry["metrics"]):
                    last = max(last, entry["step"])
        return last

    def log_params(self, params: dict[str, Any]) -> None:
        """Record parameters; one too long for MLflow continues under `<name>.2`, `<name>.3`, ...

        MLflow keeps the first value for ever. Where a continued run differs, the new value becomes tag
        `changed.<name>`, with a warning.

        Raises:
            TrackingError: MLflow does not answer or refuses.
        """
        from mlflow.entities import Param

        texts: dict[str, str] = {}
        for key, value in params.items():
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            for i in range(0, max(len(text), 1), PARAM_LENGTH):
                texts[f"{key}.{i // PARAM_LENGTH + 1}" if i else key] = text[i : i + PARAM_LENGTH]

        with one_line(self._uri, "cannot record the parameters"):
            known = self._client.get_run(self.run_id).data.params
            self._client.log_batch(
                self.run_id, params=[Param(key, text) for key, text in texts.items() if key not in known]
            )

        changed = {key: text for key, text in texts.items() if known.get(key, text) != text}
        for key, text in changed.items():
            log.warning("run %s started with %s = %s and continues with %s", self.run_id, key, known[key], text)
        self.set_tags({f"changed.{key}": text for key, text in changed.items()})

    def set_tags(self, tags: dict[str, str]) -> None:
        """Set the run's tags; raises `TrackingError` where MLflow does not answer or refuses."""
        from mlflow.entities import RunTag

        with one_line(self._uri, "cannot set the tags"):
            self._client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def log_input(self, name: str, digest: str, source: str, context: str) -> None:
        """Record what the run was made from, as `mlflow.log_input` does.

        Args:
            name: of the input.
            digest: fingerprint; MLflow's own digest holds its first 36 characters, the input's tag `fingerprint` all.
            source: path or address.
            context: what the run uses it for, e.g. `training`.

        Raises:
            TrackingError: MLflow does not answer or refuses.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=name, digest=digest[:DIGEST_LENGTH], source_type="local", source=json.dumps({"uri": source})
        )
        tags = [InputTag("mlflow.data.context", context), InputTag("fingerprint", digest)]
        with one_line(self._uri, f"cannot record the input {name}"):
            self._client.log_inputs(self.run_id, [DatasetInput(dataset, tags)])

    def log_artifacts(self, path: Path, artifact_path: str | None = None) -> None:
        """Upload a file, or all of a folder, now.

        MLflow itself retries for minutes (MLFLOW_HTTP_REQUEST_MAX_RETRIES).

        Args:
            path: the file or folder.
            artifact_path: folder among the run's artifacts; None is their root.

        Raises:
            TrackingError: MLflow or its artifact store does not answer or refuses.
        """
        with one_line(self._uri, f"cannot take {path}"):
            upload = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
            upload(self.run_id, str(path), artifact_path)

    def close(self, status: str = "FINISHED", timeout_s: float = 30.0) -> None:
        """Send what is left and set the run's status; never raise because of the server.

        Args:
            status: FINISHED, FAILED or KILLED.
            timeout_s: seconds to wait for the server; what is unsent by then stays in the spool, and a warning says so.
        """
        if self._status or os.getpid() != self._process:
            return
        self._status, self._deadline = status, time.monotonic() + timeout_s
        self._stop.set()
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self._file.close()

        if not self._ended:
            lines = self._spool.read_bytes()[self._sent :].count(b"\n")
            if self._unspooled:
                log.warning(
                    "%s: the disk is full, %d lines of metrics are lost", self._spool, self._unspooled.count(b"\n")
                )
            unsent = f"{lines} lines of metrics and status {status} of run {self.run_id} are unsent ({self._failure})"
            log.warning(
                "MLflow at %s: %s; the next start or stage sends the metrics from %s",
                shown(self._uri),
                unsent,
                self._spool,
            )

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close("FINISHED" if kind is None else "FAILED")

    def _work(self) -> None:
        """Run the background thread: sample system metrics when they are due, and send what is in the spool."""
        sample_at, try_at, pause = time.monotonic() + self._every, 0.0, 1.0
        while not self._stop.wait(TICK_S):
            if self._unspooled:
                with self._spooling:
                    self._spool_more()
            now = time.monotonic()
            if now >= sample_at:
                self._sample()
                sample_at = now + self._every
            if now >= try_at:
                if self._send(known_down=try_at > 0):
                    try_at, pause = 0.0, 1.0
                else:
                    try_at, pause = now + pause, min(2 * pause, MAX_PAUSE_S)

        self._sample()
        while time.monotonic() < self._deadline and not self._ended:
            with self._spooling:
                self._spool_more()
            # Nothing follows the run's status, so it waits for metrics that the disk has not taken.
            if self._unspooled or not self._send(known_down=True, last=True):
                time.sleep(TICK_S)

    def _send(self, known_down: bool, last: bool = False) -> bool:
        """Send the spool up to its end, then, with `last`, the run's status; False where the server fails."""
        try:
            while True:
                metrics, end = self._unsent()
                if end == self._sent:
                    break
                self._deliver(metrics)
                # On a full disk this note fails; a restart then sends these again, and the server keeps each once.
                with contextlib.suppress(OSError):
                    write_atomically(self._acknowledged, str(end))
                self._sent, self._batch = end, min(2 * self._batch, BATCH_METRICS)
            if last:
                self._client.set_terminated(self.run_id, self._status)
                self._ended = True
        except Exception as error:  # whatever it is: without this thread metrics would be lost
            # A server that is slow rather than down can finish a smaller batch in time.
            self._batch = max(self._batch // 2, 1)
            self._failure = reason(error)
            if not known_down:
                log.warning("MLflow at %s: %s; metrics wait in %s", shown(self._uri), self._failure, self._spool)
            with contextlib.suppress(OSError):
                sync(self._spool)  # it is now the only copy
            return False
        if known_down and not last:
            log.warning("MLflow at %s is back and has all metrics of run %s", shown(self._uri), self.run_id)
        return True

    def _unsent(self) -> tuple[list[Metric], int]:
        """Return the next batch from the spool, whole lines only, and the position where it ends, in bytes."""
        from mlflow.entities import Metric

        metrics: list[Metric] = []
        end = self._sent
        with self._spool.open("rb") as file:
            file.seek(end)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                more: list[Metric] = []
                with contextlib.suppress(ValueError):  # half a line, of a process that was killed while it wrote it
                    entry = json.loads(line)
                    more = [
                        Metric(key, value, entry["timestamp"], entry["step"]) for key, value in entry["metrics"].items()
                    ]
                if metrics and len(metrics) + len(more) > self._batch:
                    break
                metrics += more
                end += len(line)
        return metrics, end

    def _deliver(self, metrics: list[Metric]) -> None:
        """Send metrics in order.

        What the server refuses is named in a warning and left out, so that the rest gets through.
        """
        from mlflow.exceptions import MlflowException

        try:
            if len(metrics) <= BATCH_METRICS:
                return self._log_batch(metrics)
        except MlflowException as error:
            refused = error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
            # A deleted run refuses everything; its metrics wait until it is restored.
            if not refused or self._client.get_run(self.run_id).info.lifecycle_stage != "active":
                raise
            if len(metrics) == 1:
                if metrics[0].key not in self._refused:
                    log.warning("MLflow refuses metric %r, which is left out: %s", metrics[0].key, reason(error))
                self._refused.add(metrics[0].key)
                return None
        half = len(metrics) // 2
        self._deliver(metrics[:half])
        return self._deliver(metrics[half:])

    def _log_batch(self, metrics: list[Metric]) -> None:
        if not self._uri.startswith("http"):
            self._client.log_batch(self.run_id, metrics)
            return
        # JSON has no NaN and no infinity; protobuf's JSON, which the server reads, spells them as text.
        text = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
        entries = [
            {"key": m.key, "value": text.get(str(m.value), m.value), "timestamp": m.timestamp, "step": m.step}
            for m in metrics
        ]
        post(self._uri, "runs/log-batch", {"run_id": self.run_id, "metrics": entries})

    def _sample(self) -> None:
        """Log system metrics under MLflow's own names; their step is the time since the run began, seconds."""
        try:
            self.log_metrics(self._system.read(), (time.time_ns() // 1_000_000 - self._started_ms) // 1000)
        except Exception as error:
            log.warning("no more system metrics: %s", reason(error))
            self._system.stop()
