"""A kind of job is one class: one from outside, named "module:Class", is rendered, checked, submitted and followed."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from dho.catalogue.jobs import JOB_KINDS
from dho.cluster.checks import problems
from dho.cluster.job import Document, Launch, job_kind
from dho.cluster.launcher import prepare, run_stage
from dho.cluster.manifest import render
from dho.config import from_dict
from dho.core.errors import ClusterError, ConfigError
from dho.core.workspace import Workspace

ROOT = Path(__file__).parents[2]
KIND = "fixed_jobs:FixedJob"
MODULE = """
from dho.cluster.job import JobKind
from dho.cluster.pytorchjob import PyTorchJob


class FixedJob(PyTorchJob):
    name, group, version, plural = "FixedJob", "jobs.example.org", "v2", "fixedjobs"
    folder, container, job_label = "fixedjob", "trainer", "jobs.example.org/job"
    operator = "install the operator of FixedJob"
    cannot = {"elastic": "its operator starts all pods or none"}

    def replica_of(self, pod):
        labels = pod["metadata"]["labels"]
        return f"{labels['jobs.example.org/role']}-{labels['jobs.example.org/number']}"


class Misspelt(FixedJob):
    cannot = {"elastc": "no"}


class HalfDone(JobKind):
    name = "HalfDone"


def not_a_class():
    pass
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a kind of job of the user's own: its class, its manifests, and params.yaml that names it."""
    (tmp_path / "fixed_jobs.py").write_text(MODULE)
    shutil.copytree(ROOT / "k8s/pytorchjob", tmp_path / "k8s/fixedjob")
    (tmp_path / "k8s/fixedjob/base/pytorchjob.yaml").rename(tmp_path / "k8s/fixedjob/base/fixedjob.yaml")
    for path in (tmp_path / "k8s/fixedjob").rglob("*.yaml"):
        text = path.read_text().replace("kubeflow.org/v1\nkind: PyTorchJob", "jobs.example.org/v2\nkind: FixedJob")
        text = text.replace("PyTorchJob", "FixedJob").replace("name: pytorch ", "name: trainer ")
        path.write_text(text.replace("containerName: pytorch,", "containerName: trainer,"))
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"launch": {"kubernetes": {"kind": KIND}}}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fixed_jobs", raising=False)
    return tmp_path


