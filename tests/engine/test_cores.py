"""Threads follow the container's quota, not the machine's size."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.executor import threads_for
from engine.machine import usable_cores
from engine.packed_linear import PackedLinear, pack, packable
from engine.process import use_cores
from engine.threads import MANY_ROWS, RECENT, RETRY, StepThreads
from tests.support.engine_driver import load_engine
from tests.support.shapes import ROOT


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "nonsense"}, None),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
    ],
)
def test_the_quota_bounds_the_cores(tmp_path: Path, files: dict[str, str], limit: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cores(tmp_path) == (len(os.sched_getaffinity(0)) if limit is None else limit)


def test_threads_are_shared_by_replicas_and_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("engine.executor.usable_cores", lambda: 17)
    assert threads_for(EngineConfig(model_path="")) == 16
    assert threads_for(EngineConfig(model_path="", cpu_share=0.5, devices=("cpu", "cpu"))) == 4
    assert threads_for(EngineConfig(model_path="", cpu_share=0.01)) == 1
    monkeypatch.setattr("engine.executor.usable_cores", lambda: 2)
    assert threads_for(EngineConfig(model_path=""), 1 << 30) == 2
    assert threads_for(EngineConfig(model_path="", cpu_share=0.5), 1 << 30) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_for(EngineConfig(model_path="")) == 3


def test_a_small_model_takes_no_more_threads_than_its_weights_keep_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("engine.executor.usable_cores", lambda: 9)
    one = EngineConfig(model_path="")
    assert threads_for(one, 4 << 20) == 1
    assert threads_for(one, 200 << 20) == 3
    assert threads_for(one, 8 << 30) == 8
    assert threads_for(EngineConfig(model_path="", devices=("cpu", "cpu")), 200 << 20) == 3
    assert threads_for(EngineConfig(model_path="", threads=5), 4 << 20) == 5


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Steps:
    """Steps of a virtual duration, computed with threads that `threads` chooses."""

    def __init__(self) -> None:
        self._now = 0.0
        self.threads = StepThreads(2, lambda: self._now)

    def run(self, count: int, rows: int, seconds: dict[int, float]) -> list[int]:
        """Run so many steps that take the seconds of their number of threads; return these numbers."""
        used = []
        for _ in range(count):
            with self.threads.step(rows):
                used.append(torch.get_num_threads())
                self._now += seconds[used[-1]]
        return used


@pytest.mark.usefixtures("restored_threads")
def test_small_steps_get_the_number_of_threads_that_was_faster_of_late() -> None:
    steps = Steps()
    idle, busy = {1: 0.016, 2: 0.012}, {1: 0.016, 2: 0.028}
    assert steps.run(2 * RECENT + 7 * RETRY, 1, idle).count(1) == RECENT + 7
    used = steps.run(8 * RETRY, 1, busy)
    assert used[0] == 2
    assert 2 not in used[RECENT : RETRY - 1]
    assert used.count(2) <= RECENT + 8
    used = steps.run(RECENT * RETRY + 200, 1, idle)
    assert used[-RETRY:].count(2) >= RETRY - 1
    assert steps.run(2 * RECENT + 1, 8, busy)[-1] == 1, "other sizes are timed apart"


@pytest.mark.usefixtures("restored_threads")
def test_prompts_get_all_threads_and_a_single_thread_is_left_alone() -> None:
    torch.set_num_threads(1)
    with StepThreads(2).step(MANY_ROWS):
        assert torch.get_num_threads() == 2
    for rows in (1, MANY_ROWS):
        with StepThreads(1).step(rows):
            assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("restored_threads")
def test_what_was_learned_outlives_a_change_of_cores() -> None:
    steps = Steps()
    busy = {1: 0.016, 2: 0.028}
    steps.run(2 * RECENT, 1, busy)
    for cores in (1, 2):
        steps.threads.count = cores
    assert steps.run(10, 1, busy) == [1] * 10


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 8, MANY_ROWS])
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype, rows: int) -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(1024, 3072, bias=False, dtype=dtype))
    pack(layer)
    assert isinstance(layer[0], PackedLinear) or not packable(torch.empty(3072, 1024, dtype=dtype))
    inputs, results = torch.randn(rows, 1024).to(dtype), []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(layer(inputs))
    assert torch.equal(*results)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
@pytest.mark.parametrize(("environ", "kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)])
def test_freed_memory_is_kept_unless_the_operator_says_otherwise(environ: dict[str, str], kept: bool) -> None:
    program = (
        "import psutil\n"
        "from engine.machine import keep_freed_memory\n"
        "keep_freed_memory()\n"
        "before = psutil.Process().memory_info().rss\n"
        "memory = bytearray(100 << 20)\n"
        "memory[::4096] = b'x' * len(memory[::4096])\n"
        "del memory\n"
        "print(psutil.Process().memory_info().rss - before)\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**clean, **environ},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (int(done.stdout) > 90 << 20) is kept


def test_the_cores_of_an_idle_replica_are_used_by_the_others(tiny_llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("engine.executor.usable_cores", lambda: 5)
    monkeypatch.setattr("engine.executor.BYTES_PER_THREAD", 1)
    runner, before = load_engine(tiny_llava).runner, torch.get_num_threads()
    try:
        for share, threads in ((1.0, 4), (0.5, 2), (1.0, 4)):
            use_cores(runner, EngineConfig(model_path="", cpu_share=share))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
