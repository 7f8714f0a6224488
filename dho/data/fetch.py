"""Stage `fetch`: bring a data set's raw files to one folder, by whichever way works, and prove that they are the right ones.

    dho fetch

Tried in order: `data.source` on this machine, the data set's home page, Debian's package. Every way ends in the same bytes: the SHA-256
of each uncompressed file is in the catalogue. For `folder` nothing is copied: the images stay where they are, and the folder that this
stage writes lists them (`listing.csv`).
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path

from dho.catalogue.datasets import Entry, entry
from dho.config import Config
from dho.core.errors import DataError
from dho.core.files import write_atomically
from dho.core.workspace import Workspace
from dho.data import sources as records

STALL_S = 15.0
"""A download that brings less than LEAST_BYTES in this long is given up."""
LEAST_BYTES = 1 << 14
"""About a kilobyte a second: a server that sends a byte now and then has stalled, too."""


def fetch(config: Config, workspace: Workspace) -> None:
    """Put the raw files of the data set into `workspace.raw`; files that are already there and right are kept.

    Raises:
        DataError: no way worked (says what to put where), or a `folder` source cannot be read.
    """
    data, out = config.data, workspace.raw
    out.mkdir(parents=True, exist_ok=True)
    catalogue_entry = entry(data)
    if not catalogue_entry.files:
        records.write_listing(data, out)
        return
    missing = {name: sha for name, sha in catalogue_entry.files.items() if not _right(out / name, sha)}
    if not missing:
        return
    failures = []
    for way, attempt in _ways(catalogue_entry, data.source):
        try:
            attempt(out, missing)
        except Exception as error:  # whatever goes wrong on one way, the next one is tried and the reason is told
            failures.append(f"{way}: {error}")
            print(f"fetch: {way} did not work ({error}); trying the next way", file=sys.stderr)
            continue
        print(f"fetch: {len(missing)} files of {data.name} from {way}")
        return
    raise DataError(
        f"{data.name} could not be fetched ({'; '.join(failures)}). Put {', '.join(f'{name}.gz' for name in catalogue_entry.files)} "
        f"into {data.source or 'a folder'} and {'run again' if data.source else 'set data.source to it'}"
    )


Attempt = Callable[[Path, dict[str, str]], None]


def _ways(catalogue_entry: Entry, source: str | None) -> list[tuple[str, Attempt]]:
    ways: list[tuple[str, Attempt]] = []
    if source is not None and any(
        Path(source, f"{name}{end}").exists() for name in catalogue_entry.files for end in ("", ".gz")
    ):
        ways.append((f"data.source {source}", lambda out, files: _copy(Path(source), out, files)))
    if catalogue_entry.home:
        ways.append((catalogue_entry.home, lambda out, files: download(catalogue_entry.home, out, files, STALL_S)))
    if catalogue_entry.debian_package:
        ways.append(
            (
                f"Debian's package {catalogue_entry.debian_package}",
                lambda out, files: _debian(catalogue_entry, out, files),
            )
        )
    return ways


def _copy(folder: Path, out: Path, files: dict[str, str]) -> None:
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

    A download that brings less than `LEAST_BYTES` in `stall_s` seconds (name look-up and connecting included) is given up.

    Raises:
        TimeoutError: nothing, or next to nothing, came for `stall_s` seconds.
        OSError: the server refused, or the connection broke.
        ValueError: the content is not the right one.
    """
    for name, sha256 in files.items():
        _accept(gzip.decompress(_get(f"{home}{name}.gz", stall_s)), out / name, sha256)


def _get(address: str, stall_s: float) -> bytes:
    # A look-up of a host name cannot be given a timeout, so the transfer has a thread of its own and is watched from here.
    parts: list[bytes] = []
    problems: list[Exception] = []
    moved, done = threading.Event(), threading.Event()

    def transfer() -> None:
        try:
            # The socket's own limit only ends this thread, after the watch has given up.
            with urllib.request.urlopen(address, timeout=2 * stall_s) as response:
                recent = 0
                while part := response.read1(1 << 16):
                    parts.append(part)
                    recent += len(part)
                    if recent >= LEAST_BYTES:
                        moved.set()
                        recent = 0
        except Exception as error:
            problems.append(error)
        finally:
            done.set()
            moved.set()

    threading.Thread(target=transfer, daemon=True).start()
    while not done.is_set():
        moved.clear()
        if not done.is_set() and not moved.wait(stall_s):
            raise TimeoutError(
                f"{address} stalled: {sum(map(len, parts))} bytes came, next to none in the last {stall_s:g} s"
            )
    if problems:
        raise problems[0]
    return b"".join(parts)


def _debian(catalogue_entry: Entry, out: Path, files: dict[str, str]) -> None:
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise FileNotFoundError("this machine has no apt-get")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        patience = [
            f"Acquire::http::Timeout={STALL_S:.0f}",
            f"Acquire::https::Timeout={STALL_S:.0f}",
            "Acquire::Retries=0",
        ]
        apt = ["apt-get", "-q", *(word for option in patience for word in ("-o", option))]
        try:
            _run([*apt, "download", catalogue_entry.debian_package], folder)
        except OSError:
            # The machine's package lists may be missing or old; ours are private, so this needs no root and changes nothing.
            for part in ("lists/partial", "cache/archives/partial"):
                (folder / part).mkdir(parents=True)
            private = ["-o", f"Dir::State::Lists={folder / 'lists'}", "-o", f"Dir::Cache={folder / 'cache'}"]
            if os.geteuid() == 0:
                private += ["-o", "APT::Sandbox::User=root"]
            _run([*apt, *private, "update"], folder)
            _run([*apt, *private, "download", catalogue_entry.debian_package], folder)
        package = next(folder.glob("*.deb"))
        _run(["dpkg-deb", "-x", str(package), "unpacked"], folder)
        _copy(folder / "unpacked" / catalogue_entry.debian_folder, out, files)


def _run(command: list[str], folder: Path) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    if result.returncode != 0:
        lines = (result.stderr or result.stdout).strip().splitlines() or ["no message"]
        raise OSError(f"{command[0]} ended with {result.returncode}: {lines[-1]}")


def _accept(content: bytes, path: Path, sha256: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{path.name} has SHA-256 {found[:16]}..., expected {sha256[:16]}...")
    write_atomically(path, content)


def _right(path: Path, sha256: str) -> bool:
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256
