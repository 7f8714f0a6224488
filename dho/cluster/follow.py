"""Follow a job to its end: print its phases, the log of rank 0 with its progress, and what goes wrong on the way."""

from __future__ import annotations

import queue
import re
import time
from typing import Any

from dho.cluster import reasons
from dho.cluster.api import Cluster
from dho.cluster.job import QUEUE_LABEL
from dho.cluster.watch import News, Streams
from dho.core.errors import FAILED, INTERRUPTED, NOT_STARTED, SUCCEEDED, ClusterError
from dho.core.progress import bar

REASON_AFTER_S = 10.0
"""A reason for not starting is reported when it has held this long, seconds."""
AGAIN_AFTER_S = 120.0
"""The same reason, with other numbers in it, is reported again after this time at the earliest, seconds."""
SAME_FAULT_S = 3.0
"""Restarts with less time than this between them are reported together, seconds."""
MAX_LAST_LINES_S = 15.0
"""Longest wait for the rest of the log of a job that has ended, seconds."""
MAX_START_S = 600.0
"""Longest wait for a job to start, seconds."""
MAX_API_DOWN_S = 600.0
"""Longest wait for an API server that does not answer, seconds; the job does not need it."""
_STEP = re.compile(r"(?P<stage>\w+): step (?P<step>\d+)/(?P<steps>\d+)(?P<note>.*)")


def follow(cluster: Cluster, name: str, start_timeout_s: float = MAX_START_S) -> int:
    """Print what happens to a job until it ends.

    Args:
        cluster: where the job is.
        name: of the job, which must exist.
        start_timeout_s: seconds that it may take until all pods (of an elastic job: the fewest) run; waiting in a queue
            does not count.

    Returns:
        SUCCEEDED or FAILED as the job ends, NOT_STARTED when it did not start in time, INTERRUPTED on Ctrl-C. The
        latter two leave the job as it is.

    Raises:
        ClusterError: the job was deleted, or the API server did not answer for `MAX_API_DOWN_S` seconds.
    """
    follower = _Follower(cluster, name, start_timeout_s)
    try:
        return follower.run()
    except KeyboardInterrupt:
        follower.say(f"{name} keeps running; {_hint(cluster, name)}")
        return INTERRUPTED
    finally:
        follower.streams.close()


def _hint(cluster: Cluster, name: str) -> str:
    where = f"--namespace {cluster.namespace}"
    return f"`dho logs {name} -f {where}` follows it, `dho stop {name} {where}` removes it"


