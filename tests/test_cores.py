"""Threads follow the container's quota, not the machine's size."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.cores import usable_cores
from engine.executor import default_threads


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
    assert default_threads(EngineConfig(model_path="")) == 16
    assert default_threads(EngineConfig(model_path="", cpu_share=0.5, devices=("cpu", "cpu"))) == 4
    assert default_threads(EngineConfig(model_path="", cpu_share=0.01)) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert default_threads(EngineConfig(model_path="")) == 3
