"""Streams of the API server that outlive it: what changes about a job, and a container's log, put into one queue.

A stream is one request that stays open, so nothing is polled. When it breaks (the API server restarts, a connection
dies) the objects are listed once, so that nothing that happened meanwhile is missed, and watched from there; waits
between attempts grow to `MAX_WAIT_S`.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dho.cluster.api import MAX_CONNECT_S, Cluster, cause_of, message_of

WATCH_S = 120
"""Seconds after which a watch is renewed, so that a connection that died unnoticed is found."""
MAX_WAIT_S = 5.0


@dataclass(frozen=True)
class News:
    """One thing that a stream reports."""

    stream: str
    """job, pods, events or log"""
    what: str
    """SYNC (`value`: all objects there are), ADDED, MODIFIED, DELETED (an object), LINE (text), DOWN (why), UP (None),
    NEVER (why: this user may not see it), BROKEN (an exception that is a defect)"""
    value: Any = None


class Streams:
    """Background threads that follow a job and put what they find into `news`.

    Args:
        cluster: where the job is.
        name: of the job.
    """

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.name = cluster, name
        self.news: queue.Queue[News] = queue.Queue()
        self._over = threading.Event()
        self._log: threading.Thread | None = None
        self._log_of: str | None = None
        self._newest: dict[str, str] = {}
        self._ended: set[str] = set()

    def start(self) -> None:
        """Watch the job, its pods and the namespace's warnings."""
        for stream in ("job", "pods", "events"):
            self._in_background(self._watch, stream)

    def close(self) -> None:
        """Stop the news; open requests end with the process."""
        self._over.set()

    def follow_log(self, pod: str, uid: str, container_id: str) -> None:
        """Put the log of the container that trains into the news, once per id; a restarted container has another id."""
        if self._log_of != container_id:
            self._log_of = container_id
            self._log = self._in_background(self._read_log, pod, uid, container_id)

    def log_ended(self, container_id: str) -> None:
        """Note that a container has ended, so that its log ends where it has been read to its end."""
        self._ended.add(container_id)

    def wait_for_log(self, timeout_s: float) -> None:
        """Wait until the log that is being followed has been read to its end."""
        if self._log is not None:
            self._log.join(timeout_s)

    def _in_background(self, work: Callable[..., None], *arguments: str) -> threading.Thread:
        def run() -> None:
            try:
                work(*arguments)
            except Exception as error:
                self.news.put(News(arguments[0], "BROKEN", error))

        thread = threading.Thread(target=run, daemon=True, name=" ".join(arguments[:1]))
        thread.start()
        return thread

    def _watch(self, stream: str) -> None:
        from kubernetes.client import ApiException
        from kubernetes.watch import Watch
        from urllib3.exceptions import HTTPError

        call, arguments = self.cluster.list_and_watch(stream, self.name)
        version, wait_s = None, 0.0
        while not self._over.is_set():
            try:
                if version is None:
                    answer = call(**arguments, _preload_content=False, _request_timeout=(MAX_CONNECT_S, 30))
                    listed = json.loads(answer.data)
                    version = listed["metadata"]["resourceVersion"]
                    self.news.put(News(stream, "SYNC", listed["items"]))
                    self.news.put(News(stream, "UP"))
                options = {
                    "resource_version": version,
                    "timeout_seconds": WATCH_S,
                    "_request_timeout": (MAX_CONNECT_S, WATCH_S + 10),
                }
                for event in Watch(return_type="object").stream(call, **arguments, **options):
                    version, wait_s = event["object"]["metadata"]["resourceVersion"], 0.0
                    self.news.put(News(stream, event["type"], event["object"]))
                continue
            except ApiException as error:
                version = None
                if error.status == 410:  # so old that the server has forgotten it
                    continue
                if error.status == 403 and stream == "events":
                    self.news.put(News(stream, "NEVER", message_of(error)))
                    return
                self.news.put(News(stream, "DOWN", f"{error.status}: {message_of(error)}"))
            except (HTTPError, OSError, ValueError) as error:
                version = None
                self.news.put(News(stream, "DOWN", cause_of(error)))
            wait_s = min(max(2 * wait_s, 0.5), MAX_WAIT_S)
            self._over.wait(wait_s)

    def _read_log(self, pod: str, uid: str, container_id: str) -> None:
        """Read to the end; after a break, continue behind the last line, which the lines' time stamps show.

        A request names the container, not its id: it may already answer with the log of the next one.
        """
        from kubernetes.client import ApiException
        from kubernetes.watch.watch import iter_resp_lines
        from urllib3.exceptions import HTTPError

        heard, wait_s = time.monotonic(), 0.0
        while not self._over.is_set():
            known_to_have_ended = container_id in self._ended
            since = {"since_seconds": int(time.monotonic() - heard) + 60} if uid in self._newest else {}
            complete = False
            with contextlib.suppress(HTTPError, OSError):
                try:
                    answer = self.cluster.core.read_namespaced_pod_log(
                        pod,
                        self.cluster.namespace,
                        container=self.cluster.kind.container,
                        follow=True,
                        timestamps=True,
                        _preload_content=False,
                        _request_timeout=(MAX_CONNECT_S, WATCH_S),
                        **since,
                    )
                    for line in iter_resp_lines(answer):
                        stamp, _, text = line.partition(" ")
                        if self._log_of != container_id:
                            return
                        if stamp > self._newest.get(uid, ""):
                            self._newest[uid], heard, wait_s = stamp, time.monotonic(), 0.0
                            self.news.put(News("log", "LINE", text))
                    complete = True
                except ApiException as error:
                    if error.status == 404:
                        return
            if (complete and known_to_have_ended) or self._log_of != container_id:
                return
            wait_s = min(max(2 * wait_s, 0.5), MAX_WAIT_S)
            self._over.wait(wait_s)
