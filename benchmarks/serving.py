"""Put `mlflow models serve` under load: 1,000 requests from 8 clients, then 50 bad ones, then a good one again.

    python benchmarks/serving.py [--requests 1000] [--clients 8]

Prints p50 and p99; ends with 1 when a good request fails, or a bad one is neither refused (4xx) nor answered with an
error for its row. Needs a champion or a candidate in the registry (`make repro`).
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import itertools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from dho.config import load
from dho.core.workspace import Workspace
from dho.data.index import Index
from dho.registry import CANDIDATE, CHAMPION
from dho.tracking.server import connect, tracking_uri


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args()
    config = load()
    aliases = connect(config.tracking).get_registered_model(config.registry.name).aliases
    model = f"models:/{config.registry.name}@{CHAMPION if CHAMPION in aliases else CANDIDATE}"
    index = Index.load(Workspace().prepared)
    images = [index.read(int(row)) for row in index.rows("test")[:200]]
    with served(model, tracking_uri(config.tracking)) as address:
        failed = load_test(address, images, options.requests, options.clients) + bad_requests(address, images)
        status, answer = post(address, records([images[0]]))
        print(f"afterwards: {status}, {answer[:80]}")
    return 1 if failed or status != 200 else 0


@contextlib.contextmanager
def served(model: str, uri: str) -> Iterator[str]:
    """Run `mlflow models serve` on a free port; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"MLFLOW_TRACKING_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [
        "mlflow",
        "models",
        "serve",
        "-m",
        model,
        "--env-manager",
        "local",
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
    ]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(240):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"{address}/ping", timeout=2)
                    break
                if server.poll() is not None:
                    log.seek(0)
                    raise SystemExit(log.read().decode()[-3000:])
                time.sleep(0.5)
            yield address
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()


def post(address: str, body: bytes, kind: str = "application/json") -> tuple[int, str]:
    request = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def records(images: list[bytes], **params: Any) -> bytes:
    rows = [{"image": base64.b64encode(image).decode()} for image in images]
    return json.dumps({"dataframe_records": rows, "params": params}).encode()


def load_test(address: str, images: list[bytes], requests: int, clients: int) -> int:
    """Return the number of requests that were not answered."""

    def ask(number: int) -> tuple[float, bool]:
        start = time.perf_counter()
        status, answer = post(address, records([images[number % len(images)]]))
        return 1000 * (time.perf_counter() - start), status == 200 and "label" in json.loads(answer)["predictions"][0]

    for number in range(5):
        ask(number)
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        ended = list(pool.map(ask, range(requests)))
    seconds = time.perf_counter() - start
    p50, p99 = np.percentile([milliseconds for milliseconds, _ in ended], [50, 99])
    errors = sum(not good for _, good in ended)
    print(
        f"{requests} requests of one image from {clients} clients: {errors} errors, p50 {p50:.1f} ms, "
        f"p99 {p99:.1f} ms, {requests / seconds:.0f} requests/s"
    )
    return errors


def bad_requests(address: str, images: list[bytes], count: int = 50) -> int:
    """Return the number of bad requests that were taken for good ones, or answered with 5xx."""
    buffer = io.BytesIO(images[0])
    from PIL import Image

    jpeg = io.BytesIO()
    Image.open(buffer).convert("RGB").resize((200, 200)).save(jpeg, "JPEG")
    kinds: dict[str, bytes] = {
        "a truncated JPEG": records([jpeg.getvalue()[:-400]]),
        "a truncated JPEG among others": records([images[0], jpeg.getvalue()[:-400]], on_error="null"),
        "text": records([b"hello, this is no image"]),
        "an empty image": records([b""]),
        "a bomb of 100 megapixels": records([bomb(10_000, 10_000)]),
        "no JSON": b'{"dataframe_records": [{"image": ',
        "no form of MLflow's": b'{"image": "aGVsbG8="}',
        "another column": json.dumps(
            {"dataframe_records": [{"picture": base64.b64encode(images[0]).decode()}]}
        ).encode(),
        "no base64": b'{"dataframe_records": [{"image": "/etc/passwd"}]}',
        "a batch of 20,000": json.dumps(
            {"dataframe_split": {"columns": ["image"], "data": [["aGVsbG8="]] * 20_000}}
        ).encode(),
        "a parameter that is not allowed": records([images[0]], alpha=7.0),
        "a number": b'{"dataframe_records": [{"image": 7}]}',
    }
    wrong = 0
    counts: dict[str, str] = {}
    for name, body in itertools.islice(itertools.cycle(kinds.items()), count):
        status, answer = post(address, body)
        row_error = status == 200 and any(row.get("error") for row in json.loads(answer)["predictions"])
        if not (400 <= status < 500 or row_error):
            wrong += 1
            print(f"{name}: {status} {answer[:200]}", file=sys.stderr)
        counts[name] = "an error for its row" if row_error else str(status)
    print(
        f"{count} bad requests, {wrong} of them not refused: "
        + "; ".join(f"{name} {outcome}" for name, outcome in counts.items())
    )
    return wrong


def bomb(width: int, height: int) -> bytes:
    """Return a small PNG file of width x height pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = b"\0" * (width + 1)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


if __name__ == "__main__":
    sys.exit(main())
