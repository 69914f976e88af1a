"""A server that is short of descriptors says so, blames nobody else, and goes on when there are some again."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from handlers.custom.backend import CustomBackend
from handlers.custom.messages import Start
from processes.shortage import shortage
from processes.supervisor import LONGEST_PAUSE_SECONDS, LONGEST_WAIT_SECONDS, Restarts
from tests.support.backend import BACK
from tests.support.live import LiveServer, chat_body
from tests.support.shapes import ROOT, SHAPES


@contextmanager
def no_descriptors(process: int) -> Iterator[None]:
    """Within, the process can open nothing: its standard streams are all that the limit allows."""
    before = resource.prlimit(process, resource.RLIMIT_NOFILE)
    resource.prlimit(process, resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
    finally:
        resource.prlimit(process, resource.RLIMIT_NOFILE, before)


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    options = ("retry_threshold=1", "image_fetch_allow_private=127.0.0.1")
    with LiveServer(SHAPES, *options) as live:
        # Over a connection that is kept: without descriptors the server takes no other.
        live.http = httpx.Client(base_url=live.url, timeout=60, limits=httpx.Limits(keepalive_expiry=None))
        assert live.chat("hello").status_code == 200
        yield live


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x.png", "http://localhost:9/x.png"])
def test_a_fetch_without_descriptors_is_not_the_clients_fault(server: LiveServer, url: str) -> None:
    with no_descriptors(server.process.pid):
        refused = server.chat(url, "What is this?")
    assert refused.status_code == 503
    assert refused.json()["error"]["message"] == "the server is short of file descriptors; try again"
    assert refused.headers["retry-after"] == "5"
    assert server.chat(url, "What is this?").status_code == 422, "there are descriptors, but nobody answers"


def test_a_grammar_that_cannot_be_compiled_now_is_not_the_clients_fault(server: LiveServer) -> None:
    body = chat_body("hello", response_format={"type": "json_object"}, max_tokens=2)
    with no_descriptors(server.process.pid):
        refused = server.http.post("/v1/chat/completions", json=body)
    assert refused.status_code == 503
    assert "retry-after" in refused.headers
    assert server.http.post("/v1/chat/completions", json=body).status_code == 200


def test_an_engine_that_dies_without_descriptors_is_restarted_when_there_are_some(server: LiveServer) -> None:
    """The restarts that fail for want of them are not counted: `retry_threshold` is 1."""
    (engine,) = server.engines
    with no_descriptors(server.process.pid):
        engine.kill()
        for _ in range(4):
            server.wait_for("did not start again: .*Too many open files")
        health = server.http.get("/health")
        assert health.status_code == 503
        assert "the server is short of file descriptors" in health.text
        assert server.chat("hello").status_code == 503
        assert server.process.poll() is None
    server.wait_for(BACK)
    assert server.chat("hello").status_code == 200
    assert server.metrics()["lmi_engine_restarts_total"] >= 5


def test_a_handler_that_dies_without_descriptors_is_restarted_when_there_are_some(tmp_path: Path) -> None:
    """In this process, whose limit is lowered: the supervisor survives that no process can be started."""
    (tmp_path / "model.py").write_text("import os\n\ndef handle(inputs):\n    return str(os.getpid())\n")

    async def main() -> None:
        backend = CustomBackend(Start(str(tmp_path), "model.py", "handle", {}), 1, 1)
        await backend.load()
        (process,) = backend._alive
        with no_descriptors(os.getpid()):
            process.kill()
            while backend.stats().engine_restarts < 4:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            health = backend.health()
        assert not health.ready
        assert not health.lost
        assert "short of file descriptors" in health.reason
        while not backend.health().ready:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await backend.close()

    asyncio.run(main())


def test_what_is_our_own_shortage() -> None:
    for number in (errno.EMFILE, errno.ENFILE):
        assert shortage(OSError(number, "")) == "file descriptors"
    assert shortage(OSError(errno.ENOSPC, "")) == "disk space"
    assert shortage(MemoryError()) == "memory"
    assert shortage(RuntimeError("can't start new thread")) == "processes or threads"
    wrapped = ValueError("a library's words")
    wrapped.__cause__ = OSError(errno.ENOMEM, "")
    assert shortage(wrapped) == "memory"
    for other in (
        ValueError("x"), RuntimeError("x"), OSError(), OSError(errno.ECONNREFUSED, ""),
        FileNotFoundError(errno.ENOENT, ""), TimeoutError(), socket.gaierror(socket.EAI_NONAME, "unknown"), None,
    ):  # fmt: skip
        assert shortage(other) is None, other


def test_a_socket_with_nothing_to_read_is_no_shortage() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        with pytest.raises(BlockingIOError) as nothing:
            ours.recv(1)
    assert shortage(nothing.value) is None
    later = ValueError("raised while that was handled")
    later.__context__ = nothing.value
    assert shortage(later) is None


def test_a_real_shortage_of_threads_and_of_processes_is_known() -> None:
    """In a process of another user, whose limit counts that user's alone."""
    script = (
        "import asyncio, multiprocessing.popen_spawn_posix, multiprocessing.resource_tracker\n"
        "import os, resource, subprocess, threading, uvloop\n"
        "from processes.shortage import shortage\n"
        "async def start_one(): await asyncio.create_subprocess_exec('/bin/true')\n"
        "loop = uvloop.new_event_loop()\n"
        "starts = [threading.Thread(target=print).start, lambda: subprocess.Popen(['/bin/true'])]\n"
        "for way in ('fork', 'spawn'):\n"
        "    starts.append(multiprocessing.get_context(way).Process(target=print).start)\n"
        "starts.append(lambda: loop.run_until_complete(start_one()))\n"
        "os.setuid(54321)\n"
        "resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))\n"
        "for start in starts:\n"
        "    try:\n"
        "        start()\n"
        "    except Exception as error:\n"
        "        print(shortage(error))\n"
    )
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.splitlines() == ["processes or threads"] * 5, found.stderr


def test_restarts_are_counted_but_for_shortages() -> None:
    tries = Restarts(2)
    tries.died(served=True)
    assert (tries.failures, tries.pause, tries.exhausted) == (1, 0.0, False)
    pauses = []
    for _ in range(20):
        tries.failed(OSError(errno.EMFILE, ""))
        pauses.append(tries.pause)
    assert pauses[:4] == [0.5, 1.0, 2.0, 4.0]
    assert max(pauses) == LONGEST_WAIT_SECONDS
    assert not tries.exhausted
    assert "short of file descriptors" in tries.reason("the engine")
    tries.failed(ValueError("its own"))
    assert tries.reason("the engine") == "the engine is being restarted"
    assert (tries.failures, tries.pause) == (2, 0.5)
    tries.failed(ValueError("its own"))
    assert tries.exhausted
    tries.died(served=True)
    assert not tries.exhausted
    many = Restarts(1 << 62)
    many.failures = 5000
    assert many.pause == LONGEST_PAUSE_SECONDS
