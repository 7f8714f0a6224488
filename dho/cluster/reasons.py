"""Why a job does not start: read off its pods and events, in a user's words.

`waiting` groups replicas by reason, so that 64 pods with the same trouble are one line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from dho.cluster.job import Document, JobKind

PULL_ERRORS = (
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "ImageInspectError",
    "RegistryUnavailable",
)
_PULL_NOISE = re.compile(r"^(Back-off pulling image \"[^\"]*\": ErrImagePull: |Back-off pulling image \"[^\"]*\"$)")


def waiting(
    kind: JobKind,
    job: Document,
    pods: Iterable[Document],
    events: Iterable[Document],
    last_line: Callable[[str, str], str],
) -> dict[str, list[str]]:
    """Reason -> replicas that wait for it, e.g. {"no node fits: ...": ["master-0", "worker-0"]}.

    Args:
        kind: of the job.
        job: as the API server has it.
        pods: its pods.
        events: Warning events of its namespace.
        last_line: called with pod and container, returns the last line of that container's log.
    """
    reasons: dict[str, list[str]] = {}
    job_pods = list(pods)
    uids = {pod["metadata"]["uid"] for pod in job_pods}
    missing = len(job_pods) < kind.replicas(job)
    events_of: dict[str, list[Document]] = {}
    for event in sorted(events, key=_when):
        uid = event.get("involvedObject", {}).get("uid")
        if uid in uids:
            events_of.setdefault(uid, []).append(event)
        elif missing and uid == job["metadata"]["uid"] and event.get("reason", "").startswith("FailedCreate"):
            reasons.setdefault(_refused(event.get("message", "")), [])

    # Of several refusals in a row (the quota's numbers change as pods come) the newest holds.
    for reason in list(reasons)[:-1]:
        del reasons[reason]
    for pod in job_pods:
        for reason in _pod(pod, events_of.get(pod["metadata"]["uid"], []), last_line):
            reasons.setdefault(reason, []).append(kind.replica_of(pod))
            break
    return reasons


def _when(event: Document) -> str:
    return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp") or "")


def _refused(message: str) -> str:
    text = one_line(message.removeprefix("Error creating: "))
    if "exceeded quota" in text:
        return f"no pod, for the namespace's quota: {text[text.index('exceeded quota') :]}"
    if "violates PodSecurity" in text:
        return f"no pod, for the namespace's PodSecurity: {text[text.index('violates PodSecurity') :]}"
    return f"no pod, since the API server refuses it: {text}"


def _pod(pod: Document, events: list[Document], last_line: Callable[[str, str], str]) -> Iterator[str]:
    """Yield what a pod waits for, what matters first."""
    status, name = pod.get("status", {}), pod["metadata"]["name"]
    if pod["metadata"].get("deletionTimestamp") or status.get("phase") in ("Succeeded", "Failed"):
        return
    if not pod.get("spec", {}).get("nodeName"):
        for condition in status.get("conditions", []):
            if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
                yield _unscheduled(condition.get("message", ""))
        return
    init_containers = [(one, True) for one in status.get("initContainerStatuses", [])]
    for container, is_init in [*init_containers, *((one, False) for one in status.get("containerStatuses", []))]:
        state, past = container.get("state", {}), container.get("lastState", {}).get("terminated", {})
        blocked = state.get("waiting", {})
        if blocked.get("reason") in PULL_ERRORS:
            yield f"image {container['image']} cannot be pulled: {_pull(blocked, events)}"
        elif blocked.get("reason") in (
            "CreateContainerConfigError",
            "CreateContainerError",
            "RunContainerError",
            "StartError",
        ):
            yield f"container {container['name']} cannot start: {one_line(blocked.get('message', ''))}"
        elif (
            is_init
            and (ended := _failed(state.get("terminated", {}) or past))
            and container.get("restartCount", 0) + ("terminated" in state)
        ):
            yield f"init container {container['name']} fails ({ended}): {last_line(name, container['name'])}"
        elif not is_init and blocked.get("reason") == "CrashLoopBackOff" and container.get("restartCount", 0) > 2:
            ended = _failed(past) or "exit code 0"
            yield f"container {container['name']} ends again and again ({ended}): {last_line(name, container['name'])}"
    if all("waiting" in one.get("state", {}) for one in status.get("initContainerStatuses", [])):
        for event in reversed(events):
            if event.get("reason") in ("FailedMount", "FailedAttachVolume", "FailedMapVolume"):
                yield _unmounted(event.get("message", ""), pod["metadata"]["namespace"])
            elif event.get("reason") == "FailedCreatePodSandBox":
                yield f"its node cannot set it up: {one_line(event.get('message', ''))}"


def _unscheduled(message: str) -> str:
    text = one_line(message)
    claim = re.search(r'persistentvolumeclaim "([^"]+)" not found', text)
    if claim:
        return f"PersistentVolumeClaim {claim[1]} is missing"
    if "unbound immediate PersistentVolumeClaims" in text:
        return (
            "its PersistentVolumeClaim is not bound: no volume of its size, access mode and storage class "
            "(`kubectl get pvc,storageclass`)"
        )
    return f"no node fits: {text.partition(' preemption:')[0]}"


def _unmounted(message: str, namespace: str) -> str:
    text = one_line(message)
    if missing := re.search(r'(secret|configmap) "([^"]+)" not found', text):
        kind = {"secret": "Secret", "configmap": "ConfigMap"}[missing[1]]
        return f"{kind} {missing[2]} is missing in namespace {namespace}"
    return f"a volume cannot be mounted: {text}"


def _pull(blocked: Document, events: list[Document]) -> str:
    """The registry's answer; a pod that backs off only says that it does, while its events still have the answer."""
    texts = [blocked.get("message", "")]
    texts += [
        event["message"]
        for event in reversed(events)
        if event.get("reason") == "Failed" and "pull" in event.get("message", "")
    ]
    for text in texts:
        if clean := _PULL_NOISE.sub("", one_line(text)):
            return clean
    return str(blocked["reason"])


def _failed(ended: Document) -> str:
    """`exit code 1`, `exit code 137, OOMKilled`; empty for none or success."""
    if not ended or not ended.get("exitCode"):
        return ""
    why = ended.get("reason", "Error")
    return f"exit code {ended['exitCode']}" + ("" if why == "Error" else f", {why}")


def restarts(before: Document | None, pod: Document, name: str) -> str:
    """How the container `name` of a pod has ended since `before`, if it has: `exit code 137, OOMKilled`."""

    def count(one: Document | None) -> tuple[int, Document]:
        for container in (one or {}).get("status", {}).get("containerStatuses", []):
            if container["name"] == name:
                return container.get("restartCount", 0), container.get("lastState", {}).get("terminated", {})
        return 0, {}

    now, ended = count(pod)
    same = before is not None and before["metadata"]["uid"] == pod["metadata"]["uid"]
    return (_failed(ended) or "exit code 0") if now > (count(before)[0] if same else 0) else ""


def one_line(text: str) -> str:
    """Without line breaks, at most 300 characters."""
    return " ".join(text.split())[:300]


def several(names: list[str]) -> str:
    """`worker-0`, `master-0 and worker-0`, `master-0 and 63 more`"""
    return " and ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} more"
