"""The API server, through Kubeflow's SDK: submit a job, list jobs, read logs, delete. Whatever it answers that a user can mend is one line.

cluster = connect("dho")
cluster.submit(documents)
for job in cluster.jobs(): ...
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from dho.cluster.manifest import Document, kind
from dho.core.errors import ClusterError

JOBS = {"group": "kubeflow.org", "version": "v1", "plural": "pytorchjobs"}
CONTAINER = "pytorch"
JOB_LABEL = "training.kubeflow.org/job-name"
PART_OF = "app.kubernetes.io/part-of=dho"
CONNECT_S, ANSWER_S = 5, 30
"""Longest wait for a connection and for an answer, seconds."""
OPERATOR = "install Kubeflow's training operator (docs/platform.md)"


def connect(namespace: str) -> Cluster:
    """The cluster of KUBECONFIG (or ~/.kube/config, or the pod one is in); raises `ClusterError`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from kubeflow.training import TrainingClient
        from kubernetes.config import ConfigException
        from urllib3 import disable_warnings
        from urllib3.exceptions import InsecureRequestWarning
    disable_warnings(InsecureRequestWarning)  # whoever wrote insecure-skip-tls-verify into the kubeconfig knows it
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it tells of each attempt
    try:
        client = TrainingClient(namespace=namespace)
    except ConfigException as error:
        raise ClusterError(f"no cluster to talk to: {' '.join(str(error).split())}; set KUBECONFIG") from error
    return Cluster(client, namespace)


