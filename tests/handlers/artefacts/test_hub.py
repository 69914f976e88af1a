"""Models from the hub, fetched by the real client from a small hub on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from handlers.artefacts.hub import wanted
from tests.support.shapes import ROOT

COMMIT = "a" * 40
FILES = {
    "config.json": b'{"model_type": "llava"}',
    "model.safetensors": b"w" * 3000,
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "modeling_llava.py": b"print('hostile')",
    "pytorch_model.bin": b"b" * 3000,
    "original/consolidated.pth": b"p" * 3000,
    "README.md": b"# read me",
}


class Hub(BaseHTTPRequestHandler):
    """Repositories `org/llava`, `org/gated` (401) and none else (404)."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/llava/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                for name, body in FILES.items()
            ]
            self._answer(200, json.dumps(tree).encode())
        elif path.startswith("/api/models/org/llava") and not path.endswith("/revision/v9"):
            listed = [{"rfilename": name, "size": len(body)} for name, body in FILES.items()]
            self._answer(200, json.dumps({"id": "org/llava", "sha": COMMIT, "siblings": listed}).encode())
        elif path.startswith("/api/models/org/llava"):
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith("/org/llava/resolve/"):
            body = FILES[path.split("/", 5)[5]]
            etag = hashlib.sha1(body).hexdigest()
            self._answer(200, body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        elif "/org/gated" in path:
            self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        else:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def fetch(hub: str, home: Path, *names: str, offline: bool = False, code: bool = False) -> list[str]:
    """In a process of its own, as the hub's client reads its environment once: a directory or an error each."""
    program = """
import sys, threading
from pathlib import Path
from handlers.artefacts import ArtefactError
from handlers.artefacts.fetch import fetch
from properties.model import locate
from handlers.progress import shown
from properties.settings import Settings
root, offline, code, *names = sys.argv[1:]
settings = Settings(download_dir=root, offline=offline == "True", trust_remote_code=code == "True")
for name in names:
    name, _, revision = name.partition("@")
    try:
        with shown(lambda progress: None, 60) as progress:
            directory = fetch(locate(name, revision or None, None), settings, threading.Event())
        print(f"{progress.done} of {progress.total}: {directory}" if progress.total else directory)
    except ArtefactError as error:
        print("error:", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(home / "root"), str(offline), str(code), *names],
        cwd=ROOT,
        env={**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_only_what_serving_needs_is_fetched(hub: str, tmp_path: Path) -> None:
    first, again, gated, missing, revision = fetch(
        hub, tmp_path, "org/llava", "org/llava", "org/gated", "org/other", "org/llava@v9"
    )
    progress, _, directory = first.partition(": ")
    size = sum(path.stat().st_size for path in Path(directory).iterdir())
    assert progress == f"{size} of {size}"
    assert sorted(path.name for path in Path(directory).iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert Path(directory, "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert again == directory
    assert "org/gated is gated" in gated
    assert "HF_TOKEN" in gated
    assert "no model org/other on the hub" in missing
    assert "no revision 'v9'" in revision
    (offline,) = fetch("http://127.0.0.1:9", tmp_path, "org/llava", offline=True)
    assert offline == directory
    unreachable, absent = fetch("http://127.0.0.1:9", tmp_path, "org/llava", "org/absent")
    assert unreachable == directory
    assert "the hub cannot be reached" in absent


def test_code_is_fetched_only_when_it_may_run(hub: str, tmp_path: Path) -> None:
    directory = fetch(hub, tmp_path, "org/llava", code=True)[0].partition(": ")[2]
    assert Path(directory, "modeling_llava.py").is_file()


def test_of_weights_only_the_best_kind_is_wanted() -> None:
    assert wanted(["model-1.safetensors", "consolidated.safetensors"], False) == ["model-1.safetensors"]
    assert wanted(["consolidated.safetensors", "params.json"], False) == [
        "params.json",
        "consolidated.safetensors",
    ]
    assert wanted(["pytorch_model-1.bin", "x/model.safetensors"], False) == ["pytorch_model-1.bin"]
