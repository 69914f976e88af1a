"""How many replicas the embedded engine starts on a CPU when nobody has said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.machine import Device, Machine
from handlers.backends.rolling.plan import plan_engines
from properties.settings import Settings

GIB = 1 << 30


@pytest.mark.parametrize(
    ("replicas", "weights", "memory", "cores", "settings"),
    [
        (2, GIB, 16 * GIB, 2, {}),
        (2, GIB, 16 * GIB, 64, {}),
        (2, GIB // 4, 4 * GIB, 2, {"kv_cache_memory_mb": 256}),
        (1, GIB + 1, 16 * GIB, 2, {}),
        (1, GIB, 8 * GIB, 2, {}),
        (1, GIB, 16 * GIB, 1, {}),
        (1, GIB, 16 * GIB, 2, {"kv_cache_memory_mb": 4096}),
        (1, GIB, 16 * GIB, 2, {"tensor_parallel_degree": 2}),
        (1, GIB, 16 * GIB, 2, {"rolling_batch": "disable"}),
        (1, GIB, 16 * GIB, 2, {"max_workers": 1}),
        (1, GIB, 16 * GIB, 2, {"min_workers": 1}),
        (3, GIB, 16 * GIB, 2, {"max_workers": 3}),
        (1, 0, 16 * GIB, 2, {}),
    ],
)
def test_a_small_model_gets_two_replicas_where_they_fit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    replicas: int,
    weights: int,
    memory: int,
    cores: int,
    settings: dict[str, Any],
) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(weights)
    monkeypatch.setattr("handlers.backends.rolling.plan.usable_cores", lambda: cores)
    machine = Machine((), Device("host memory", memory))
    planned = plan_engines(Settings(**settings), str(tmp_path), 0, machine=machine)
    assert len(planned) == replicas
    assert {engine.cpu_share for engine in planned} == {1 / replicas}
