"""Real servers on loopback: PostgreSQL (Debian's package), S3 (SeaweedFS), and MLflow with basic-auth on both."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

BIN = Path(sys.executable).parent
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


def free_ports(count: int) -> list[int]:
    """Return ports on which nobody listens."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def wait_for(ready: object, process: subprocess.Popen[bytes], log: Path, seconds: float = 120.0) -> None:
    """Call `ready` until it does not raise OSError; fail when the process ends."""
    deadline = time.monotonic() + seconds
    while True:
        assert time.monotonic() < deadline and process.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(OSError):
            ready()  # type: ignore[operator]
            return
        time.sleep(0.1)


def postgres_bin() -> Path | None:
    """Return the folder of PostgreSQL's programs, where Debian puts them or on the PATH."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if debian:
        return debian[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).parent if on_path else None


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """Run a PostgreSQL server with the databases `mlflow` and `auth`; yields the start of their addresses."""
    programs = postgres_bin()
    assert programs is not None
    # The user of PostgreSQL cannot read pytest's folders.
    folder = Path(tempfile.mkdtemp(prefix="dho-postgres-"))
    as_user: dict[str, object] = {}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        account = pwd.getpwnam("postgres")
        os.chown(folder, account.pw_uid, account.pw_gid)
        as_user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    (port,) = free_ports(1)
    log = folder / "log"
    run = {"cwd": "/", "stdout": log.open("ab"), "stderr": subprocess.STDOUT, **as_user}
    subprocess.run(
        [programs / "initdb", "-D", folder / "data", "-U", "mlflow", "-A", "trust", "--no-sync"], check=True, **run
    )  # type: ignore[call-overload]
    options = ["-p", str(port), "-k", "", "-c", "listen_addresses=127.0.0.1"]
    server = subprocess.Popen([programs / "postgres", "-D", folder / "data", *options], **run)  # type: ignore[call-overload]
    try:
        import psycopg2

        def ready() -> None:
            try:
                psycopg2.connect(host="127.0.0.1", port=port, user="mlflow", dbname="postgres").close()
            except psycopg2.OperationalError as error:
                raise OSError from error

        wait_for(ready, server, log)
        for name in ("mlflow", "auth"):
            connection = psycopg2.connect(host="127.0.0.1", port=port, user="mlflow", dbname="postgres")
            connection.autocommit = True
            connection.cursor().execute(f"CREATE DATABASE {name}")
            connection.close()
        yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()
        shutil.rmtree(folder)


@contextlib.contextmanager
def s3(folder: Path, bucket: str) -> Iterator[str]:
    """Run an S3 server (SeaweedFS) on loopback with one user (`KEYS`) and one bucket; yields its address."""
    ports = free_ports(8)
    identity = {
        "name": "dho",
        "credentials": [{"accessKey": KEYS["AWS_ACCESS_KEY_ID"], "secretKey": KEYS["AWS_SECRET_ACCESS_KEY"]}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    folder.mkdir()
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    names = ("s3.port", "master.port", "volume.port", "filer.port")
    places = [f"-{name}={port}" for name, port in zip(names, ports, strict=False)]
    grpc = [f"-{name}.grpc={port}" for name, port in zip(names, ports[4:], strict=False)]
    options = [
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-s3",
        f"-s3.config={folder / 's3.json'}",
        "-master.volumeSizeLimitMB=64",
        "-volume.max=20",
        "-s3.port.iceberg=0",  # two further servers, on fixed ports
        "-s3.port.lance=0",
    ]
    log = folder / "log"
    server = subprocess.Popen(
        [BIN / "weed", "server", *options, *places, *grpc], stdout=log.open("wb"), stderr=subprocess.STDOUT
    )
    address = f"http://127.0.0.1:{ports[0]}"
    try:
        wait_for(lambda: urllib.request.urlopen(f"{address}/healthz", timeout=1), server, log)
        import boto3

        secrets = {
            "aws_access_key_id": KEYS["AWS_ACCESS_KEY_ID"],
            "aws_secret_access_key": KEYS["AWS_SECRET_ACCESS_KEY"],
        }
        boto3.client("s3", endpoint_url=address, region_name="us-east-1", **secrets).create_bucket(Bucket=bucket)
        yield address
    finally:
        server.kill()
        server.wait()


class MlflowServer:
    """`mlflow server` with the basic-auth app on PostgreSQL and S3, which can be killed and started again."""

    def __init__(self, folder: Path, database: str, storage: str, password: str) -> None:
        folder.mkdir()
        self.folder, self.database, self.password = folder, database, password
        (self.port,) = free_ports(1)
        self.address = f"http://127.0.0.1:{self.port}"
        (folder / "auth.ini").write_text(
            f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {database}/auth\nadmin_username = admin\n"
            f"admin_password = {password}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            "auth_cache_ttl_seconds = 300\n"  # a password is hashed once, not with every request
        )
        self.environment = (
            os.environ
            | KEYS
            | {
                "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
                "MLFLOW_S3_ENDPOINT_URL": storage,
                "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
                "MLFLOW_FLASK_SERVER_SECRET_KEY": "static",
                "MLFLOW_DISABLE_TELEMETRY": "true",
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # six processes that nothing here uses
            }
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        stores = ["--backend-store-uri", f"{self.database}/mlflow", "--artifacts-destination", "s3://mlflow/artifacts"]
        command = [
            BIN / "mlflow",
            "server",
            "--app-name",
            "basic-auth",
            *stores,
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
        ]
        log = self.folder / "log"
        self.process = subprocess.Popen(
            [*command, "--workers", "1"],
            env=self.environment,
            cwd=self.folder,
            stdout=log.open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        # The first request makes the tables, which takes longer than an answer may.
        token = base64.b64encode(f"admin:{self.password}".encode()).decode()
        search = f"{self.address}/api/2.0/mlflow/experiments/search?max_results=1"
        request = urllib.request.Request(search, headers={"Authorization": f"Basic {token}"})
        wait_for(lambda: urllib.request.urlopen(request, timeout=60), self.process, log)

    def kill(self) -> None:
        """End it at once, with all its processes."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
