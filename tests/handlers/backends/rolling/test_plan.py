"""How many replicas the embedded engine starts on a CPU when nobody has said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.machine import Device, Machine
from handlers.backends.rolling.plan import plan_engines
from handlers.offline.options import configure
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


@pytest.mark.parametrize(
    ("replicas", "positions", "settings"),
    [
        (2, 16384, {}),
        (1, 16385, {}),
        (2, 16385, {"max_model_len": 16384}),
        (2, 16385, {"kv_cache_memory_mb": 256}),
    ],
)
def test_a_model_whose_longest_request_takes_more_than_half_of_the_cache_gets_one_replica(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replicas: int, positions: int, settings: dict[str, Any]
) -> None:
    shapes = {"num_hidden_layers": 32, "num_attention_heads": 8, "head_dim": 64}  # 128 KiB a token in float32
    (tmp_path / "config.json").write_text(json.dumps({**shapes, "max_position_embeddings": positions}))
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(GIB // 4)
    monkeypatch.setattr("handlers.backends.rolling.plan.usable_cores", lambda: 2)
    machine = Machine((), Device("host memory", 16 * GIB))
    assert len(plan_engines(Settings(**settings), str(tmp_path), 0, machine=machine)) == replicas


@pytest.mark.parametrize(("options", "replicas"), [({}, 1), ({"max_workers": 2}, 2)])
def test_a_script_has_one_replica_unless_it_asks_for_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], replicas: int
) -> None:
    monkeypatch.delenv("SERVING_MAX_WORKERS", raising=False)
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(GIB // 4)
    monkeypatch.setattr("handlers.backends.rolling.plan.usable_cores", lambda: 2)
    machine = Machine((), Device("host memory", 16 * GIB))
    settings = configure(str(tmp_path), options).settings
    assert len(plan_engines(settings, str(tmp_path), 0, machine=machine)) == replicas
    assert len(plan_engines(Settings(**options), str(tmp_path), 0, machine=machine)) == 2
