"""The cluster of the tests, and what happens to real ones: nodes die, disks and memory fill up, the API server is away.

    cluster.kubectl("get", "pods")              # in the namespace of the tests
    cluster.lose_node("node-2"); cluster.start_node("node-2")

On our own cluster (cluster.sh; DHO_CLUSTER is its folder) all of it works; on another one what needs the machine below
is skipped.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dho.cluster import api
from dho.cluster.pytorchjob import PyTorchJob

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
USER = 10001
AT_ONCE = "--server-side"
"""For what two test processes may make at once: otherwise kubectl asks, then creates, and one of them is refused."""

# Fills the container's memory with processes that are each smaller than a trainer, so that the kernel chooses a trainer
# to kill; then ends.
OVERFILL = """
import glob, os, select, signal, time
def trainers():
    found = set()
    for stat in glob.glob("/proc/[0-9]*/stat"):
        try:
            first = open(stat).read().rsplit(")", 1)[1].split()[1] == "1"
            if first and "train" in open(stat.replace("stat", "cmdline")).read():
                found.add(stat)
        except OSError:
            pass
    return found
before, children = trainers(), []
assert before, "no trainer in this container"
try:
    for _ in range(200):
        if not before <= trainers():
            break
        full, fills = os.pipe()
        if not (child := os.fork()):
            held = bytearray(os.urandom(1 << 20)) * 96
            os.write(fills, b".")
            time.sleep(120)
            os._exit(0)
        os.close(fills)  # so that one the kernel has chosen instead is not waited for
        children.append(child)
        # One at a time, however slow: those under way would otherwise go on filling after a trainer is gone, until
        # torchrun is the largest.
        while before <= trainers() and not select.select([full], [], [], 0.1)[0]:
            pass
        os.close(full)
    else:
        raise SystemExit("the container has no memory limit")
finally:
    for child in children:
        os.kill(child, signal.SIGKILL)
