"""Child processes: what they are given, what they may take, what becomes of what they print, and how they end."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import psutil
import pytest
import uvloop

from processes.child import Child, Limits, Log

logger = logging.getLogger("processes.test")


def with_child(
    work: Callable[[Child], Awaitable[None]],
    *,
    level: int = logging.INFO,
    bounded: bool = True,
    **options: Any,
) -> None:
    async def main() -> None:
        child = await Child.start(
            "tests.support.echoing_child", "plain", Log(logger, level, bounded=bounded), **options
        )
        try:
            await asyncio.wait_for(work(child), 60)
        finally:
            child.kill()
            await child.wait()

    uvloop.run(main())  # as the server does


async def ask(child: Child, question: str, descriptor: int | None = None) -> Any:
    child.send(question.encode(), descriptor=descriptor)
    return json.loads(await child.receive())


def test_it_gets_the_variables_it_is_given_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVING_API_KEY", "secret")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")

    async def work(child: Child) -> None:
        found = await ask(child, "environment")
        assert found["LC_ALL"] == "C.UTF-8"
        assert found["GIVEN"] == "too"
        assert "SERVING_API_KEY" not in found
        assert "secret" not in json.dumps(found)

    with_child(work, variables={"GIVEN": "too"})


def test_messages_of_any_size_and_descriptors_arrive() -> None:
    async def work(child: Child) -> None:
        for size in (0, 1, 2**16 - 7, 2**16, 2**22):
            assert await ask(child, "length " + "x" * size) == size
        reader, writer = os.pipe()
        await ask(child, "write through the pipe", writer)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            assert pipe.read() == b"through the pipe"  # to its end: the child has closed its copy

    with_child(work)


def test_it_is_limited_and_leaves_no_core() -> None:
    async def work(child: Child) -> None:
        assert await ask(child, "limits") == [100 << 20, 40, 0]
        assert await ask(child, f"allocate {10 << 20}") == 10 << 20
        assert await ask(child, f"allocate {200 << 20}") == "MemoryError"

    with_child(work, limits=Limits(data_bytes=100 << 20, open_files=40))


def test_what_it_prints_is_logged_line_by_line_within_a_rate(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def work(child: Child) -> None:
        await ask(child, "print_out hello")
        await ask(child, "print 1 WARNING with a level")
        await ask(child, "print 300000 a line of a library that has much to say")
        await ask(child, "print 1 the last words")
        assert await child.stop(60) == 0
        assert child.last_output.endswith("the last words")

    with_child(work, level=logging.DEBUG)
    said = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == logger.name]
    assert said[:2] == [("DEBUG", "hello"), ("WARNING", "with a level")]
    assert sum(len(text) for _, text in said) < 200_000  # of 13 MB
    left_out = [re.fullmatch(r"(\d+) bytes that the process printed were not logged", text) for _, text in said]
    assert sum(int(found[1]) for found in left_out if found) > 12_000_000
    assert all("\n" not in text for _, text in said)


def test_its_death_is_noticed_and_it_is_reaped() -> None:
    async def work(child: Child) -> None:
        assert not child.has_ended()
        child.send(b"die")
        with pytest.raises(EOFError):
            await child.receive()
        assert child.has_ended()
        assert await child.wait() == -signal.SIGSEGV
        assert not psutil.pid_exists(child.pid)

    with_child(work)


def test_one_that_is_killed_while_idle_is_known_to_have_ended_at_once() -> None:
    async def work(child: Child) -> None:
        await ask(child, "limits")
        process = psutil.Process(child.pid)
        child.kill()
        with suppress(psutil.NoSuchProcess):
            while process.status() != psutil.STATUS_ZOMBIE:  # without a turn of the event loop
                os.sched_yield()
        assert child.has_ended()

    with_child(work)


def test_it_ends_by_itself_when_the_connection_is_closed_and_is_killed_when_it_cannot() -> None:
    async def ends(child: Child) -> None:
        await ask(child, "limits")
        assert await child.stop(30) == 0

    async def stopped(child: Child) -> None:
        await ask(child, "limits")
        assert not child.is_stopped()
        os.kill(child.pid, signal.SIGSTOP)
        while not child.is_stopped():  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert await child.stop(0.1) == -signal.SIGKILL

    with_child(ends)
    with_child(stopped)


def test_an_answer_is_not_lost_with_whoever_waited_for_it() -> None:
    async def work(child: Child) -> None:
        os.kill(child.pid, signal.SIGSTOP)
        child.send(b"length " + b"x" * 2**22)  # more than the socket takes
        waiting = asyncio.create_task(child.receive())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        assert waiting.cancelled()
        os.kill(child.pid, signal.SIGCONT)
        assert json.loads(await child.receive()) == 2**22
        assert await ask(child, "length xyz") == 3

    with_child(work)


def test_an_absurd_length_is_no_message() -> None:
    async def work(child: Child) -> None:
        child.send(b"flood")
        with pytest.raises(EOFError, match="announced a message of 2147483647 bytes"):
            await child.receive()

    with_child(work)


def test_it_dies_with_a_parent_that_is_killed_even_when_it_is_stopped() -> None:
    script = """
import asyncio, logging
from processes.child import Child, Log
async def main():
    child = await Child.start("tests.support.echoing_child", "plain", Log(logging.getLogger()))
    child.send(b"limits")
    await child.receive()
    print(child.pid, flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    child.suspend()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 30
    while not _ended(child):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_messages_go_both_ways_at_any_time_over_a_connection() -> None:
    async def work(child: Child) -> None:
        connection = await child.connect()
        sizes = (0, 1, 2**16 - 7, 2**22)
        for size in sizes:
            connection.send(b"length " + b"x" * size)
        assert [json.loads(await connection.receive() or b"") for _ in sizes] == list(sizes)
        assert await child.stop(30) == 0
        assert await connection.receive() is None
        with pytest.raises(OSError, match="closed"):
            connection.send(b"more")

    with_child(work)


def _ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_what_it_has_started_ends_with_it() -> None:
    async def work(child: Child) -> None:
        below = psutil.Process(await ask(child, "start"))
        assert await child.stop(30) == 0
        end = time.monotonic() + 30
        while not _ended(below):  # a zombie, where nobody reaps orphans: psutil would wait for it
            assert time.monotonic() < end
            await asyncio.sleep(0.02)

    with_child(work)


def test_the_log_of_one_that_is_not_bounded_is_whole(caplog: pytest.LogCaptureFixture) -> None:
    async def work(child: Child) -> None:
        await ask(child, "print 20000 a line of a handler")
        await ask(child, "print 1 " + "x" * 10_000)
        assert await child.stop(60) == 0

    caplog.set_level(logging.INFO)
    with_child(work, bounded=False)
    said = [record.getMessage() for record in caplog.records if record.name == logger.name]
    assert said == ["a line of a handler"] * 20_000 + ["x" * 10_000]
