"""examples/ray_serve.py on one machine: the server behind Ray Serve's proxy."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.live import chat_body
from tests.support.shapes import ROOT, SHAPES, circle

PYTHON = os.environ.get("RAY_PYTHON", "")
WHAT = "What is this an image of?"

pytestmark = pytest.mark.skipif(not PYTHON, reason="no Ray: name a Python that has ray[serve] in RAY_PYTHON")

RUN = """
import sys, signal, threading
import ray
from ray import serve
from examples.ray_serve import Lmi
port, model, lmi, temporary = sys.argv[1:]
environment = {"env_vars": {"LMI": lmi, "OMP_NUM_THREADS": "1"}}
ray.init(num_cpus=2, include_dashboard=False, _temp_dir=temporary, object_store_memory=100 * 2**20,
         runtime_env=environment)
serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
serve.run(Lmi.options(num_replicas=2, ray_actor_options={"num_cpus": 0.1}).bind(model))
print("up", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
print("down", flush=True)
"""


@pytest.fixture(scope="module")
def ray() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temporary:  # a short path
        lmi = Path(temporary, "lmi")
        lmi.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m container.cli "$@"\n')
        lmi.chmod(0o755)
        process = subprocess.Popen(
            [PYTHON, "-c", RUN, port, str(SHAPES), str(lmi), temporary],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert process.stdout is not None
        try:
            assert any(line == "up\n" for line in process.stdout), "Ray Serve did not start"
            yield f"http://127.0.0.1:{port}"
        finally:
            lmis = servers()
            told, _ = process.communicate(timeout=120)
    assert told.splitlines()[-1:] == ["down"]
    psutil.wait_procs(lmis, timeout=60)
    assert not any(one.is_running() for one in lmis)


def servers() -> list[psutil.Process]:
    """The servers that the replicas have started, of this user's processes."""
    return [
        one
        for one in psutil.process_iter(["cmdline", "ppid"])
        if one.info["cmdline"]
        and one.info["cmdline"][1:4] == ["-m", "container.cli", "serve"]
        and "ServeReplica" in " ".join(psutil.Process(one.info["ppid"]).cmdline())
    ]


def test_chats_go_through_whole_and_streamed(ray: str) -> None:
    assert len(servers()) == 2
    body = chat_body(circle("red"), WHAT)
    for route in ("/v1/chat/completions", "/invocations"):
        reply = httpx.post(f"{ray}{route}", json=body, timeout=60)
        assert reply.json()["choices"][0]["message"]["content"] == "a red circle"
    with httpx.stream("POST", f"{ray}/v1/chat/completions", json={**body, "stream": True}, timeout=60) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        *chunks, done = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert done == "[DONE]"
    assert "".join(json.loads(chunk)["choices"][0]["delta"].get("content") or "" for chunk in chunks) == "a red circle"


def test_errors_and_their_headers_go_through(ray: str) -> None:
    reply = httpx.post(f"{ray}/v1/chat/completions", json={"messages": []}, timeout=60)
    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")
    assert "x-request-id" in reply.headers
    assert httpx.get(f"{ray}/nowhere", timeout=60).status_code == 404
