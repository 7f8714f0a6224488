"""The API server, through Kubeflow's SDK: submit a job, list jobs, read logs, delete.

    from dho.cluster.job import job_kind
    cluster = connect("dho", job_kind("PyTorchJob"))
    names = [job["metadata"]["name"] for job in cluster.jobs()]

Whatever it answers that a user can fix is one line (`ClusterError`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from dho.cluster.job import Document, JobKind
from dho.core.errors import ClusterError

PART_OF = "app.kubernetes.io/part-of=dho"
MAX_CONNECT_S, MAX_ANSWER_S = 5, 30
"""Longest wait for a connection and for an answer, seconds."""


def connect(namespace: str, kind: JobKind) -> Cluster:
    """Find the cluster of KUBECONFIG (or ~/.kube/config, or the pod one is in).

    Args:
        namespace: where the jobs are.
        kind: of the jobs.

    Raises:
        ClusterError: there is no such cluster.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from kubeflow.training import TrainingClient
        from kubernetes.config import ConfigException
        from urllib3 import disable_warnings
        from urllib3.exceptions import InsecureRequestWarning
    disable_warnings(InsecureRequestWarning)  # whoever wrote insecure-skip-tls-verify into the kubeconfig knows it
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it reports each attempt
    try:
        client = TrainingClient(namespace=namespace)
    except ConfigException as error:
        raise ClusterError(f"no cluster to talk to: {' '.join(str(error).split())}; set KUBECONFIG") from error
    return Cluster(client, namespace, kind)


