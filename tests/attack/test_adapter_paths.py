"""Sources and names of adapters that lead out of the directories that adapters may be loaded from.

Over HTTP, with the store of the vLLM backend: behind a scripted engine, and where vLLM is tested, behind its own.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.attack.target import Target
from tests.support.backend import VLLM
from tests.support.live import LiveServer
from tests.support.scripted_adapters import make_adapter
from tests.support.scripted_server import ServerProcess
from tests.support.shapes import SHAPES

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's directory; the adapters lie below it, and what they must not reach beside it."""
    home = tmp_path_factory.mktemp("models") / "shapes"
    root = home / "adapters"
    root.mkdir(parents=True)
    make_adapter(home.parent / "secret" / "outside")
    (root / "link").symlink_to(home.parent / "secret" / "outside")
    (root / "up").symlink_to("..")
    (root / "loop").symlink_to("loop")
    (root / "pipe").mkdir()
    os.mkfifo(root / "pipe" / CONFIG)
    (root / "pipe" / WEIGHTS).write_bytes(b"")
    (root / "directories" / CONFIG).mkdir(parents=True)
    (root / "directories" / WEIGHTS).mkdir()
    with tarfile.open(root / "archive.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("../../escaped")
        member.size = 1
        archive.addfile(member, io.BytesIO(b"x"))
    return home


@pytest.fixture(scope="module")
def client(home: Path) -> Iterator[httpx.Client]:
    if VLLM:
        options = ("enable_lora=true", "max_loras=1", f"allowed_adapter_path={home / 'adapters'}")
        with LiveServer(SHAPES, *options) as live:
            yield live.http
        return
    with ServerProcess(home, SCRIPTED_ADAPTERS="2") as running:
        running.ready()
        with httpx.Client(base_url=running.url, timeout=30) as session:
            yield session


@pytest.mark.parametrize(
    "src",
    [
        "{root}/link", "{root}/link/", "{root}/up", "{root}/up/../../secret/outside", "{root}/loop", "{root}/loop/x",
        "{root}/../../secret/outside", "{root}/./../../secret/outside", "{root}//..//..//secret//outside",
        "{root}/%2e%2e/%2e%2e/secret/outside", "file:{root}/%2e%2e/%2e%2e/secret/outside",
        "file://localhost{root}/%2e%2e/%2e%2e/secret/outside", "file:{root}/%252e%252e/%252e%252e/secret/outside",
        "file:{root}/a%00b", "{root}/a\0b", "FILE:///etc", "file:", "file://", "file:////etc", "file:.",
        "file://host.test{root}/link", "s3://bucket/../x", "S3://bucket", "ftp://x/y", "data:,x", "\\\\host\\share",
        "/", ".", "..", "/proc/self/root/etc", "/proc/self/cwd", "/proc/self/environ", "/dev/stdin", "/etc/passwd",
        "{root}", "{root}/.", "{root}/pipe", "{root}/directories", "{root}/archive.tar.gz",
        "{root}/archive.tar.gz/../link", "{root}/\u202e..", "{root}/\uff0e\uff0e/\uff0e\uff0e/secret/outside",
        "{root}/\n", "{root}/" + "x" * 255, "{root}/" + "x" * 256, "x" * 4097, "../" * 1365, "\ud800", "$HOME", "~root",
    ],
    ids=lambda src: repr(src[:40]),
)  # fmt: skip
def test_no_source_leads_out_of_the_directories_of_adapters(client: httpx.Client, home: Path, src: str) -> None:
    asked = src.replace("{root}", str(home / "adapters"))
    body = json.dumps({"name": "poet", "src": asked})  # in ASCII: a lone surrogate is an escape
    reply = client.post("/adapters", content=body, headers={"content-type": "application/json"})
    assert reply.status_code in (400, 404), reply.text
    for told in (str(home.parent), "root:", "Traceback", "Errno"):
        assert told not in reply.text
    assert client.get("/adapters").json()["adapters"] == []
    assert not (home.parent / "escaped").exists()


@pytest.mark.parametrize(
    "name", ["..%2f..%2fetc", "%2e%2e", "%00", "a%0d%0ab", "x" * 5000, "%ff", "link", "%2e%2e%2fsecret"]
)
def test_no_name_in_a_path_reaches_a_file(client: httpx.Client, home: Path, name: str) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/update?src=link")):
        reply = client.request(method, f"/adapters/{name}{path}")
        assert 400 <= reply.status_code < 500, reply.text
        assert len(reply.content) < 1000
        assert str(home.parent) not in reply.text
    assert (home / "adapters" / "link").is_symlink()


@pytest.mark.skipif(VLLM, reason="the embedded engine")
def test_the_embedded_engine_has_no_adapters(target: Target) -> None:
    for reply in (
        target.http.post("/adapters", json={"name": "a", "src": "/etc"}),
        target.http.get("/adapters/..%2f"),
        target.http.delete("/adapters/a"),
    ):
        assert reply.status_code == 400
        assert "LoRA is not enabled" in reply.text
