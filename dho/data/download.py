"""Ways to a data set's files: a folder on this machine, its home page, Debian's package; all end in the same bytes.

    download("http://example.org/", Path("data/raw"), {"train-images": "c59f468a..."})

Every file is unpacked, compared with the catalogue's SHA-256 and only then written.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path

from dho.catalogue.datasets import DataSet
from dho.core.files import write_atomically

STALL_S = 15.0
"""A download that brings less than MIN_BYTES in this many seconds is given up."""
MIN_BYTES = 1 << 14
"""About a kilobyte per second: a server that sends a byte now and then has stalled, too."""
PACKAGE_TIMEOUT_S = 120.0

Attempt = Callable[[Path, dict[str, str]], None]
"""Brings the files {name: SHA-256} to a folder, or raises."""


def ways(data_set: DataSet, source: str | None) -> list[tuple[str, Attempt]]:
    """Return the ways to a data set's files, with their names for messages, in the order in which they are tried.

    Args:
        data_set: the catalogue's row.
        source: `data.source`, the folder on this machine, where it holds any of the files.
    """
    attempts: list[tuple[str, Attempt]] = []
    if source is not None and any(
        Path(source, f"{name}{end}").exists() for name in data_set.files for end in ("", ".gz")
    ):
        attempts.append((f"data.source {source}", lambda out, files: copy(Path(source), out, files)))
    if data_set.home:
        attempts.append((data_set.home, lambda out, files: download(data_set.home, out, files, STALL_S)))
    if data_set.debian_package:
        name = f"Debian's package {data_set.debian_package}"
        attempts.append(
            (name, lambda out, files: unpack_debian(data_set.debian_package, data_set.debian_folder, out, files))
        )
    return attempts


def is_right(path: Path, sha256: str) -> bool:
    """Whether there is a file with this SHA-256 (hex)."""
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def copy(folder: Path, out: Path, files: dict[str, str]) -> None:
    """Copy every file, plain or as `<name>.gz`, from a folder.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: the content is not the right one.
    """
    for name, sha256 in files.items():
        plain, packed = folder / name, folder / f"{name}.gz"
        if plain.exists():
            _accept(plain.read_bytes(), out / name, sha256)
        elif packed.exists():
            _accept(gzip.decompress(packed.read_bytes()), out / name, sha256)
        else:
            raise FileNotFoundError(f"{packed} is missing")


def download(home: str, out: Path, files: dict[str, str], stall_s: float = STALL_S) -> None:
    """Download `<home><name>.gz` for every name and unpack it into `out`.

    A download that brings less than `MIN_BYTES` in `stall_s` seconds (name look-up included) is given up.

    Raises:
        TimeoutError: nothing, or next to nothing, came for `stall_s` seconds.
        OSError: the server refused, or the connection broke.
        ValueError: the content is not the right one.
    """
    for name, sha256 in files.items():
        _accept(gzip.decompress(_get(f"{home}{name}.gz", stall_s)), out / name, sha256)


def _get(address: str, stall_s: float) -> bytes:
    # A look-up of a host name takes no timeout, so the transfer has a thread of its own and is watched from here.
    chunks: list[bytes] = []
    problems: list[Exception] = []
    progress, done = threading.Event(), threading.Event()

    def transfer() -> None:
        try:
            # The socket's own limit only ends this thread, after the watch has given up.
            with urllib.request.urlopen(address, timeout=2 * stall_s) as response:
                recent = 0
                while chunk := response.read1(1 << 16):
                    chunks.append(chunk)
                    recent += len(chunk)
                    if recent >= MIN_BYTES:
                        progress.set()
                        recent = 0
        except Exception as error:
            problems.append(error)
        finally:
            done.set()
            progress.set()

    threading.Thread(target=transfer, daemon=True).start()
    while not done.is_set():
        progress.clear()
        if not done.is_set() and not progress.wait(stall_s):
            raise TimeoutError(
                f"{address} stalled: {sum(map(len, chunks))} bytes came, next to none in the last {stall_s:g} s"
            )
    if problems:
        raise problems[0]
    return b"".join(chunks)


def unpack_debian(package: str, folder: str, out: Path, files: dict[str, str]) -> None:
    """Download a Debian package by apt-get and copy the files out of its folder `folder`; nothing is installed.

    Raises:
        OSError: this machine has no apt-get, it failed, or a file is missing.
        ValueError: the content is not the right one.
        subprocess.TimeoutExpired: apt-get took longer than `PACKAGE_TIMEOUT_S`.
    """
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise FileNotFoundError("this machine has no apt-get")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        options = [
            f"Acquire::http::Timeout={STALL_S:.0f}",
            f"Acquire::https::Timeout={STALL_S:.0f}",
            "Acquire::Retries=0",
        ]
        apt = ["apt-get", "-q", *(word for option in options for word in ("-o", option))]
        try:
            _run([*apt, "download", package], scratch)
        except OSError:
            # The machine's package lists may be missing or old; private ones need no root and change nothing.
            for private_folder in ("lists/partial", "cache/archives/partial"):
                (scratch / private_folder).mkdir(parents=True)
            private = ["-o", f"Dir::State::Lists={scratch / 'lists'}", "-o", f"Dir::Cache={scratch / 'cache'}"]
            if os.geteuid() == 0:
                private += ["-o", "APT::Sandbox::User=root"]
            _run([*apt, *private, "update"], scratch)
            _run([*apt, *private, "download", package], scratch)
        _run(["dpkg-deb", "-x", str(next(scratch.glob("*.deb"))), "unpacked"], scratch)
        copy(scratch / "unpacked" / folder, out, files)


def _run(command: list[str], folder: Path) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PACKAGE_TIMEOUT_S, check=False)
    if result.returncode != 0:
        lines = (result.stderr or result.stdout).strip().splitlines() or ["no message"]
        raise OSError(f"{command[0]} ended with {result.returncode}: {lines[-1]}")


def _accept(content: bytes, path: Path, sha256: str) -> None:
    actual = hashlib.sha256(content).hexdigest()
    if actual != sha256:
        raise ValueError(f"{path.name} has SHA-256 {actual[:16]}..., expected {sha256[:16]}...")
    write_atomically(path, content)
