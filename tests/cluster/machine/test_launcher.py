"""`dho launch` against the real cluster: jobs that cannot start are explained, 64 nodes are followed by watching.

What it does while nodes and servers are lost is in test_training.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from cluster import ROOT, USER, Cluster
from proxy import Proxy

REVISION = "a" * 64
NOT_STARTED, INTERRUPTED = 4, 130
START_S = 60
QUOTA = {"kind": "ResourceQuota", "apiVersion": "v1", "metadata": {"name": "small"}, "spec": {"hard": {"pods": "1"}}}


@dataclass
class Space:
    """A namespace of its own, under PodSecurity `restricted`."""

    cluster: Cluster
    name: str

    def kubectl(self, *arguments: str, check: bool = True) -> str:
        return self.cluster.kubectl(*arguments, check=check, namespace=self.name)

    def secret(self) -> None:
        """Credentials that no server knows; without a key in them boto3 gives up at once."""
        self.kubectl("create", "secret", "generic", "dho-s3", "--from-literal=credentials=[default]\n")

    def claim(self) -> None:
        """A volume for the claim that comes with the job."""
        self.cluster.make_volume(self.name, "dho-checkpoints", "10Gi", USER)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "dho", *arguments, "--namespace", self.name]

    def dho(self, *arguments: str, timeout_s: float = 200) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """`dho launch` that Ctrl-C reaches, also in the background of a shell, which makes its children ignore it."""
        return subprocess.Popen(
            self.command("launch", "--revision", REVISION, "--name", "job", *arguments),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def launch(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.dho("launch", "--revision", REVISION, "--name", "job", *arguments)


@contextlib.contextmanager
def made(cluster: Cluster) -> Iterator[Space]:
    space = Space(cluster, f"t-{secrets.token_hex(4)}")
    cluster.make_namespace(space.name)
    try:
        yield space
    finally:
        space.kubectl("delete", "pytorchjobs", "--all", "--cascade=foreground", check=False)
        space.kubectl("delete", "namespace", space.name, "--wait=false")
        space.kubectl(
            "delete", "persistentvolume", f"{space.name}-dho-checkpoints", "--ignore-not-found", "--wait=false"
        )


@pytest.fixture
def space(cluster: Cluster) -> Iterator[Space]:
    with made(cluster) as space:
        yield space


@dataclass(frozen=True)
class Trouble:
    """A job that cannot start, and what has to be said of it."""

    words: str
    options: tuple[str, ...] = ()
    secret: bool = True
    claim: bool = True
    quota: bool = False

    def launch(self, space: Space) -> subprocess.CompletedProcess[str]:
        if self.secret:
            space.secret()
        if self.claim:
            space.claim()
        if self.quota:
            space.cluster.apply([QUOTA], namespace=space.name)
        return space.launch("--start-timeout", str(START_S), *self.options)


CANNOT_START = {
    "image": Trouble("image registry.invalid/dho:1 cannot be pulled: ", ("--image", "registry.invalid/dho:1")),
    "no node fits": Trouble("no node fits: 0/", ("--gpus", "8")),
    "quota": Trouble("no pod, for the namespace's quota: exceeded quota: small, requested: pods=1", quota=True),
    "volume": Trouble("its PersistentVolumeClaim is not bound", claim=False),
    "init container": Trouble("init container pull fails (exit code 1): dho: s3://dho/dvc/revisions/"),
    "secret": Trouble("Secret dho-s3 is missing in namespace t-", secret=False),
}


@pytest.fixture(scope="module")
def launched(cluster: Cluster) -> dict[str, tuple[subprocess.CompletedProcess[str], str]]:
    """All of them at the same time: what `dho launch` said, and the jobs afterwards; gone when a test adds nodes."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(CANNOT_START)) as pool:
        spaces = {name: stack.enter_context(made(cluster)) for name in CANNOT_START}
        done = {name: pool.submit(trouble.launch, spaces[name]) for name, trouble in CANNOT_START.items()}
        return {
            name: (future.result(), spaces[name].kubectl("get", "pytorchjobs", "-o", "name"))
            for name, future in done.items()
        }


@pytest.mark.parametrize("name", CANNOT_START)
def test_why_a_job_does_not_start_is_said_in_one_line(
    name: str, launched: dict[str, tuple[subprocess.CompletedProcess[str], str]]
) -> None:
    done, jobs = launched[name]
    assert done.returncode == NOT_STARTED, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    told = [line for line in lines if " does not start: " in line and CANNOT_START[name].words in line]
    assert len(told) == 1 and told[0].startswith("launch: "), done.stdout
    assert lines[-1].startswith(f"launch: job has not started in {START_S} s: ") and "`dho stop job" in lines[-1]
    assert "pytorchjob.kubeflow.org/job" in jobs