class Cluster:
    """One namespace of a cluster.

    Args:
        client: a `kubeflow.training.TrainingClient`.
        namespace: where the jobs are.
    """

    def __init__(self, client: Any, namespace: str) -> None:
        from kubernetes import client as kubernetes

        self.namespace = namespace
        self.custom, self.core = client.custom_api, client.core_api
        self._network = kubernetes.NetworkingV1Api(self.core.api_client)

    def submit(self, documents: list[Document]) -> None:
        """Send a job and what it needs. What several jobs share (account, volume, network policy) is made where it is missing and
        otherwise left as it is; the job's ConfigMap goes when the job goes.

        Raises:
            ClusterError: there is a job of this name already, or the API server cannot be reached or refuses.
        """
        job, environment = kind(documents, "PyTorchJob"), kind(documents, "ConfigMap")
        name = job["metadata"]["name"]
        if (there := self.job(name)) is not None:
            raise ClusterError(
                f"job {name} is there already ({phase(there)}): `dho logs {name} -f` follows it, `dho stop {name}` removes it, "
                "--name makes another"
            )
        for document in documents:
            if document["kind"] not in ("PyTorchJob", "ConfigMap"):
                self._make(document)
        if not self._make(environment):
            with self._errors(f"ConfigMap {environment['metadata']['name']}"):
                self.core.replace_namespaced_config_map(
                    environment["metadata"]["name"], self.namespace, environment, **self._limits()
                )
        with self._errors(f"job {name}"):
            made = self.custom.create_namespaced_custom_object(
                **JOBS, namespace=self.namespace, body=job, field_validation="Strict", **self._limits()
            )
        owner = {"apiVersion": job["apiVersion"], "kind": job["kind"], "name": name, "uid": made["metadata"]["uid"]}
        with self._errors(f"ConfigMap {environment['metadata']['name']}"):
            patch = {"metadata": {"ownerReferences": [owner]}}
            self.core.patch_namespaced_config_map(
                environment["metadata"]["name"], self.namespace, patch, **self._limits()
            )

    def job(self, name: str) -> Document | None:
        """A PyTorchJob as the API server has it; None where there is none."""
        from kubernetes.client import ApiException

        with self._errors(f"job {name}"):
            try:
                found: Document = self.custom.get_namespaced_custom_object(
                    **JOBS, namespace=self.namespace, name=name, **self._limits()
                )
            except ApiException as error:
                if error.status == 404 and name in said(error):
                    return None
                raise
        return found

    def jobs(self) -> list[Document]:
        """The jobs of this project, oldest first."""
        with self._errors("the jobs"):
            found = self.custom.list_namespaced_custom_object(
                **JOBS, namespace=self.namespace, label_selector=PART_OF, **self._limits()
            )
        return sorted(found["items"], key=lambda job: str(job["metadata"]["creationTimestamp"]))

    def delete(self, name: str) -> None:
        """Delete a job; its pods get SIGTERM and write a checkpoint. Raises `ClusterError` also where there is no such job."""
        if self.job(name) is None:
            raise self.no_job(name)
        with self._errors(f"job {name}"):
            self.custom.delete_namespaced_custom_object(
                **JOBS, namespace=self.namespace, name=name, propagation_policy="Foreground", **self._limits()
            )

    def wait_until_gone(self, name: str, patience_s: float = 180.0) -> None:
        """Wait until a job that was deleted, and with it its pods, is gone; raises `ClusterError`."""
        from kubernetes.watch import Watch

        call, arguments = self.list_and_watch("job", name)
        deadline = time.monotonic() + patience_s
        while self.job(name) is not None:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"job {name} is still being deleted after {patience_s:.0f} s; `kubectl describe pytorchjob {name}`"
                )
            with self._errors(f"job {name}"):
                for event in Watch(return_type="object").stream(call, **arguments, timeout_seconds=10):
                    if event["type"] == "DELETED":
                        break

    def no_job(self, name: str) -> ClusterError:
        """The error that says which jobs there are."""
        names = ", ".join(job["metadata"]["name"] for job in self.jobs()) or "none"
        return ClusterError(f"no job {name} in namespace {self.namespace}; there: {names}")

    def log(self, pod: str, container: str = CONTAINER, **options: Any) -> str:
        """A container's log as it is now; raises `ClusterError`."""
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
                **JOBS,
                "namespace": self.namespace,
                "field_selector": f"metadata.name={name}",
            }
        if what == "pods":
            return self.core.list_namespaced_pod, {"namespace": self.namespace, "label_selector": f"{JOB_LABEL}={name}"}
        return self.core.list_namespaced_event, {"namespace": self.namespace, "field_selector": "type=Warning"}

    def _make(self, document: Document) -> bool:
        """Create an object; False where one of its name is there already."""
        from kubernetes.client import ApiException

        create = {
            "ConfigMap": self.core.create_namespaced_config_map,
            "ServiceAccount": self.core.create_namespaced_service_account,
            "PersistentVolumeClaim": self.core.create_namespaced_persistent_volume_claim,
            "NetworkPolicy": self._network.create_namespaced_network_policy,
        }.get(document["kind"])
        if create is None:
            raise ClusterError(
                f"k8s/base/pytorchjob.yaml: dho launch cannot make a {document['kind']}; apply it with kubectl and take it out"
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
        return {"_request_timeout": (CONNECT_S, ANSWER_S)}

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turn the client's errors into one line."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ApiException as error:
            text = said(error)
            advice = ""
            if error.status == 404 and text.startswith("namespaces "):
                advice = f"; `kubectl create namespace {self.namespace}`, or choose another with --namespace"
            elif error.status == 404 and "page not found" in text:
                advice = f"; {OPERATOR}"
            elif error.status in (401, 403) and "quota" not in text:
                advice = "; check the rights of this kubeconfig's user"
            raise ClusterError(f"{what}: the API server says {error.status}: {text}{advice}") from error
        except (HTTPError, OSError) as error:
            raise ClusterError(
                f"{what}: no answer from {self.core.api_client.configuration.host} ({reason(error)}); check KUBECONFIG"
            ) from error


def said(error: Any) -> str:
    """The message of an `ApiException` on one line."""
    try:
        text = json.loads(error.body)["message"]
    except (TypeError, ValueError, KeyError):
        text = error.body or error.reason
    return " ".join((text.decode(errors="replace") if isinstance(text, bytes) else str(text)).split())[:400]


def reason(error: BaseException) -> str:
    """What urllib3 wraps, without its wrapping."""
    inner = getattr(error, "reason", None)
    return reason(inner) if isinstance(inner, BaseException) else " ".join(str(error).split())[-200:]


def phase(job: Document) -> str:
    """The newest condition of a job that holds: Created, Running, Restarting, Suspended, Succeeded or Failed; Pending before the first."""
    holding = [
        condition["type"] for condition in job.get("status", {}).get("conditions", []) if condition["status"] == "True"
    ]
    for last in ("Succeeded", "Failed"):
        if last in holding:
            return last
    return holding[-1] if holding else "Pending"


def replicas(job: Document) -> int:
    """Pods that a job asks for."""
    return sum(int(replica.get("replicas", 1)) for replica in job["spec"]["pytorchReplicaSpecs"].values())


def rank_zero(job: Document) -> str:
    """The pod whose first process is rank 0: the Master, or where there is none the first Worker, which hosts the rendezvous."""
    role = "master" if "Master" in job["spec"]["pytorchReplicaSpecs"] else "worker"
    return f"{job['metadata']['name']}-{role}-0"
