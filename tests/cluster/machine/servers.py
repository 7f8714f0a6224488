"""The servers that jobs need, from k8s/platform: MLflow on PostgreSQL, and S3; Secrets as in docs/platform.md."""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from cluster import ROOT, Cluster, wait_until
from mlflow import MlflowClient

NAMESPACE = "dho-platform"
WORKLOADS = {"postgres": "statefulset/postgres", "s3": "statefulset/s3", "mlflow": "deployment/mlflow"}
PORTS = {"s3": 8333, "mlflow": 5000}
START_S = 600


class Platform:
    """MLflow and S3 in the cluster, and how this process reaches them."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        """Credentials; of this user only."""
        self._forwards: list[subprocess.Popen[bytes]] = []
        self._make_secrets()
        for claim, size, user in (("data-postgres-0", "10Gi", 999), ("data-s3-0", "50Gi", 1000)):
            cluster.make_volume(NAMESPACE, claim, size, user)
        cluster.kubectl("apply", "-k", str(ROOT / "k8s/platform"), namespace=NAMESPACE)
        for workload in WORKLOADS.values():
            self._wait(workload)
        # What `dho` finds in a pod's environment, with addresses that hold here.
        self.environment = {
            "DHO_REMOTE": "s3://dho/dvc",
            "AWS_ENDPOINT_URL": self._address("s3"),
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_SHARED_CREDENTIALS_FILE": str(folder / "credentials"),
            "MLFLOW_TRACKING_URI": self._address("mlflow"),
        }
        self.mlflow = MlflowClient(self.environment["MLFLOW_TRACKING_URI"])

    def _make_secrets(self) -> None:
        key, secret, password = secrets.token_hex(10), secrets.token_hex(20), secrets.token_hex(16)
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identity = {"name": "dho", "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}
        made = {
            "s3": {"config.json": json.dumps({"identities": [identity]})},
            "dho-s3": {"credentials": f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"},
            "postgres": {"password": password, "pgpass": f"postgres:5432:mlflow:mlflow:{password}\n"},
        }
        self.folder.chmod(0o700)
        self.cluster.make_namespace(NAMESPACE)
        existing = json.loads(self.cluster.kubectl("get", "secrets", "-o", "json", namespace=NAMESPACE))["items"]
        for name, files in made.items():
            # A platform that runs already keeps its passwords: its database does.
            for kept in (item["data"] for item in existing if item["metadata"]["name"] == name):
                files.update({file: base64.b64decode(kept[file]).decode() for file in files})
            for file, text in files.items():
                (self.folder / file).write_text(text)
            self.cluster.make_secret(NAMESPACE, name, {file: self.folder / file for file in files})
        self.cluster.make_secret(self.cluster.namespace, "dho-s3", {"credentials": self.folder / "credentials"})

    @contextlib.contextmanager
    def without(self, server: str) -> Iterator[None]:
        """`mlflow`, `s3` or `postgres` down, until the end of the block."""
        workload = WORKLOADS[server]
        self.cluster.kubectl("scale", workload, "--replicas=0", namespace=NAMESPACE)
        pods = ["pod", "-l", f"app.kubernetes.io/name={server}"]
        self.cluster.kubectl(
            "delete", *pods, "--grace-period=0", "--force", namespace=NAMESPACE
        )  # it dies, it does not say goodbye
        self.cluster.kubectl("wait", *pods, "--for=delete", "--timeout=90s", namespace=NAMESPACE)
        try:
            yield
        finally:
            self.cluster.kubectl("scale", workload, "--replicas=1", namespace=NAMESPACE)
            self._wait(workload)

    def wait_for_s3(self) -> None:
        """Wait until S3 answers here.

        Pods of a node that was NotReady, if only because the API server was away, are out of the services for a while.
        """

        def answers() -> bool:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.environment['AWS_ENDPOINT_URL']}/healthz", timeout=5).close()
                return True
            return False

        wait_until(answers, START_S, "S3 does not answer")

    def close(self) -> None:
        for forward in self._forwards:
            forward.terminate()

    def _wait(self, workload: str) -> None:
        said = self.cluster.kubectl(
            "rollout",
            "status",
            workload,
            f"--timeout={START_S}s",
            check=False,
            timeout=START_S + 30,
            namespace=NAMESPACE,
        )
        if (
            "successfully rolled out" not in said
            and "roll out complete" not in said
            and "rolling update complete" not in said
        ):
            pods = self.cluster.kubectl("get", "pods,pvc,events", "-o", "wide", check=False, namespace=NAMESPACE)
            logs = self.cluster.kubectl(
                "logs", workload, "--all-containers", "--tail=40", check=False, namespace=NAMESPACE
            )
            raise AssertionError(f"{workload}: {said}\n{pods}\n{logs}")

    def _address(self, service: str) -> str:
        """The service's address in the cluster; from outside of another cluster, a forwarded port."""
        if self.cluster.own is not None:
            return f"http://{service}.{NAMESPACE}.svc:{PORTS[service]}"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            "kubectl",
            "--namespace",
            NAMESPACE,
            "port-forward",
            f"service/{service}",
            f"{port}:{PORTS[service]}",
        ]
        self._forwards.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return f"http://127.0.0.1:{port}"
            except OSError:
                assert time.monotonic() < deadline, f"{' '.join(command)}: no connection in 30 s"
                time.sleep(0.2)