"""


class Cluster:
    """A Kubernetes cluster with the training operator."""

    def __init__(self, own: Path | None, namespace: str) -> None:
        self.own = own
        """Folder of our own cluster; None for another one."""
        self.namespace = namespace

    def kubectl(
        self,
        *arguments: str,
        check: bool = True,
        stdin: str | None = None,
        timeout: float = 300,
        namespace: str | None = None,
    ) -> str:
        """Run kubectl; returns what it printed (with `check=False` its errors as well)."""
        command = ["kubectl", "--namespace", namespace or self.namespace, *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout if check else done.stdout + done.stderr

    def apply(self, documents: list[dict[str, Any]], *options: str, namespace: str | None = None) -> str:
        """`kubectl apply` of documents."""
        return self.kubectl("apply", "-f", "-", *options, stdin=yaml.safe_dump_all(documents), namespace=namespace)

    def get(self, kind: str, name: str, namespace: str | None = None) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.kubectl("get", kind, name, "-o", "json", namespace=namespace))
        return answer

    def pods(self, selector: str, namespace: str | None = None) -> list[dict[str, Any]]:
        answer = self.client.core.list_namespaced_pod(
            namespace or self.namespace, label_selector=selector, _preload_content=False
        )
        items: list[dict[str, Any]] = json.loads(answer.data)["items"]
        return items

    def kustomize(self, overlay: str) -> list[dict[str, Any]]:
        """The documents of k8s/pytorchjob/overlays/<overlay>."""
        return list(yaml.safe_load_all(self.kubectl("kustomize", str(ROOT / "k8s/pytorchjob/overlays" / overlay))))

    @functools.cached_property
    def client(self) -> api.Cluster:
        """For what is asked every second: a kubectl takes 70 ms of CPU each time, and what is watched needs it."""
        return api.connect(self.namespace, PyTorchJob())

    def make_namespace(self, name: str) -> None:
        """A namespace in which PodSecurity `restricted` is enforced."""
        labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
        self.apply([{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}], AT_ONCE)

    def make_secret(self, namespace: str, name: str, files: dict[str, Path]) -> None:
        """A Secret with a file a key, replacing one of that name."""
        made = self.kubectl(
            "create", "secret", "generic", name, "--dry-run=client", "-o", "yaml",
            *(f"--from-file={key}={path}" for key, path in files.items()), namespace=namespace,
        )  # fmt: skip
        self.kubectl("apply", "-f", "-", stdin=made, namespace=namespace)

    def make_volume(self, namespace: str, claim: str, size: str, user: int) -> None:
        """A volume for a PersistentVolumeClaim that is yet to come; another cluster has a storage class for that."""
        if self.own is None:
            return
        folder = self._volume(namespace, claim)
        folder.mkdir(parents=True, exist_ok=True)
        os.chown(folder, user, user)
        self.apply([{
            "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": f"{namespace}-{claim}"},
            "spec": {
                "capacity": {"storage": size}, "accessModes": ["ReadWriteOnce", "ReadWriteMany"],
                "persistentVolumeReclaimPolicy": "Retain", "claimRef": {"namespace": namespace, "name": claim},
                "hostPath": {"path": str(folder), "type": "Directory"},
            },
        }], AT_ONCE)  # fmt: skip

    def _volume(self, namespace: str, claim: str) -> Path:
        assert self.own is not None
        return self.own / "volumes" / f"{namespace}-{claim}"

    def _machine(self, need: str) -> Path:
        """Folder of our own cluster; skips the test on another one."""
        if self.own is None:
            pytest.skip(f"{need} on this cluster: not ours to touch")
        return self.own

    # Checkpoints: our own cluster has a small file system for them, which up.sh mounts.

    @property
    def checkpoints(self) -> Path:
        """The volume of PersistentVolumeClaim dho-checkpoints, as seen from here."""
        self._machine("looking into the checkpoint volume")
        return self._volume(self.namespace, "dho-checkpoints")

    def clear_checkpoints(self) -> None:
        """Forget earlier jobs' checkpoints. No job may be running."""
        if self.own is None:
            self.kubectl("delete", "pvc", "dho-checkpoints", "--ignore-not-found", "--wait=true")
            return
        for path in self.checkpoints.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def newest_checkpoint(self) -> int:
        """Step of the newest complete checkpoint; 0 for none."""
        return max((int(path.name.removeprefix("step-")) for path in self.checkpoints.glob("*/step-*")), default=0)

    @contextlib.contextmanager
    def full_checkpoint_volume(self) -> Iterator[None]:
        """The checkpoint volume without a free byte, until the end of the block."""
        filler = self.checkpoints / "filler"
        with filler.open("wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        try:
            yield
        finally:
            filler.unlink()

    # What a job meets

    def overfill_memory(self, pod: str) -> None:
        """Take all the memory that a pod's container may have, until the kernel kills a trainer in it."""
        # The kernel may end this command as well; its last word does not matter, the test looks at the job.
        self.kubectl("exec", pod, "-c", PyTorchJob.container, "--", "python", "-c", OVERFILL, check=False, timeout=180)

    def lose_node(self, node: str) -> None:
        """Power off: every process of the node dies at once; returns when the control plane has noticed."""
        subprocess.run([HERE / "lose.sh", self._machine("losing a node"), _number(node)], check=True)
        self.wait_not_ready(node)

    def start_node(self, node: str) -> None:
        """Power on; returns when the node is Ready."""
        subprocess.run([HERE / "node.sh", self._machine("starting a node"), _number(node)], check=True)
        self.wait_ready(node)

    def ready(self, node: str) -> bool:
        """Whether a node is Ready and takes pods: what it was tainted with while it was away goes a moment later."""
        columns = '{.status.conditions[?(@.type=="Ready")].status} {.spec.taints[*].key}'
        status, *taints = self.kubectl("get", "node", node, "-o", f"jsonpath={columns}", check=False).split() or [""]
        return status == "True" and not any(taint.startswith("node.kubernetes.io/") for taint in taints)

    def wait_not_ready(self, node: str) -> None:
        """Wait until the control plane has noticed that a node is gone."""
        wait_until(lambda: not self.ready(node), 90, f"{node} is still Ready")

    def wait_ready(self, node: str) -> None:
        wait_until(lambda: self.ready(node), 180, f"{node} is not Ready")

    def heal(self) -> None:
        """Start every node that a test has lost, and the API server; returns when all nodes take pods."""
        if self.own is None:
            return
        if not _alive(self.own / "apiserver.pid"):
            self._start_api_server()
        for folder in sorted(self.own.glob("node-*")):
            if _alive(folder / "kubelet.pid"):
                self.wait_ready(folder.name)
            else:
                self.start_node(folder.name)

    @contextlib.contextmanager
    def without_api_server(self) -> Iterator[None]:
        """The API server killed, until the end of the block."""
        pid = self._machine("stopping the API server") / "apiserver.pid"
        os.kill(int(pid.read_text()), 9)
        pid.unlink()
        try:
            yield
        finally:
            self._start_api_server()

    def _start_api_server(self) -> None:
        subprocess.run([HERE / "component.sh", self._machine("starting the API server"), "apiserver"], check=True)
        wait_until(
            lambda: self.kubectl("get", "--raw", "/readyz", check=False) == "ok",
            90,
            "the API server does not come back",
        )

    def pretend_nodes(self, count: int, gpus: int = 8) -> None:
        """Add nodes `gpu-1` ... that report pods as running and run nothing (kwok), tainted as GPU nodes are."""
        subprocess.run([HERE / "pretend.sh", self._machine("adding nodes"), str(count), str(gpus)], check=True)
        wait_until(
            lambda: all(self.ready(f"gpu-{number}") for number in (1, count)), 120, "the pretended nodes are not Ready"
        )


def _number(node: str) -> str:
    found = re.fullmatch(r"node-(\d+)", node)
    assert found, f"{node} is not a node with a kubelet"
    return found[1]


def _alive(pid: Path) -> bool:
    return pid.exists() and Path("/proc", pid.read_text().strip()).exists()


def wait_until(condition: Any, seconds: float, otherwise: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{otherwise} after {seconds:.0f} s"
        time.sleep(0.5)