def dho(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dho", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def test_a_kind_from_outside_is_rendered_and_checked(project: Path) -> None:  # noqa: ARG001
    documents = prepare(Launch(kind=KIND, nodes=4, gpus=2, queue="team", name="mine", image="r/x:1"))
    job = documents[-1]
    assert (job["apiVersion"], job["kind"], job["metadata"]["name"]) == ("jobs.example.org/v2", "FixedJob", "mine")
    assert job["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 3
    assert job["spec"]["nprocPerNode"] == "2"


def test_a_wrong_manifest_of_a_kind_from_outside_is_refused_in_its_own_words(project: Path) -> None:  # noqa: ARG001
    kind = job_kind(KIND)
    documents = render(Launch(kind=KIND))
    documents[-1]["apiVersion"] = "kubeflow.org/v1"
    documents[-1]["spec"]["runPolicy"]["cleanPodPolicy"] = "Sometimes"
    for pod in kind.pods(documents).values():
        pod["containers"][0]["name"] = "pytorch"
    assert problems(documents, kind) == [
        "FixedJob: spec.runPolicy.cleanPodPolicy is Sometimes; expected one of All, Running, None",
        "FixedJob: apiVersion is kubeflow.org/v1; expected jobs.example.org/v2",
        "Master's pod: container 'pytorch' is not named trainer; the operator looks for that name",
        "Worker's pod: container 'pytorch' is not named trainer; the operator looks for that name",
    ]


def test_dho_launch_renders_the_kind_that_params_yaml_names(project: Path) -> None:
    done = dho("launch", "--nodes", "1", "--dry-run", cwd=project)
    assert done.returncode == 0, done.stderr
    assert list(yaml.safe_load_all(done.stdout))[-1]["kind"] == "FixedJob"


def test_what_a_kind_cannot_do_is_refused_before_any_work(project: Path) -> None:
    """Before k8s/ is read, and before anything is uploaded: here is neither a manifest nor a DVC remote."""
    shutil.rmtree(project / "k8s")
    line = (
        "FixedJob cannot do elastic 1:4: its operator starts all pods or none; leave it out, or choose another "
        "launch.kubernetes.kind"
    )
    done = dho("launch", "--elastic", "1:4", cwd=project)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"dho: {line}\n")
    settings = {"target": "kubernetes", "kubernetes": {"kind": KIND, "elastic": "1:4"}}
    with pytest.raises(ClusterError) as caught:
        run_stage("train", from_dict({"launch": settings}), Workspace(project))
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("feature", "launch"),
    [
        ("nodes", Launch(nodes=2)),
        ("gpus", Launch(nodes=1, gpus=8)),
        ("elastic", Launch(nodes=1, elastic=(1, 4))),
        ("queue", Launch(nodes=1, queue="team")),
        ("teach", Launch(nodes=1, stage="teach")),
    ],
)
def test_every_feature_can_be_one_that_a_kind_lacks(feature: str, launch: Launch) -> None:
    whole = job_kind("PyTorchJob")
    assert whole.cannot == {}
    whole.refuse(launch)
    lacking = type("Lacking", (type(whole),), {"cannot": {feature: "for a reason"}})()
    lacking.refuse(Launch(nodes=1))
    with pytest.raises(ClusterError, match=r"cannot do .*: for a reason; leave it out"):
        lacking.refuse(launch)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("TrainJb", "kind of job is 'TrainJb'; expected one of PyTorchJob, or module:Class"),
        ("no_such_module:Job", "no_such_module:Job: no module 'no_such_module' to import"),
        ("fixed_jobs:Nothing", "fixed_jobs:Nothing: module 'fixed_jobs' has no 'Nothing'"),
        ("fixed_jobs:not_a_class", "fixed_jobs:not_a_class: not a JobKind; expected a subclass of"),
        ("fixed_jobs:HalfDone", "fixed_jobs:HalfDone: it lacks min_replicas, phase, "),
        ("fixed_jobs:Misspelt", "fixed_jobs:Misspelt: cannot names elastc; expected some of nodes, gpus, elastic"),
    ],
)
def test_a_name_that_is_no_kind_of_job_is_one_line(project: Path, name: str, line: str) -> None:  # noqa: ARG001
    with pytest.raises(ConfigError) as caught:
        render(Launch(kind=name))
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_a_kind_that_the_catalogue_does_not_have_is_refused_as_params_yaml_is_loaded() -> None:
    assert from_dict({}).launch.kubernetes.kind in JOB_KINDS
    assert from_dict({"launch": {"kubernetes": {"kind": KIND}}}).launch.kubernetes.kind == KIND
    with pytest.raises(
        ConfigError, match=r"launch\.kubernetes\.kind is 'TrainJb'; expected one of .*PyTorchJob.*module"
    ):
        from_dict({"launch": {"kubernetes": {"kind": "TrainJb"}}})


ENDED = {"conditions": [{"type": "Running", "status": "False"}, {"type": "Succeeded", "status": "True"}]}


def pod(role: str, number: int) -> Document:
    labels = {"jobs.example.org/job": "mine", "jobs.example.org/role": role, "jobs.example.org/number": str(number)}
    name = f"mine-{role}-{number}-x7k2"  # not to be guessed from the job's name
    status = {"name": "trainer", "containerID": f"c-{name}", "state": {"terminated": {"exitCode": 0}}}
    return {
        "metadata": {"name": name, "uid": name, "labels": labels, "creationTimestamp": "2026-01-01T00:00:01Z"},
        "status": {"phase": "Succeeded", "containerStatuses": [status]},
    }


API = "/api/v1/namespaces/dho"
JOBS = "/apis/jobs.example.org/v2/namespaces/dho/fixedjobs"
PODS = [pod("master", 0), pod("worker", 0), pod("worker", 1)]