class Cluster:
    """The jobs of one kind in one namespace of a cluster.

    Args:
        client: a `kubeflow.training.TrainingClient`.
        namespace: where the jobs are.
        kind: of the jobs.
    """

    def __init__(self, client: Any, namespace: str, kind: JobKind) -> None:
        from kubernetes import client as kubernetes

        self.namespace, self.kind = namespace, kind
        self._jobs = {
            "group": kind.group,
            "version": kind.version,
            "plural": kind.plural,
            "namespace": namespace,
        }
        self.custom, self.core = client.custom_api, client.core_api
        self._network = kubernetes.NetworkingV1Api(self.core.api_client)

    def submit(self, documents: list[Document]) -> None:
        """Send a job and what it needs.

        What several jobs share (account, volume, network policy) is made where it is missing and otherwise left as it
        is; the job's ConfigMap goes when the job goes.

        Raises:
            ClusterError: a job of this name exists already, or the API server cannot be reached or refuses.
        """
        job, environment = self.kind.job(documents), self.kind.environment(documents)
        name, map_name = job["metadata"]["name"], environment["metadata"]["name"]
        if (existing := self.job(name)) is not None:
            raise ClusterError(
                f"job {name} exists already ({self.kind.phase(existing)}): `dho logs {name} -f` follows it, "
                f"`dho stop {name}` removes it, --name makes another"
            )

        for document in documents:
            if document not in (job, environment):
                self._make(document)
        if not self._make(environment):
            with self._errors(f"ConfigMap {map_name}"):
                self.core.replace_namespaced_config_map(map_name, self.namespace, environment, **self._limits())

        with self._errors(f"job {name}"):
            answer = self.custom.create_namespaced_custom_object(
                **self._jobs, body=job, field_validation="Strict", **self._limits()
            )
        owner = {"apiVersion": job["apiVersion"], "kind": job["kind"], "name": name, "uid": answer["metadata"]["uid"]}
        with self._errors(f"ConfigMap {map_name}"):
            patch = {"metadata": {"ownerReferences": [owner]}}
            self.core.patch_namespaced_config_map(map_name, self.namespace, patch, **self._limits())

    def job(self, name: str) -> Document | None:
        """A job as the API server has it; None where there is none."""
        from kubernetes.client import ApiException

        with self._errors(f"job {name}"):
            try:
                job: Document = self.custom.get_namespaced_custom_object(**self._jobs, name=name, **self._limits())
            except ApiException as error:
                if error.status == 404 and name in message_of(error):
                    return None
                raise
        return job

    def jobs(self) -> list[Document]:
        """The jobs of this project, oldest first."""
        with self._errors("the jobs"):
            answer = self.custom.list_namespaced_custom_object(**self._jobs, label_selector=PART_OF, **self._limits())
        return sorted(answer["items"], key=lambda job: str(job["metadata"]["creationTimestamp"]))

    def delete(self, name: str) -> None:
        """Delete a job; its pods get SIGTERM and write a checkpoint. Raises `ClusterError`, also if there is none."""
        if self.job(name) is None:
            raise self.no_job(name)
        with self._errors(f"job {name}"):
            self.custom.delete_namespaced_custom_object(
                **self._jobs, name=name, propagation_policy="Foreground", **self._limits()
            )

    def wait_until_gone(self, name: str, max_wait_s: float = 180.0) -> None:
        """Wait until a job that was deleted, and with it its pods, is gone; raises `ClusterError`."""
        from kubernetes.watch import Watch

        call, arguments = self.list_and_watch("job", name)
        deadline = time.monotonic() + max_wait_s
        while self.job(name) is not None:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"job {name} is still being deleted after {max_wait_s:.0f} s; "
                    f"`kubectl describe {self.kind.name.lower()} {name}`"
                )
            with self._errors(f"job {name}"):
                for event in Watch(return_type="object").stream(call, **arguments, timeout_seconds=10):
                    if event["type"] == "DELETED":
                        break

    def no_job(self, name: str) -> ClusterError:
        """The error that says which jobs there are."""
        names = ", ".join(job["metadata"]["name"] for job in self.jobs()) or "none"
        return ClusterError(f"no job {name} in namespace {self.namespace}; there: {names}")

    def pod(self, name: str, replica: str) -> str:
        """The name of the newest pod that is a replica of a job, such as `worker-3`; raises `ClusterError`."""
        with self._errors(f"the pods of {name}"):
            answer = self.core.list_namespaced_pod(
                self.namespace,
                label_selector=self.kind.selector(name),
                _preload_content=False,
                **self._limits(),
            )
        pods = sorted(json.loads(answer.data)["items"], key=lambda pod: str(pod["metadata"]["creationTimestamp"]))
        names = {self.kind.replica_of(pod): str(pod["metadata"]["name"]) for pod in pods}
        if replica not in names:
            raise ClusterError(f"no pod {replica} of job {name}; there: {', '.join(sorted(names)) or 'none'}")
        return names[replica]

    def log(self, pod: str, container: str | None = None, **options: Any) -> str:
        """A container's log as it is now.

        Args:
            pod: its name.
            container: None takes the one that trains.
            options: of the API, such as `tail_lines` and `previous`.

        Raises:
            ClusterError: there is no such log, or the API server cannot be reached.
        """
        container = container or self.kind.container
        with self._errors(f"the log of {pod}"):
            answer = self.core.read_namespaced_pod_log(
                pod, self.namespace, container=container, _preload_content=False, **options, **self._limits()
            )
            body: bytes = answer.data
            return body.decode(errors="replace")

    def list_and_watch(self, what: str, name: str) -> tuple[Callable[..., Any], dict[str, Any]]:
        """The function that lists (or watches) `job`, `pods` or `events` of a job, and its arguments."""
        if what == "job":
            return self.custom.list_namespaced_custom_object, {
                **self._jobs,
                "field_selector": f"metadata.name={name}",
            }
        if what == "pods":
            return self.core.list_namespaced_pod, {
                "namespace": self.namespace,
                "label_selector": self.kind.selector(name),
            }
        return self.core.list_namespaced_event, {"namespace": self.namespace, "field_selector": "type=Warning"}

    def _make(self, document: Document) -> bool:
        """Create an object; False where one of its name exists already."""
        from kubernetes.client import ApiException

        create = {
            "ConfigMap": self.core.create_namespaced_config_map,
            "ServiceAccount": self.core.create_namespaced_service_account,
            "PersistentVolumeClaim": self.core.create_namespaced_persistent_volume_claim,
            "NetworkPolicy": self._network.create_namespaced_network_policy,
        }.get(document["kind"])
        if create is None:
            raise ClusterError(
                f"k8s/{self.kind.base}: dho launch cannot make a {document['kind']}; apply it with kubectl and "
                "remove it there"
            )
        with self._errors(f"{document['kind']} {document['metadata']['name']}"):
            try:
                create(self.namespace, document, field_validation="Strict", **self._limits())
            except ApiException as error:
                if error.status != 409:
                    raise
                return False
        return True

    def _limits(self) -> dict[str, Any]:
        return {"_request_timeout": (MAX_CONNECT_S, MAX_ANSWER_S)}

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turn the client's errors into one line."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ApiException as error:
            text = message_of(error)
            advice = ""
            if error.status == 404 and text.startswith("namespaces "):
                advice = f"; `kubectl create namespace {self.namespace}`, or choose another with --namespace"
            elif error.status == 404 and "page not found" in text:
                advice = f"; {self.kind.operator}"
            elif error.status in (401, 403) and "quota" not in text:
                advice = "; check the rights of this kubeconfig's user"
            raise ClusterError(f"{what}: the API server says {error.status}: {text}{advice}") from error
        except (HTTPError, OSError) as error:
            host = self.core.api_client.configuration.host
            raise ClusterError(f"{what}: no answer from {host} ({cause_of(error)}); check KUBECONFIG") from error


def message_of(error: Any) -> str:
    """The message of an `ApiException` on one line."""
    try:
        text = json.loads(error.body)["message"]
    except (TypeError, ValueError, KeyError):
        text = error.body or error.reason
    return " ".join((text.decode(errors="replace") if isinstance(text, bytes) else str(text)).split())[:400]


def cause_of(error: BaseException) -> str:
    """What urllib3 wraps, without its wrapping."""
    inner = getattr(error, "reason", None)
    return cause_of(inner) if isinstance(inner, BaseException) else " ".join(str(error).split())[-200:]
