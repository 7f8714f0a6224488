"""Jobs of the tests: start one, watch its steps, hurt it, and see that its record is an undisturbed training's."""

from __future__ import annotations

import contextlib
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml
from mlflow import MlflowClient

from dho.cluster.pytorchjob import PyTorchJob
from dho.core.errors import ClusterError

PATIENCE_S = 420
LOG_EVERY = 20
STEPS_PER_EPOCH = 315
# Kills every process whose parent is the container's first one, torchrun: the trainers.
KILL_TRAINERS = (
    "import glob, os, signal\n"
    "for stat in glob.glob('/proc/[0-9]*/stat'):\n"
    "    if open(stat).read().rsplit(')', 1)[1].split()[1] == '1':\n"
    "        os.kill(int(stat.split('/')[2]), signal.SIGKILL)\n"
)


@dataclass
class Job:
    """One PyTorchJob in the namespace of the tests."""

    cluster: Any
    name: str
    documents: list[dict[str, Any]]
    mlflow: MlflowClient
    started: float = field(default_factory=time.time)

    def apply(self) -> Job:
        """Send the manifests as `kubectl apply -f` does."""
        self.started = time.time()
        self.cluster.apply(self.documents)
        return self

    def phases(self) -> list[str]:
        """Types of the job's conditions that hold."""
        job = self.cluster.client.job(self.name)
        assert job is not None, f"no PyTorchJob {self.name}"
        return [
            condition["type"]
            for condition in job.get("status", {}).get("conditions", [])
            if condition["status"] == "True"
        ]

    def pods(self) -> list[dict[str, Any]]:
        return self.cluster.pods(PyTorchJob().selector(self.name))

    def pod(self, replica: str) -> str:
        """Name of a replica's pod: `master-0`, `worker-1`."""
        return f"{self.name}-{replica}"

    def node_of(self, replica: str) -> str:
        return str(self.cluster.get("pod", self.pod(replica))["spec"]["nodeName"])

    def logs(self, **options: Any) -> str:
        """Logs of all pods' containers that train as they are now; of pods that have none yet, nothing."""
        texts = []
        for pod in self.pods():
            with contextlib.suppress(ClusterError):
                texts.append(self.cluster.client.log(pod["metadata"]["name"], **options))
        return "\n".join(texts)

    def step(self) -> int:
        """Newest step that a log speaks of; 0 for none."""
        return max((int(number) for number in re.findall(r"train: step (\d+)/", self.logs(tail_lines=30))), default=0)

    def wait_for_step(self, step: int) -> None:
        """Wait until training has reached a step, and is not over."""
        self._wait_beyond(step - 1, self.step, "step", pause_s=1)

    def wait_for_checkpoint(self, beyond: int) -> int:
        """Wait for a checkpoint of a later step than `beyond`, while training is not over; returns its step."""
        return self._wait_beyond(beyond, self.cluster.newest_checkpoint, "checkpoint", pause_s=0.3)

    def _wait_beyond(self, beyond: int, newest: Callable[[], int], what: str, pause_s: float) -> int:
        deadline = time.monotonic() + PATIENCE_S
        while (found := newest()) <= beyond:
            assert "Succeeded" not in (phases := self.phases()) and "Failed" not in phases, self.story()
            assert time.monotonic() < deadline, f"no {what} beyond step {beyond} in {PATIENCE_S} s\n{self.story()}"
            time.sleep(pause_s)
        return found

    def wait_for_log(self, words: str, max_wait_s: float = 60) -> None:
        """Wait until a pod's log holds the words; ask before the job ends, as the workers' pods go with it."""
        deadline = time.monotonic() + max_wait_s
        while words not in self.logs():
            assert time.monotonic() < deadline, f"no log says {words!r} within {max_wait_s} s\n{self.story()}"
            time.sleep(1)

    def wait_for_success(self, max_wait_s: float = PATIENCE_S) -> None:
        """Wait until the job has succeeded."""
        deadline = time.monotonic() + max_wait_s
        while "Succeeded" not in (phases := self.phases()):
            assert "Failed" not in phases, self.story()
            assert time.monotonic() < deadline, f"not finished in {max_wait_s} s\n{self.story()}"
            time.sleep(1)

    def kill_trainers(self, replica: str) -> None:
        """SIGKILL to a pod's trainers, not to its torchrun."""
        self.cluster.kubectl("exec", self.pod(replica), "-c", PyTorchJob.container, "--", "python", "-c", KILL_TRAINERS)

    def story(self) -> str:
        """What a person would look at after a failure."""
        parts = [
            self.cluster.kubectl(*words.split(), check=False)
            for words in (f"describe pytorchjob {self.name}", "get pods -o wide")
        ]
        parts += [
            self.cluster.kubectl("describe", "pod", pod["metadata"]["name"], check=False)[-1500:] for pod in self.pods()
        ]
        return "\n".join(
            [*parts, self.logs(tail_lines=40), "-- before the last restart:", self.logs(tail_lines=40, previous=True)]
        )

    def run(self) -> Any:
        """The one MLflow run that this job made."""
        experiments = [experiment.experiment_id for experiment in self.mlflow.search_experiments()]
        runs = [
            run for run in self.mlflow.search_runs(experiments) if run.info.start_time >= self.started * 1000 - 1000
        ]
        assert len(runs) == 1, f"{len(runs)} MLflow runs: {[run.info.run_id for run in runs]}\n{self.story()}"
        assert runs[0].info.status == "FINISHED"
        return runs[0]

    def check_record(self, epochs: int) -> Any:
        """The run holds every logged step and every epoch exactly once; returns it."""
        run = self.run()
        ends = [STEPS_PER_EPOCH * epoch for epoch in range(1, epochs + 1)]
        expected = sorted({*range(LOG_EVERY, ends[-1] + 1, LOG_EVERY), *ends})
        for name in ("train/loss/ce", "train/loss/kd_unlabelled", "train/learning_rate"):
            counts = Counter(metric.step for metric in self.mlflow.get_metric_history(run.info.run_id, name))
            assert sorted(counts) == expected, f"{name}: {sorted(counts)}"
            assert set(counts.values()) == {1}, f"{name} has steps twice: {counts}"
        for name in ("val/ce_head/top1", "val/kd_head/top1", "val/combined/top1"):
            assert [metric.step for metric in self.mlflow.get_metric_history(run.info.run_id, name)] == ends, name
        return run


def measured(run: Any) -> dict[str, float]:
    """What an undisturbed and a disturbed training must agree on."""
    return {name: value for name, value in run.data.metrics.items() if name.startswith("test/")}


def with_revision(documents: list[dict[str, Any]], name: str, revision: str) -> list[dict[str, Any]]:
    """The manifests with another job name and the revision that this test has published."""
    text = yaml.safe_dump_all(documents)
    changed: list[dict[str, Any]] = list(yaml.safe_load_all(text))
    for document in changed:
        if document["kind"] == "ConfigMap":
            document["data"]["DHO_REVISION"] = revision
        if document["kind"] == "PyTorchJob":
            document["metadata"]["name"] = name
    return changed
