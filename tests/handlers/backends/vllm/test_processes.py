"""The processes of an engine, with real ones: found, watched, and killed with all that they have started."""

from __future__ import annotations

import asyncio
import errno
import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import psutil
import pytest

from handlers.backends.vllm.processes import ProcessTree
from processes.guard import Guard

if not sys.platform.startswith("linux"):
    pytest.skip("vLLM runs on Linux only", allow_module_level=True)

TREE = """
import subprocess, sys, time
depth = int(sys.argv[1])
if depth:
    child = subprocess.Popen([sys.executable, "-c", sys.argv[2], str(depth - 1), sys.argv[2], *sys.argv[3:]])
print("up", flush=True)
time.sleep(60)
"""


class Tree:
    """A process, its child, and so on, as deep as asked; the last word of each command line is `title`."""

    def __init__(self, depth: int, title: str = "VLLM::Worker") -> None:
        self.top = subprocess.Popen(
            [sys.executable, "-c", TREE, str(depth), TREE, title], stdout=subprocess.PIPE, text=True
        )
        assert self.top.stdout is not None
        for _ in range(depth + 1):
            assert self.top.stdout.readline() == "up\n"
        self.all = [psutil.Process(self.top.pid), *psutil.Process(self.top.pid).children(recursive=True)]
        assert len(self.all) == depth + 1

    def end(self) -> None:
        for process in self.all:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.top.wait()
        assert self.top.stdout is not None
        self.top.stdout.close()


@pytest.fixture
def tree() -> Iterator[Tree]:
    made = Tree(2)
    yield made
    made.end()