class ApiServer(BaseHTTPRequestHandler):
    """As much of an API server as jobs need that succeed at once; of jobs it knows FixedJobs and nothing else."""

    server: ThreadingHTTPServer

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        log = re.fullmatch(rf"{API}/pods/([^/]+)/log", url.path)
        if query.get("watch"):
            time.sleep(0.2)
            self.answer(200)
        elif url.path == JOBS:
            self.answer(200, {"metadata": {"resourceVersion": "1"}, "items": list(self.jobs.values())})
        elif url.path.startswith(f"{JOBS}/"):
            name = url.path.rpartition("/")[2]
            self.answer(*((200, self.jobs[name]) if name in self.jobs else (404, {"message": f"{name} not found"})))
        elif url.path == f"{API}/pods" and query.get("labelSelector") == "jobs.example.org/job=mine":
            self.answer(200, {"metadata": {"resourceVersion": "1"}, "items": PODS})
        elif url.path == f"{API}/events":
            self.answer(200, {"metadata": {"resourceVersion": "1"}, "items": []})
        elif log and query.get("container") == "trainer":
            stamp = "2026-01-01T00:00:02Z " if query.get("timestamps") else ""
            self.answer(200, f"{stamp}the log of {log[1]}\n")
        else:
            self.answer(404, {"message": f"404 page not found: {self.path}"})

    def do_POST(self) -> None:
        document = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if document["kind"] == "FixedJob" and urlsplit(self.path).path == JOBS:
            document["metadata"] |= {"uid": "job", "creationTimestamp": "2026-01-01T00:00:00Z"}
            self.jobs[document["metadata"]["name"]] = document | {"status": ENDED}
        self.answer(201, document)

    def do_PATCH(self) -> None:
        self.answer(200, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def do_DELETE(self) -> None:
        del self.jobs[urlsplit(self.path).path.removeprefix(f"{JOBS}/")]
        self.answer(200, {})

    @property
    def jobs(self) -> dict[str, Document]:
        jobs: dict[str, Document] = vars(self.server).setdefault("jobs", {})
        return jobs

    def answer(self, status: int, body: Document | str = "") -> None:
        content = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing: the output is the tests'."""


@pytest.fixture
def api_server(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), ApiServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "t", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "t", "user": {"token": "t"}}],
        "contexts": [{"name": "t", "context": {"cluster": "t", "user": "t"}}],
        "current-context": "t",
    }
    (project / "kubeconfig").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(project / "kubeconfig"))
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("api_server")
def test_a_job_of_a_kind_from_outside_is_submitted_followed_listed_and_stopped(project: Path) -> None:
    launched = dho("launch", "--name", "mine", "--revision", "a" * 64, "--nodes", "3", cwd=project)
    assert launched.returncode == 0, launched.stdout + launched.stderr
    first, log, last = launched.stdout.splitlines()
    assert first == f"launch: mine in namespace dho, revision {'a' * 64}"
    assert log == "the log of mine-master-0-x7k2"
    assert last.startswith("launch: mine Succeeded after ")
    again = dho("launch", "--name", "mine", "--revision", "a" * 64, cwd=project)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr.startswith("dho: job mine exists already (Succeeded): `dho logs mine -f` follows it")

    assert re.search(r"mine .*Succeeded .*3 ", dho("jobs", cwd=project).stdout)
    assert dho("logs", "mine", cwd=project).stdout == "the log of mine-master-0-x7k2\n"
    assert dho("logs", "mine", "--pod", "worker-1", cwd=project).stdout == "the log of mine-worker-1-x7k2\n"
    missing = dho("logs", "mine", "--pod", "worker-9", cwd=project)
    assert (missing.returncode, missing.stdout) == (1, "")
    assert missing.stderr == "dho: no pod worker-9 of job mine; there: master-0, worker-0, worker-1\n"

    assert dho("stop", "mine", cwd=project).returncode == 0
    gone = dho("logs", "mine", cwd=project)
    assert (gone.returncode, gone.stderr) == (1, "dho: no job mine in namespace dho; there: none\n")


@pytest.mark.usefixtures("api_server")
def test_an_operator_that_the_cluster_lacks_is_named_by_the_kind_of_job(project: Path) -> None:
    (project / "params.yaml").write_text("{}")
    done = dho("jobs", cwd=project)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.endswith("; install Kubeflow's training operator (docs/platform.md)\n"), done.stderr


def test_what_is_particular_to_pytorchjob_is_written_in_its_own_module_only() -> None:
    """Its row in the catalogue apart; docstrings may explain with it."""
    particular = re.compile(r"PyTorchJob|pytorchjob-v|^pytorch$|kubeflow\.org|pytorchReplicaSpecs|nprocPerNode")
    for path in sorted((ROOT / "dho").rglob("*.py")):
        if path.name == "pytorchjob.py" or path == ROOT / "dho/catalogue/jobs.py":
            continue
        tree = ast.parse(path.read_text())
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        words = [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
        ]
        assert not [word for word in words if particular.search(word)], path
