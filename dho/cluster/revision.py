"""A pinned revision: exactly this data, this store and these parameters, for pods of a cluster; and how results return.

    revision = publish(Path(), "train")               # `dho publish`: dvc push, then one file that names it all
    fetch(remote, revision, Path("/work"), "train")   # `dho job pull`, in the init container of every pod
    return_results(remote, revision, Path("/work"), "train", {"student": Path("outputs/train/student")})
    collect(Workspace(), revision, "train")

A revision is the SHA-256 of `params.yaml`, `dvc.yaml` and `dvc.lock` together; the lock names every byte of the data.
In the DVC remote, `<remote>/revisions/<revision>.json` holds the three files and
`<remote>/results/<revision>/<stage>.dvc` what a job made from them; the data itself, both ways, are DVC's own objects
there. `fetch` waits for a server that is down, and resumes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dho.core.errors import DataError, RemoteError
from dho.core.files import write_atomically
from dho.core.retry import MAX_WAIT_S, retry
from dho.core.workspace import FOLDERS, Workspace
from dho.stages import STAGES

FILES = ("params.yaml", "dvc.yaml", "dvc.lock")
REVISION_PATTERN = re.compile(r"[0-9a-f]{64}")
REMOTE_PATTERN = re.compile(r"s3://[^/]+(/.*)?")


@dataclass(frozen=True)
class Remote:
    """A DVC remote on S3; credentials come from where boto3 and DVC look for them, never from here."""

    url: str
    """s3://bucket/prefix"""
    endpoint: str | None = None
    """Address of an S3 server other than AWS."""

    def __post_init__(self) -> None:
        if not REMOTE_PATTERN.fullmatch(self.url):
            raise DataError(f"remote {self.url!r} is not of the form s3://bucket/prefix, which a cluster needs")

    @classmethod
    def of_project(cls, root: Path) -> Remote:
        """The default DVC remote of the repository at `root`; raises `DataError` where there is none on S3."""
        from dvc.exceptions import DvcException
        from dvc.repo import Repo

        try:
            with Repo(str(root)) as repo:
                name = repo.config["core"].get("remote")
                settings = repo.config["remote"].get(name, {}) if name else {}
        except DvcException as error:
            raise DataError(f"{root.resolve()}: {error}") from error
        if "url" not in settings:
            raise DataError(
                "no default DVC remote, where pods read the data: `dvc remote add --default storage s3://BUCKET/PREFIX`"
            )
        return cls(settings["url"], settings.get("endpointurl"))

    @classmethod
    def of_environment(cls) -> Remote:
        """The remote that a pod is told of: DHO_REMOTE and, for servers other than AWS, AWS_ENDPOINT_URL."""
        url = os.environ.get("DHO_REMOTE")
        if not url:
            raise DataError(
                "DHO_REMOTE is not set; expected s3://bucket/prefix, the project's DVC remote (ConfigMap `dho`)"
            )
        return cls(url, os.environ.get("AWS_ENDPOINT_URL"))

    def read(self, name: str) -> bytes:
        """An object below the remote's url; raises `RemoteError`."""
        with _client_errors(self, name):
            body: bytes = self._client().get_object(**self._place(name))["Body"].read()
            return body

    def write(self, name: str, content: bytes) -> None:
        """Put an object, whole or not at all; raises `RemoteError`."""
        with _client_errors(self, name):
            self._client().put_object(**self._place(name), Body=content)

    def _place(self, name: str) -> dict[str, str]:
        bucket, _, prefix = self.url.removeprefix("s3://").partition("/")
        return {"Bucket": bucket, "Key": "/".join(part for part in (prefix.strip("/"), name) if part)}

    def _client(self) -> Any:
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            config=Config(connect_timeout=5, read_timeout=30, retries={"max_attempts": 1}),
        )


def needs(stage: str) -> list[str]:
    """List the outputs of earlier stages that a stage reads, relative to the project's folder."""
    return [FOLDERS[name] for name in STAGES[stage].reads]


def publish(root: Path, stage: str = "train") -> str:
    """Push what a stage reads, and the revision that names it, to the project's DVC remote.

    Returns:
        The revision, 64 hex digits; the same files give the same one.

    Raises:
        DataError: there is no DVC remote on S3, or an earlier stage has not been run.
        RemoteError: the remote does not answer or refuses.
    """
    remote = Remote.of_project(root)
    for path in needs(stage):
        if not (root / path).exists():
            raise DataError(f"{root / path} is missing; run the stages before {stage} (`dvc repro {path}`)")
    _dvc(root, "push", *needs(stage))
    bundle = json.dumps({name: (root / name).read_text(encoding="utf-8") for name in FILES}, sort_keys=True).encode()
    revision = hashlib.sha256(bundle).hexdigest()
    remote.write(f"revisions/{revision}.json", bundle)
    return revision