def until(holds: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_all_generations_are_found_parents_first(tree: Tree) -> None:
    assert [process.pid for process in ProcessTree([tree.top.pid]).members] == [process.pid for process in tree.all]


def test_a_stopped_grandchild_is_killed_though_its_parents_have_gone(tree: Tree) -> None:
    family = ProcessTree([tree.top.pid])
    tree.all[2].send_signal(signal.SIGSTOP)
    for process in tree.all[:2]:
        process.kill()
    tree.top.wait()
    assert alive(tree.all[2])
    assert family.kill(20.0) == []
    assert not alive(tree.all[2])


def test_what_was_started_since_is_killed_too() -> None:
    top = subprocess.Popen(["/bin/sh", "-c", "read go; sleep 60 & echo $!; wait"], stdin=-1, stdout=-1, text=True)
    assert top.stdin is not None
    assert top.stdout is not None
    family = ProcessTree([top.pid])
    assert len(family.members) == 1
    top.stdin.write("go\n")
    top.stdin.flush()
    late = psutil.Process(int(top.stdout.readline()))
    assert family.kill(20.0) == []
    assert not alive(late)
    top.wait()
    top.stdin.close()
    top.stdout.close()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_death_of_an_engine_or_of_a_worker_is_seen_also_while_nobody_reaps_it(tree: Tree, number: int) -> None:
    family = ProcessTree([tree.top.pid])
    assert family.dead is None
    tree.all[number].kill()
    until(lambda: family.dead is not None)
    assert f"(process {tree.all[number].pid})" in str(family.dead)


def test_a_compiler_may_come_and_go() -> None:
    tree = Tree(1, title="compiler")
    try:
        family = ProcessTree([tree.top.pid])
        tree.all[1].kill()
        until(lambda: not alive(tree.all[1]))
        assert family.dead is None
        assert family.kill(20.0) == []
    finally:
        tree.end()


def share(told: Connection, files: list[Path]) -> None:
    queue = SharedMemory(create=True, size=4096)
    kept = []
    for file in files:
        file.write_bytes(bytes(4096))
        with file.open("r+b") as opened:
            kept.append(mmap.mmap(opened.fileno(), 0))
    told.send(queue.name)
    time.sleep(60)


def test_shared_memory_of_killed_processes_is_given_back_and_an_operators_files_stay() -> None:
    theirs = Path("/dev/shm", f"{os.getpid()}-tp:0-[0-1]-cpushm_0")
    weights = Path("/dev/shm", f"weights-{os.getpid()}.safetensors")
    hearing, telling = multiprocessing.Pipe(duplex=False)
    holder = multiprocessing.get_context("spawn").Process(target=share, args=(telling, [theirs, weights]))
    holder.start()
    own = SharedMemory(create=True, size=4096)
    try:
        assert hearing.poll(60)
        queue = Path("/dev/shm", hearing.recv())
        assert theirs.exists()
        assert queue.exists()
        assert holder.pid is not None
        assert ProcessTree([holder.pid]).kill(20.0) == []
        assert not theirs.exists()
        assert not queue.exists()
        assert weights.exists()
        assert Path("/dev/shm", own.name).exists()
    finally:
        holder.kill()
        holder.join()
        own.close()
        own.unlink()
        for file in (theirs, weights):
            file.unlink(missing_ok=True)


class Held(psutil.Process):
    """One that a driver holds: killed, and there all the same."""

    def kill(self) -> None:
        pass


def test_what_is_left_after_the_time_is_told() -> None:
    other = subprocess.Popen(["sleep", "60"])
    try:
        family = ProcessTree([other.pid])
        held = Held(other.pid)
        family.members = [held]
        assert family.kill(0.1) == [held]
    finally:
        other.kill()
        other.wait()


GUARDED = """
import asyncio, sys, psutil
from processes.guard import Guard
async def main():
    guard = Guard()
    for pids in sys.argv[1:]:
        await guard.protect([psutil.Process(int(pid)) for pid in pids.split()])
    print("guarded", flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""


def test_a_guard_kills_the_processes_that_it_was_last_told_of_when_its_parent_is_killed() -> None:
    engine, other = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
    front = subprocess.Popen(
        [sys.executable, "-c", GUARDED, str(other.pid), str(engine.pid)],
        stdout=subprocess.PIPE,
    )
    try:
        assert front.stdout is not None
        assert front.stdout.readline() == b"guarded\n"
        (guard,) = psutil.Process(front.pid).children()
        front.kill()
        assert engine.wait(20) == -signal.SIGKILL
        psutil.wait_procs([guard], timeout=20)
        assert other.poll() is None
    finally:
        for one in (engine, other, front):
            one.kill()
            one.wait()
        assert front.stdout is not None
        front.stdout.close()


def test_a_guard_that_is_released_or_told_of_nobody_kills_nobody() -> None:
    engine = subprocess.Popen(["sleep", "60"])

    async def guarded() -> None:
        guard = Guard()
        await guard.protect([psutil.Process(engine.pid)])
        await guard.protect([])
        await guard.close()
        await guard.protect([psutil.Process(engine.pid)])
        await guard.close()
        await guard.close()

    try:
        asyncio.run(guarded())
        assert engine.poll() is None
    finally:
        engine.kill()
        engine.wait()


def test_that_no_guard_can_be_started_is_told_once_for_the_same_processes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine that is being built is looked at twice a second."""

    async def none_left(*_: object, **__: object) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    async def guarded() -> None:
        guard = Guard()
        for _ in range(3):
            await guard.protect([psutil.Process()])

    monkeypatch.setattr("processes.child.Child.start", none_left)
    asyncio.run(guarded())
    (record,) = caplog.records
    assert "without a guard" in record.getMessage()


def test_a_guard_that_was_killed_is_replaced() -> None:
    engine = subprocess.Popen(["sleep", "60"])

    async def guarded() -> None:
        guard, known = Guard(), psutil.Process(engine.pid)

        def guards() -> set[psutil.Process]:
            mine = {child for child in psutil.Process().children() if alive(child)}
            return {child for child in mine if "processes.guard" in child.cmdline()}

        await guard.protect([known])
        (first,) = guards()
        first.kill()
        while alive(first):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await guard.protect([known])
        (second,) = guards()
        assert second != first
        await guard.close()

    try:
        asyncio.run(guarded())
    finally:
        engine.kill()
        engine.wait()
