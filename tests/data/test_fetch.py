"""Stage `fetch`: whichever way works, the same bytes; a stalled server holds nobody up. No test leaves this machine."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import shutil
import socketserver
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from conftest import write_folder

from dho.catalogue import datasets as catalogue
from dho.catalogue.datasets import DATASETS, DataSet
from dho.config import Config, from_dict
from dho.core.errors import DataError
from dho.core.workspace import Workspace
from dho.data import download as downloading
from dho.data.download import download
from dho.data.fetch import fetch

CONTENT = {"train-images": bytes(range(256)) * 500, "train-labels": b"labels " * 20}
FILES = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}


@contextlib.contextmanager
def server(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """An HTTP server on this machine that answers every GET by `answer`; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with contextlib.suppress(OSError):  # the client has given up
                answer(self)

        def log_message(self, *_: object) -> None:
            pass

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True

    running = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_address[1]}/"
    finally:
        running.shutdown()
        running.socket.close()


def serve_files(handler: BaseHTTPRequestHandler) -> None:
    name = handler.path.strip("/").removesuffix(".gz")
    if name not in CONTENT:
        return handler.send_error(404)
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(gzip.compress(CONTENT[name]))
    return None


def begin(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()


def never_answer(_: BaseHTTPRequestHandler) -> None:
    time.sleep(5)


def stop_in_the_middle(handler: BaseHTTPRequestHandler) -> None:
    begin(handler)
    handler.wfile.write(b"x" * 50_000)
    handler.wfile.flush()
    time.sleep(5)


def trickle(handler: BaseHTTPRequestHandler) -> None:
    begin(handler)
    for _ in range(100):
        handler.wfile.write(b"x")
        handler.wfile.flush()
        time.sleep(0.05)


def slow_but_steady(handler: BaseHTTPRequestHandler) -> None:
    packed = gzip.compress(CONTENT["train-images"], 0)
    handler.send_response(200)
    handler.end_headers()
    for start in range(0, len(packed), 30_000):
        handler.wfile.write(packed[start : start + 30_000])
        handler.wfile.flush()
        time.sleep(0.3)


@pytest.fixture
def data_set(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a data set of two small files in Fashion-MNIST's place in the catalogue, with the ways that a test wants."""

    def put(home: str = "", debian_package: str = "", debian_folder: str = "") -> None:
        row = DataSet(
            "fashion_mnist",
            "two files",
            "arrays",
            ("a", "b"),
            home=home,
            debian_package=debian_package,
            debian_folder=debian_folder,
            files=FILES,
        )
        monkeypatch.setitem(DATASETS, "fashion_mnist", row)

    return put


def settings(source: Path | None) -> Config:
    return from_dict({"data": {"source": None if source is None else str(source)}})


def put_source(folder: Path, packed: bool) -> Path:
    folder.mkdir()
    for name, content in CONTENT.items():
        (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)
    return folder


def holds_the_files(out: Path) -> bool:
    return {path.name: path.read_bytes() for path in out.iterdir()} == CONTENT


@pytest.mark.parametrize("packed", [False, True])
def test_a_local_source_is_used_plain_or_packed(data_set: Callable[..., None], tmp_path: Path, packed: bool) -> None:
    data_set(home="http://127.0.0.1:9/")
    fetch(settings(put_source(tmp_path / "source", packed)), Workspace(tmp_path, raw=tmp_path / "raw"))
    assert holds_the_files(tmp_path / "raw")


def test_files_that_are_there_and_right_are_kept_and_others_are_brought_again(
    data_set: Callable[..., None], tmp_path: Path
) -> None:
    data_set()
    source = put_source(tmp_path / "source", True)
    fetch(settings(source), Workspace(tmp_path, raw=tmp_path / "raw"))
    kept = (tmp_path / "raw" / "train-images").stat().st_mtime_ns
    (tmp_path / "raw" / "train-labels").write_bytes(b"damaged")
    (source / "train-images.gz").unlink()
    fetch(settings(source), Workspace(tmp_path, raw=tmp_path / "raw"))
    assert holds_the_files(tmp_path / "raw")
    assert (tmp_path / "raw" / "train-images").stat().st_mtime_ns == kept
    shutil.rmtree(source)
    fetch(settings(source), Workspace(tmp_path, raw=tmp_path / "raw"))


@pytest.mark.parametrize("damage", ["other content", "not packed", "cut off"])
def test_a_source_with_wrong_content_is_told_and_the_next_way_taken(
    data_set: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    source = put_source(tmp_path / "source", True)
    wrong = {
        "other content": gzip.compress(b"other"),
        "not packed": b"text",
        "cut off": gzip.compress(CONTENT["train-images"])[:100],
    }
    (source / "train-images.gz").write_bytes(wrong[damage])
    with server(serve_files) as home:
        data_set(home=home)
        fetch(settings(source), Workspace(tmp_path, raw=tmp_path / "raw"))
    assert holds_the_files(tmp_path / "raw")
    said = capsys.readouterr()
    assert f"data.source {source} did not work" in said.err and "trying the next way" in said.err
    assert home in said.out


def test_wrong_content_never_reaches_the_output(data_set: Callable[..., None], tmp_path: Path) -> None:
    data_set()
    source = put_source(tmp_path / "source", False)
    (source / "train-images").write_bytes(b"other")
    with pytest.raises(DataError, match=r"train-images has SHA-256 [0-9a-f]{16}\.\.\., expected"):
        fetch(settings(source), Workspace(tmp_path, raw=tmp_path / "raw"))
    assert not (tmp_path / "raw" / "train-images").exists()


def test_a_source_that_holds_only_some_files_is_told(
    data_set: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = put_source(tmp_path / "source", True)
    (source / "train-images.gz").unlink()
    with server(serve_files) as home:
        data_set(home=home)
        fetch(settings(source), Workspace(tmp_path, raw=tmp_path / "raw"))
    assert "train-images.gz is missing" in capsys.readouterr().err


@pytest.mark.parametrize("answer", [never_answer, stop_in_the_middle, trickle])
def test_a_stalled_download_is_given_up_in_time(
    answer: Callable[[BaseHTTPRequestHandler], None], tmp_path: Path
) -> None:
    with server(answer) as home:
        began = time.monotonic()
        with pytest.raises(TimeoutError, match="stalled"):
            download(home, tmp_path, FILES, stall_s=0.5)
        overhead = time.monotonic() - began - 0.5
    assert overhead < 4  # a busy machine; the rule below leaves this much
    assert downloading.STALL_S + 4 < 20
    assert list(tmp_path.iterdir()) == []


def test_a_connection_that_is_never_accepted_is_given_up_in_time(tmp_path: Path) -> None:
    with contextlib.closing(socketserver.socket.socket()) as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)
        began = time.monotonic()
        with pytest.raises(TimeoutError, match="stalled: 0 bytes came"):
            download(f"http://127.0.0.1:{silent.getsockname()[1]}/", tmp_path, FILES, stall_s=0.5)
        assert time.monotonic() - began < 4


def test_a_slow_download_that_moves_is_not_given_up(tmp_path: Path) -> None:
    with server(slow_but_steady) as home:
        began = time.monotonic()
        download(home, tmp_path, {"train-images": FILES["train-images"]}, stall_s=1.0)
        assert time.monotonic() - began > 1.0
    assert (tmp_path / "train-images").read_bytes() == CONTENT["train-images"]


def test_after_a_stall_the_next_way_is_taken_and_the_reason_told(
    data_set: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(downloading, "STALL_S", 0.5)
    archive = debian_archive(tmp_path / "debian", monkeypatch)
    with server(never_answer) as home:
        data_set(home=home, **archive)
        fetch(settings(None), Workspace(tmp_path, raw=tmp_path / "raw"))
    assert holds_the_files(tmp_path / "raw")
    said = capsys.readouterr()
    assert f"{home} did not work" in said.err and "stalled" in said.err
    assert "Debian's package dho-test-data" in said.out


def test_when_nothing_works_one_line_says_what_to_put_where(
    data_set: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no apt-get
    with server(lambda handler: handler.send_error(503)) as home:
        data_set(home=home, debian_package="dho-test-data", debian_folder="usr")
        for source, where in (
            (None, r"into a folder and set data\.source to it"),
            (tmp_path / "mine", f"into {tmp_path}/mine and run again"),
        ):
            with pytest.raises(
                DataError, match=rf"503.*no apt-get.*Put train-images\.gz, train-labels\.gz {where}"
            ) as caught:
                fetch(settings(source), Workspace(tmp_path, raw=tmp_path / "raw"))
            assert "\n" not in str(caught.value)


def debian_archive(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A Debian archive of one package in a folder, made apt's only source; returns the catalogue's words for it."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        pytest.skip("needs apt-get and dpkg-deb")
    tree = folder / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    fields = (
        "Package: dho-test-data\nVersion: 1\nArchitecture: all\n"
        "Maintainer: dho <dho@example.org>\nDescription: two files\n"
    )
    (tree / "DEBIAN" / "control").write_text(fields)
    put_source(tree / "files", True)
    subprocess.run(
        ["dpkg-deb", "--build", "--root-owner-group", str(tree), str(folder / "data.deb")],
        check=True,
        capture_output=True,
    )
    package = (folder / "data.deb").read_bytes()
    (folder / "Packages").write_text(
        f"{fields}Filename: ./data.deb\nSize: {len(package)}\nSHA256: {hashlib.sha256(package).hexdigest()}\n"
    )
    (folder / "sources.list").write_text(f"deb [trusted=yes] file:{folder} ./\n")
    (folder / "lists" / "partial").mkdir(parents=True)
    (folder / "apt.conf").write_text(
        f'Dir::Etc::sourcelist "{folder}/sources.list";\nDir::Etc::sourceparts "-";\n'
        f'Dir::State::lists "{folder}/lists";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(folder / "apt.conf"))
    return {"debian_package": "dho-test-data", "debian_folder": "files"}


def test_debians_package_is_downloaded_and_unpacked(
    data_set: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_set(**debian_archive(tmp_path / "debian", monkeypatch))
    fetch(settings(None), Workspace(tmp_path, raw=tmp_path / "raw"))
    assert holds_the_files(tmp_path / "raw")


def test_the_catalogue_names_fashion_mnists_files_by_the_digests_of_the_issue() -> None:
    begins = [sha256[:16] for sha256 in catalogue.FASHION_MNIST.files.values()]
    assert begins == ["c59f468a2f672dc8", "bad3541b69d91243", "5b4141f0afbad91e", "0402a96d92fd2663"]


def test_a_folder_stays_where_it_is_and_is_listed(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", each=2, unlabelled=1)
    fetch(
        from_dict({"data": {"name": "folder", "source": str(tmp_path / "images")}}),
        Workspace(tmp_path, raw=tmp_path / "raw"),
    )
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["listing.csv"]
    lines = (tmp_path / "raw" / "listing.csv").read_text().splitlines()
    assert lines[:2] == ["source,pool,label,caption", "circle/000.jpg,train,circle,"]
    assert lines[-1] == "unlabelled/000.png,train,,"
    assert len(lines) == 8


@pytest.mark.parametrize("made", ["nothing", "a file", "an empty folder"])
def test_a_source_that_is_no_folder_of_images_is_one_line(tmp_path: Path, made: str) -> None:
    source = tmp_path / "images"
    if made == "a file":
        source.write_text("")
    elif made == "an empty folder":
        source.mkdir()
    with pytest.raises(DataError, match=r"expected a folder of images|no images found; expected") as caught:
        fetch(from_dict({"data": {"name": "folder", "source": str(source)}}), Workspace(tmp_path, raw=tmp_path / "raw"))
    assert str(source) in str(caught.value) and "\n" not in str(caught.value)