def fetch(remote: Remote, revision: str, folder: Path, stage: str, max_wait_s: float = MAX_WAIT_S) -> None:
    """Make `folder` the working folder of a job: parameters, and the data that `stage` reads. Called again, it resumes.

    Raises:
        DataError: `revision` is not one, or what the remote holds under its name is something else.
        RemoteError: there is no such revision, the remote refuses, or it did not answer for `max_wait_s` seconds.
    """
    if not REVISION_PATTERN.fullmatch(revision):
        raise DataError(f"DHO_REVISION is {revision!r}; expected 64 hex digits, as `dho publish` prints them")
    name = f"revisions/{revision}.json"
    bundle = retry(lambda: remote.read(name), max_wait_s)
    if hashlib.sha256(bundle).hexdigest() != revision:
        raise DataError(f"{remote.url}/{name} is not revision {revision}: its SHA-256 differs; run `dho publish` again")
    for file, text in json.loads(bundle).items():
        if file in FILES:
            write_atomically(folder / file, text)
    _without_git(folder, remote, folder / ".dvc/cache")
    retry(lambda: _dvc(folder, "pull", *needs(stage)), max_wait_s)


def return_results(
    remote: Remote, revision: str, folder: Path, stage: str, outputs: dict[str, Path], max_wait_s: float = MAX_WAIT_S
) -> None:
    """Put a job's outputs (name -> file or folder) into the remote, and last the file that names them all.

    Raises:
        RemoteError: the remote does not answer or refuses.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        work = Path(temporary)
        _without_git(work, remote, folder / ".dvc/cache")
        for name, path in outputs.items():
            (work / stage).mkdir(exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, work / stage / name)
            else:
                shutil.copy2(path, work / stage / name)
        _dvc(work, "add", stage)
        retry(lambda: _dvc(work, "push", f"{stage}.dvc"), max_wait_s)
        retry(lambda: remote.write(_result(revision, stage), (work / f"{stage}.dvc").read_bytes()), max_wait_s)


def collect(workspace: Workspace, revision: str, stage: str) -> None:
    """Bring a job's outputs into the workspace, replacing those of the same name.

    Raises:
        RemoteError: the job has left no results, or the remote does not answer.
    """
    root, out = workspace.root, {"teach": workspace.teacher, "train": workspace.trained}[stage]
    remote = Remote.of_project(root)
    pointer = remote.read(_result(revision, stage))
    with tempfile.TemporaryDirectory(dir=root / ".dvc/tmp") as temporary:
        work = Path(temporary)
        _without_git(work, remote, root.resolve() / ".dvc/cache")
        write_atomically(work / f"{stage}.dvc", pointer)
        _dvc(work, "pull", f"{stage}.dvc")
        out.mkdir(parents=True, exist_ok=True)
        for path in sorted((work / stage).iterdir()):
            target = out / path.name
            if target.is_dir():
                shutil.rmtree(target)
            shutil.move(path, target)


def pin_manifest(path: Path, revision: str) -> None:
    """Write `revision` into a manifest's DHO_REVISION, leaving every other character as it is; raises `DataError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    pinned, count = re.subn(
        r'^(\s*DHO_REVISION:\s*)"?[0-9a-f]*"?[^\S\n]*$', rf'\g<1>"{revision}"', text, flags=re.MULTILINE
    )
    if count != 1:
        raise DataError(f"{path}: {count} lines `DHO_REVISION: ...`; expected one, in ConfigMap `dho`")
    write_atomically(path.resolve(), pinned)


def _result(revision: str, stage: str) -> str:
    return f"results/{revision}/{stage}.dvc"


def _without_git(folder: Path, remote: Remote, cache: Path) -> None:
    """Make `folder` a DVC repository without git whose only remote is `remote`; pulled files are checked by hash."""
    lines = ["[core]", "analytics = false", "no_scm = true", "remote = storage", "[cache]", f"dir = {cache.resolve()}"]
    lines += ["type = hardlink,copy", "['remote \"storage\"']", f"url = {remote.url}", "verify = true"]
    if remote.endpoint:
        lines.append(f"endpointurl = {remote.endpoint}")
    write_atomically(folder / ".dvc/config", "\n".join(lines) + "\n")


def _dvc(folder: Path, *arguments: str) -> None:
    """Run DVC in `folder`; its output is shown only where it fails."""
    environment = os.environ | {"DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        said = [line for line in done.stdout.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR:")] or said[-1:]
        raise RemoteError(
            f"dvc {' '.join(arguments)}: {' '.join(line.removeprefix('ERROR: ') for line in errors)[:500]}",
            may_pass=True,
        )


@contextlib.contextmanager
def _client_errors(remote: Remote, name: str) -> Iterator[None]:
    """Turn boto3's errors into `RemoteError`: one line, and whether waiting may help."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    place = f"{remote.url}/{name}" + (f" at {remote.endpoint}" if remote.endpoint else "")
    try:
        yield
    except ClientError as error:
        said, status = error.response["Error"], error.response["ResponseMetadata"]["HTTPStatusCode"]
        advice = "; run `dho publish`, or correct the revision" if said["Code"] == "NoSuchKey" else ""
        advice = "; check the S3 credentials" if status in (401, 403) else advice
        raise RemoteError(
            f"{place}: {said['Code']}: {said.get('Message', '')}{advice}", may_pass=status >= 500
        ) from error
    except BotoCoreError as error:
        raise RemoteError(f"{place}: {error}", may_pass=not isinstance(error, NoCredentialsError)) from error
