"""The probe tells a server that stalls from a machine that is busy."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from tests.attack.probe import Probe, Readings, Stalls


def measured(folder: Path, work: Any) -> Stalls:
    """What the probe says of a loop on which this coroutine function runs."""
    path = folder / "probe"
    readings = Readings(path)

    async def run() -> Stalls:
        Probe(path).start(asyncio.get_running_loop())
        await asyncio.to_thread(readings.reset)
        await work()
        return await asyncio.to_thread(readings.read)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


@pytest.fixture
def busy_machine() -> Iterator[None]:
    """More processes that compute than the machine has cores."""
    import os

    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(3 * (os.cpu_count() or 1))]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_work_on_the_loop_is_a_stall(tmp_path: Path) -> None:
    async def compute() -> None:
        end = time.thread_time() + 0.2
        while time.thread_time() < end:
            pass

    found = measured(tmp_path, compute)
    assert found.work > 0.15
    assert sum(found.counts[-7:]) >= 1


def test_a_thread_that_holds_the_gil_is_a_stall(tmp_path: Path) -> None:
    found = measured(tmp_path, lambda: asyncio.to_thread(sum, range(20_000_000)))
    assert found.held > 0.05
    assert found.work < 0.05


@pytest.mark.usefixtures("busy_machine")
def test_threads_without_the_gil_on_a_busy_machine_are_none(tmp_path: Path) -> None:
    data = bytes(30_000_000)

    async def hash_them() -> None:
        await asyncio.gather(*(asyncio.to_thread(hashlib.sha256, data) for _ in range(4)))

    # A machine that stops this one for a moment can look like work, though not thrice.
    assert min(measured(tmp_path, hash_them).longest for _ in range(3)) < 0.05


def test_a_loop_with_nothing_to_do_does_not_stall(tmp_path: Path) -> None:
    found = measured(tmp_path, lambda: asyncio.sleep(0.3))
    assert found.longest < 0.05
    assert sum(found.counts) > 5