def test_a_job_in_kueues_queue_waits_and_is_listed_and_stopped(space: Space) -> None:
    with space.start("--queue", "team") as launch:
        assert launch.stdout is not None
        for line in launch.stdout:
            if "Suspended" in line:
                break
        assert line == "launch: job Suspended, 0 of 2 pods run; waits to be admitted by queue team\n"
        launch.send_signal(signal.SIGINT)
        rest = launch.stdout.read()
    assert launch.returncode == INTERRUPTED
    where = f"--namespace {space.name}"
    assert (
        rest == f"launch: job keeps running; `dho logs job -f {where}` follows it, `dho stop job {where}` removes it\n"
    )
    again = space.launch()
    assert again.returncode == 1
    assert again.stderr.startswith("dho: job job exists already (Suspended): ") and again.stderr.count("\n") == 1
    listed = space.dho("jobs").stdout
    assert re.search(r"job .*Suspended .*2", listed), listed
    assert space.dho("stop", "job").returncode == 0
    deadline = time.monotonic() + 60
    while (
        space.kubectl("get", "pytorchjobs,configmaps", "-o", "name").replace("configmap/kube-root-ca.crt", "").strip()
    ):
        assert time.monotonic() < deadline, "the job's ConfigMap has to go with the job"
        time.sleep(1)
    gone = space.dho("stop", "job")
    assert (gone.returncode, gone.stderr) == (1, f"dho: no job job in namespace {space.name}; there: none\n")


def proxied(folder: Path) -> tuple[Proxy, Path]:
    """A proxy in front of the API server, and a kubeconfig with which one goes through it."""
    text = Path(os.environ["KUBECONFIG"]).read_text()
    address = yaml.safe_load(text)["clusters"][0]["cluster"]["server"]
    server = urlsplit(address)
    proxy = Proxy(str(server.hostname), server.port or 443)
    (folder / "kubeconfig").write_text(text.replace(address, f"https://127.0.0.1:{proxy.port}"))
    return proxy, folder / "kubeconfig"


def test_an_api_server_out_of_reach_for_half_a_minute_is_waited_for_and_nothing_is_missed(
    space: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of this one client the connections break; test_training.py kills the API server under a job that runs."""
    proxy, kubeconfig = proxied(tmp_path)
    with monkeypatch.context() as patched:
        patched.setenv("KUBECONFIG", str(kubeconfig))
        launch = space.start("--queue", "team")
    with launch:
        assert launch.stdout is not None
        lines = iter(launch.stdout)
        assert next(line for line in lines if "Suspended" in line)
        for away_s in (30, 5):
            proxy.down()
            assert next(lines).startswith("launch: the API server does not answer (")
            time.sleep(away_s)
            if away_s == 5:
                space.kubectl("delete", "pytorchjob", "job")
            proxy.up()
            if away_s == 30:
                assert next(lines) == "launch: the API server answers again\n"
        assert next(lines) == f"dho: job job was deleted from namespace {space.name}\n"
    assert launch.returncode == 1


def test_a_namespace_that_is_not_there_is_said_with_what_to_do(cluster: Cluster) -> None:
    done = Space(cluster, "t-nowhere").launch()
    assert done.returncode == 1
    assert done.stderr.startswith(
        'dho: ServiceAccount dho: the API server says 404: namespaces "t-nowhere" not found; `kubectl create namespace'
    )
    assert done.stderr.count("\n") == 1


@pytest.fixture
def pretended(cluster: Cluster) -> Iterator[None]:
    """64 nodes with 8 GPUs each that only pretend (kwok)."""
    cluster.pretend_nodes(64)
    yield
    cluster.kubectl("delete", "nodes", *(f"gpu-{number}" for number in range(1, 65)))
    assert cluster.own is not None
    os.kill(int((cluster.own / "kwok.pid").read_text()), signal.SIGKILL)


@pytest.mark.nodes
def test_64_nodes_of_8_gpus_run_and_are_followed_by_watching(
    pretended: None,  # noqa: ARG001
    space: Space,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    space.claim()
    space.secret()
    proxy, kubeconfig = proxied(tmp_path)
    began = time.monotonic()
    with monkeypatch.context() as patched:
        patched.setenv("KUBECONFIG", str(kubeconfig))
        launch = space.start("--nodes", "64", "--gpus", "8")
    with launch:
        assert launch.stdout is not None
        line = next(line for line in launch.stdout if "64 of 64 pods run" in line)
        assert line.startswith("launch: job Running, 64 of 64 pods run")
        took = time.monotonic() - began
        pods = json.loads(space.kubectl("get", "pods", "-o", "json"))["items"]
        assert len({pod["spec"]["nodeName"] for pod in pods}) == len(pods) == 64
        time.sleep(5)
        starting, before = proxy.passed, proxy.passed
        time.sleep(30)
        following = proxy.passed - before
        launch.send_signal(signal.SIGINT)
        rest = launch.stdout.read()
    assert launch.returncode == INTERRUPTED, rest
    print(f"64 pods run after {took:.0f} s and {starting / 1e6:.2f} MB; 30 s of following: {following / 1e6:.3f} MB")
    assert took < 120
    # One list of these 64 pods is some 0.9 MB, so asking every second would be 27 MB. What comes is pods that change.
    assert 0 < following < 2e6
    space.kubectl("delete", "pytorchjobs", "--all", "--cascade=orphan")
    space.kubectl("delete", "pods", "--all", "--force", "--grace-period=0")
