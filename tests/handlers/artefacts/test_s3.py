"""Models from S3, fetched from a real S3 API over HTTP; broken connections come from a proxy in front of it."""

from __future__ import annotations

import io
import json
import shutil
import socket
import socketserver
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from handlers.artefacts import ArtefactError, Cancelled
from handlers.artefacts.fetch import fetch
from handlers.artefacts.s3 import ATTEMPTS, PART_BYTES, fetch_s3
from handlers.progress import shown
from properties.model import locate
from properties.settings import Settings
from tests.support.s3 import BUCKET
from tests.support.scripted_server import ServerProcess


class Proxy(socketserver.ThreadingTCPServer):
    """Forwards to the S3 server, counts ranged GETs, and cuts the first `cuts` of them after `after` bytes.

    before_range: called before each of them is forwarded.
    """

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, endpoint: str, cuts: int, after: int) -> None:
        super().__init__(("127.0.0.1", 0), _Forward)
        self.upstream = ("127.0.0.1", int(endpoint.rpartition(":")[2]))
        self.cuts = cuts
        self.after = after
        self.ranges: list[str] = []
        self.before_range: Callable[[], None] = lambda: None
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Forward(socketserver.StreamRequestHandler):
    server: Proxy

    def handle(self) -> None:
        """One request a connection."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = self.rfile.readline()
            if not line:
                return
            head += line
        asked = [line for line in head.decode().split("\r\n") if line.lower().startswith("range:")]
        with self.server.lock:
            self.server.ranges += [line.partition("=")[2] for line in asked]
            cut = bool(asked) and self.server.cuts > 0
            self.server.cuts -= cut
        if asked:
            self.server.before_range()
        with socket.create_connection(self.server.upstream) as upstream:
            upstream.sendall(head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            sent = 0
            while data := upstream.recv(16384):
                if cut and sent + len(data) > self.server.after:
                    self.wfile.write(data[: self.server.after - sent])
                    return
                self.wfile.write(data)
                sent += len(data)


@pytest.fixture
def proxy(endpoint: str, s3: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    server = Proxy(endpoint, cuts=0, after=0)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
    yield server
    server.shutdown()
    server.server_close()


def put(s3: Any, **files: bytes) -> None:
    for name, body in files.items():
        s3.put_object(Bucket=BUCKET, Key=f"llava/{name.replace('__', '/')}", Body=body)


def get(root: Path, url: str = f"s3://{BUCKET}/llava/") -> Path:
    return fetch_s3(url, root, threading.Event())


def test_a_prefix_becomes_a_directory(s3: Any, tmp_path: Path) -> None:
    put(s3, config=b"{}", adapters__a__weights=b"w" * 1000, empty=b"")
    s3.put_object(Bucket=BUCKET, Key="llava/folder/", Body=b"")
    s3.put_object(Bucket=BUCKET, Key="llava-next/config", Body=b"another model")
    location = locate(f"s3://{BUCKET}/llava", None, None)
    settings = Settings(download_dir=str(tmp_path))
    with shown(lambda progress: None, 60) as progress:
        directory = fetch(location, settings, threading.Event())
    assert (progress.done, progress.total) == (1002, 1002)
    found = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    assert found == {"config": b"{}", "adapters/a/weights": b"w" * 1000, "empty": b""}


def test_what_is_there_is_not_fetched_again_and_what_changed_is(s3: Any, proxy: Proxy, tmp_path: Path) -> None:
    put(s3, same=b"1" * 10, other=b"1" * 10, gone=b"1")
    first = get(tmp_path)
    put(s3, other=b"2" * 10)
    s3.delete_object(Bucket=BUCKET, Key="llava/gone")
    proxy.ranges.clear()
    second = get(tmp_path)
    assert second == first
    assert (second / "other").read_bytes() == b"2" * 10
    assert sorted(path.name for path in second.iterdir()) == ["other", "same"]
    assert proxy.ranges == ["0-"]


def test_a_range_whose_connection_breaks_is_fetched_again(
    s3: Any, proxy: Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    body = bytes(range(256)) * 4096
    put(s3, weights=body)
    proxy.cuts, proxy.after = 1, 400_000
    assert (get(tmp_path) / "weights").read_bytes() == body
    assert proxy.ranges == ["0-", "0-"]
    assert "trying again" in caplog.text


def test_the_next_start_keeps_the_files_that_were_complete(s3: Any, proxy: Proxy, tmp_path: Path) -> None:
    put(s3, first=b"1" * 10)
    get(tmp_path)
    put(s3, weights=b"2" * 100_000)
    proxy.cuts, proxy.after = ATTEMPTS, 50_000
    with pytest.raises(ArtefactError, match=r"llava/weights cannot be read: .*kept for the next start"):
        get(tmp_path)
    assert proxy.ranges[1:] == ["0-"] * ATTEMPTS
    proxy.ranges.clear()
    directory = get(tmp_path)
    assert (directory / "weights").read_bytes() == b"2" * 100_000
    assert sorted(path.name for path in directory.iterdir()) == ["first", "weights"]
    assert proxy.ranges == ["0-"]


def test_an_object_that_changes_while_it_is_fetched_stops_the_download(s3: Any, proxy: Proxy, tmp_path: Path) -> None:
    put(s3, weights=b"1" * 10)
    proxy.before_range = lambda: put(s3, weights=b"2" * 10)
    with pytest.raises(ArtefactError, match="an object changed while it was fetched"):
        get(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith("weights")]


def test_ranges_of_many_files_arrive_side_by_side(s3: Any, tmp_path: Path) -> None:
    bodies = {f"file{number}": bytes([number]) * (150_000 + number) for number in range(7)}
    bodies["weights"] = bytes(range(256)) * (PART_BYTES // 256 + 1)
    put(s3, **bodies)
    directory = get(tmp_path)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == bodies


@pytest.mark.parametrize("key", ["../escape", "a/../../escape", "/etc/escape", "a//b", "a/./b", "a\\b"])
def test_a_key_that_would_leave_the_directory_stops_the_download(s3: Any, tmp_path: Path, key: str) -> None:
    s3.put_object(Bucket=BUCKET, Key=f"hostile/{key}", Body=b"x")
    with pytest.raises(ArtefactError, match="not the name of a file below"):
        get(tmp_path, f"s3://{BUCKET}/hostile/")
    assert not [path for path in tmp_path.rglob("*") if "escape" in path.name]


def test_an_archive_is_unpacked_and_cannot_reach_out(s3: Any, tmp_path: Path) -> None:
    s3.put_object(Bucket=BUCKET, Key="packed/model.tar.gz", Body=tar_of({"config.json": b"{}", "a/b": b"1"}))
    directory = get(tmp_path, f"s3://{BUCKET}/packed/model.tar.gz")
    assert (directory / "a" / "b").read_bytes() == b"1"
    assert get(tmp_path, f"s3://{BUCKET}/packed/model.tar.gz") == directory
    s3.put_object(Bucket=BUCKET, Key="packed/model.tar.gz", Body=tar_of({"../../escape": b"x"}))
    with pytest.raises(ArtefactError, match="cannot be unpacked"):
        get(tmp_path, f"s3://{BUCKET}/packed/model.tar.gz")
    assert not list(tmp_path.rglob("escape"))


def tar_of(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, body in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    return packed.getvalue()


def test_the_server_serves_a_model_from_s3_as_its_own_properties_say(s3: Any, tmp_path: Path) -> None:
    s3.put_object(Bucket=BUCKET, Key="llava/config.json", Body=b"{}")
    s3.put_object(Bucket=BUCKET, Key="llava/serving.properties", Body=b"option.served_model_name=mine\n")
    with ServerProcess(f"s3://{BUCKET}/llava/", SERVING_DOWNLOAD_DIR=str(tmp_path)) as server:
        server.ready()
        models = httpx.get(f"{server.url}/v1/models", timeout=60).json()
        assert [model["id"] for model in models["data"]] == ["mine"]
        assert str(tmp_path) not in json.dumps(models)


def test_errors_say_what_to_do(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtefactError, match=r"no bucket 'no-such-bucket'"):
        get(tmp_path, "s3://no-such-bucket/llava/")
    with pytest.raises(ArtefactError, match="nothing below this prefix"):
        get(tmp_path, f"s3://{BUCKET}/nothing/")
    with pytest.raises(ArtefactError, match="no such object"):
        get(tmp_path, f"s3://{BUCKET}/nothing.tar.gz")
    with pytest.raises(ArtefactError, match="write s3://bucket/prefix/"):
        get(tmp_path, "s3://")
    put(s3, weights=b"123456")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5}))
    with pytest.raises(ArtefactError, match="no space"):
        get(tmp_path)


def test_a_role_without_rights_is_told_which_it_needs(s3: Any, endpoint: str, tmp_path: Path) -> None:
    put(s3, weights=b"123456")
    httpx.post(f"{endpoint}/moto-api/reset-auth", content="0", timeout=60)
    try:
        with pytest.raises(ArtefactError, match="access is denied; the role needs s3:ListBucket"):
            get(tmp_path)
    finally:
        httpx.post(f"{endpoint}/moto-api/reset-auth", content="inf", timeout=60)


def test_without_credentials_the_error_says_so(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(ArtefactError, match="no AWS credentials"):
        get(tmp_path)


def test_a_cancelled_download_stops(s3: Any, tmp_path: Path) -> None:
    put(s3, weights=b"123456")
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(Cancelled):
        fetch_s3(f"s3://{BUCKET}/llava/", tmp_path, cancelled)