class _Follower:
    def __init__(self, cluster: Cluster, name: str, start_timeout_s: float) -> None:
        self.cluster, self.kind, self.name, self.start_timeout_s = cluster, cluster.kind, name, start_timeout_s
        self.streams = Streams(cluster, name)
        self.job: dict[str, Any] | None = None
        self.pods: dict[str, dict[str, Any]] = {}
        self.events: dict[str, dict[str, Any]] = {}
        self.began = self.unsuspended = time.monotonic()
        self.started = False
        self.phase = ""
        self.running = -1
        self.running_at = 0.0
        self.since: dict[str, float] = {}
        self.reported: dict[str, float] = {}
        self.reasons: dict[str, list[str]] = {}
        self.restarted: dict[str, list[str]] = {}
        self.restarted_at = 0.0
        self.seen: dict[str, str] = {}
        self.changed = False
        self.synced: set[str] = set()
        self.down: dict[str, tuple[float, str]] = {}
        self.down_reported = False
        self.last_lines: dict[tuple[str, str, int], str] = {}
        self.bar = bar()
        self.task: Any = None

    def say(self, text: str) -> None:
        """One line about the job, as opposed to one of its log."""
        print(f"launch: {text}", flush=True)

    def run(self) -> int:
        self.streams.start()
        with self.bar:
            while True:
                self._take_news()
                if self.down:
                    self._api_is_down()
                elif {"job", "pods"} <= self.synced and (status := self._look()) is not None:
                    return status

    def _look(self) -> int | None:
        """Report what the news amount to; the exit status at the end."""
        assert self.job is not None
        if self.kind.phase(self.job) in ("Succeeded", "Failed"):
            self._read_log()
            self.streams.wait_for_log(MAX_LAST_LINES_S)
            self._take_news(0)
            return self._end()
        changed, self.changed = self.changed, False
        if changed:
            self._read_log()
        self._phase()
        self._restarts()
        return self._waiting(changed)

    def _take_news(self, wait_s: float = 1.0) -> None:
        """Take in all news there are, waiting for the first."""
        try:
            news = self.streams.news.get(timeout=wait_s) if wait_s else self.streams.news.get_nowait()
            while True:
                self._take(news)
                news = self.streams.news.get_nowait()
        except queue.Empty:
            return

    def _take(self, news: News) -> None:
        if news.what == "LINE":
            self._log_line(news.value)
        elif news.what == "BROKEN":
            raise news.value
        elif news.what == "NEVER":
            self.say(f"reasons for not starting may be missing: {news.stream}: {news.value}")
        elif news.what == "DOWN":
            self.down.setdefault(news.stream, (time.monotonic(), news.value))
        elif news.what == "UP":
            if self.down.pop(news.stream, None) and not self.down and self.down_reported:
                self.down_reported = False
                self.say("the API server answers again")
        else:
            self.changed = True
            self.synced.add(news.stream)
            if news.stream == "job":
                self._take_job(news)
            elif news.stream == "pods":
                self._take_pods(news)
            else:
                self.events = _updated(self.events, news)

    def _take_job(self, news: News) -> None:
        jobs = news.value if news.what == "SYNC" else [news.value]
        if news.what == "DELETED" or not jobs:
            raise ClusterError(f"job {self.name} was deleted from namespace {self.cluster.namespace}")
        self.job = jobs[0]

    def _take_pods(self, news: News) -> None:
        before, self.pods = self.pods, _updated(self.pods, news)
        for uid, pod in self.pods.items():
            replica = self.kind.replica_of(pod)
            ended = reasons.restarts(before[uid], pod, self.kind.container) if uid in before else ""
            if self.seen.setdefault(replica, uid) != uid:
                self.seen[replica], ended = uid, "its pod was lost"
            if ended:
                self.restarted_at = time.monotonic()
                self.restarted.setdefault(ended, []).append(replica)

    def _read_log(self) -> None:
        """Read the log of rank 0's container, and note when the container has ended."""
        assert self.job is not None
        rank_zero = self.kind.rank_zero(self.job)
        for pod in self.pods.values():
            if self.kind.replica_of(pod) != rank_zero:
                continue
            for container in pod.get("status", {}).get("containerStatuses", []):
                if container["name"] != self.kind.container:
                    continue
                state, id_ = container.get("state", {}), container.get("containerID", "")
                if id_ and "waiting" not in state:
                    self.streams.follow_log(pod["metadata"]["name"], pod["metadata"]["uid"], id_)
                    if "terminated" in state:
                        self.streams.log_ended(id_)
                elif past := container.get("lastState", {}).get("terminated", {}).get("containerID"):
                    self.streams.log_ended(past)

    def _end(self) -> int:
        assert self.job is not None
        if self.kind.phase(self.job) == "Succeeded":
            self.say(f"{self.name} Succeeded after {time.monotonic() - self.began:.0f} s")
            return SUCCEEDED
        self.say(f"{self.name} Failed: {reasons.one_line(self.kind.failure(self.job))}")
        return FAILED

    def _phase(self) -> None:
        """Report a new phase, or another number of pods that run."""
        assert self.job is not None
        now, total, clock = self.kind.phase(self.job), self.kind.replicas(self.job), time.monotonic()
        running = sum(pod.get("status", {}).get("phase") == "Running" for pod in self.pods.values())
        self.started |= running >= self.kind.min_replicas(self.job)
        if now == "Suspended":
            self.unsuspended = clock
        if now != self.phase or (
            running != self.running and (running == total or clock - self.running_at > REASON_AFTER_S)
        ):
            self.phase, self.running, self.running_at = now, running, clock
            admission = ""
            if now == "Suspended":
                waits_for = self.job["metadata"].get("labels", {}).get(QUEUE_LABEL)
                admission = "; waits to be admitted" + (f" by queue {waits_for}" if waits_for else "")
            self.say(f"{self.name} {now}, {running} of {total} pods run{admission}")

    def _waiting(self, changed: bool) -> int | None:
        """Report what keeps pods from running; the exit status when the job has taken too long to start."""
        assert self.job is not None
        now = time.monotonic()
        if changed:
            self.reasons = reasons.waiting(
                self.kind, self.job, self.pods.values(), self.events.values(), self._last_line
            )
            # By the words before the colon: numbers behind it change while it is the same that is missing.
            self.since = {
                key: self.since.get(key, now) for key in (reason.partition(":")[0] for reason in self.reasons)
            }
        for reason, names in self.reasons.items():
            category = reason.partition(":")[0]
            if (
                now - self.since[category] >= REASON_AFTER_S
                and now - self.reported.get(category, -AGAIN_AFTER_S) >= AGAIN_AFTER_S
            ):
                self.reported[category] = now
                self.say(f"{reasons.several(names) or self.name} does not start: {reason}")
        if self.started or now - max(self.began, self.unsuspended) < self.start_timeout_s:
            return None
        phases = sorted({pod.get("status", {}).get("phase", "Pending") for pod in self.pods.values()}) or ["not there"]
        why = next(iter(self.reasons), f"its pods are {' and '.join(phases)}")
        self.say(
            f"{self.name} has not started in {self.start_timeout_s:.0f} s: {why}; {_hint(self.cluster, self.name)}"
        )
        return NOT_STARTED

    def _restarts(self) -> None:
        """Report containers that ended and were started again, when those that the first took along have ended too."""
        if self.restarted and time.monotonic() - self.restarted_at > SAME_FAULT_S:
            for ended, names in self.restarted.items():
                self.say(f"{reasons.several(names)} started again after {ended}")
            self.restarted.clear()

    def _last_line(self, pod: str, container: str) -> str:
        """The last line of a container that has ended, asked for once each time it ends."""
        statuses = [
            status
            for one in self.pods.values()
            if one["metadata"]["name"] == pod
            for key in ("initContainerStatuses", "containerStatuses")
            for status in one.get("status", {}).get(key, [])
            if status["name"] == container
        ]
        key = (pod, container, statuses[0].get("restartCount", 0) if statuses else 0)
        if key not in self.last_lines:
            text = ""
            for previous in (False, True):
                try:
                    text = text.strip() or self.cluster.log(pod, container, tail_lines=5, previous=previous)
                except ClusterError as error:
                    text = "" if "previous terminated" in str(error) else str(error)
            self.last_lines[key] = (
                reasons.one_line(text.strip().splitlines()[-1]) if text.strip() else "its log is empty"
            )
        return self.last_lines[key]

    def _api_is_down(self) -> None:
        first, why = min(self.down.values())
        if time.monotonic() - first > 2 and not self.down_reported:
            self.down_reported = True
            self.say(f"the API server does not answer ({why}); trying again, and the job does not need it")
        if time.monotonic() - first > MAX_API_DOWN_S:
            raise ClusterError(
                f"the API server did not answer for {MAX_API_DOWN_S:.0f} s; {_hint(self.cluster, self.name)}"
            )

    def _log_line(self, line: str) -> None:
        match = _STEP.fullmatch(line.strip())
        if match is None or self.bar.disable:
            print(line, flush=True)
            return
        if self.task is None:
            self.task = self.bar.add_task(match["stage"], total=int(match["steps"]), note="")
        self.bar.update(self.task, completed=int(match["step"]), note=match["note"].strip())


def _updated(kept: dict[str, dict[str, Any]], news: News) -> dict[str, dict[str, Any]]:
    """uid -> object, after some news."""
    if news.what == "SYNC":
        return {item["metadata"]["uid"]: item for item in news.value}
    others = {uid: item for uid, item in kept.items() if uid != news.value["metadata"]["uid"]}
    return others if news.what == "DELETED" else {**others, news.value["metadata"]["uid"]: news.value}
