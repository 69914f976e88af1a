"""How many devices share the attention of a model: what vLLM can divide, chosen or told before it is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.machine import Device, Machine
from handlers.backends.fit import fit
from handlers.backends.select import backend_of
from handlers.backends.vllm.devices import Heads, Plan, heads_of, model_heads, plan_devices
from properties.configuration import resolve

QWEN2_VL_7B = Heads(28, 4)


def plan(heads: Heads | None, devices: int, *options: str) -> Plan:
    configuration = resolve(model="org/model", environ={}, options=options)
    return plan_devices(configuration.settings, configuration.extra_texts, devices, heads)


@pytest.mark.parametrize(
    ("heads", "devices", "options", "sizes"),
    [
        (QWEN2_VL_7B, 8, (), (4, 1, 2)),
        (QWEN2_VL_7B, 7, (), (4, 1, 1)),
        (QWEN2_VL_7B, 8, ("max_workers=1",), (4, 1, 1)),
        (QWEN2_VL_7B, 8, ("data_parallel_degree=1",), (4, 1, 1)),
        (QWEN2_VL_7B, 8, ("pipeline_parallel_degree=2",), (4, 2, 1)),
        (Heads(32, 8), 8, (), (8, 1, 1)),
        (Heads(32, 2), 8, (), (8, 1, 1)),
        (Heads(15, 5), 8, (), (5, 1, 1)),
        (Heads(13, 13), 8, (), (1, 1, 8)),
        (Heads(4, 4, vision=5), 4, (), (1, 1, 4)),
        (Heads(32, 8, vision=12), 8, (), (4, 1, 2)),
        (Heads(32, 8, vision=12), 8, ("mm_encoder_tp_mode=data",), (8, 1, 1)),
        (None, 8, (), (8, 1, 1)),
        (None, 0, (), (1, 1, 1)),
        (None, 0, ("min_workers=2",), (1, 1, 2)),
        (None, 0, ("min_workers=2", "max_workers=3"), (1, 1, 3)),
    ],
)
def test_max_is_the_most_that_share_the_heads_evenly(
    heads: Heads | None, devices: int, options: tuple[str, ...], sizes: tuple[int, int, int]
) -> None:
    found = plan(heads, devices, *options)
    assert (found.tensor, found.pipeline, found.data) == sizes
    assert found.problems == []


def test_a_smaller_degree_than_the_machine_has_is_said() -> None:
    (warning,) = plan(QWEN2_VL_7B, 8, "max_workers=1").warnings
    assert str(warning) == (
        "option.tensor_parallel_degree = max is 4 here, not 8: the model's 28 attention and 4 key/value heads cannot "
        "be shared evenly by more; 4 of 8 devices are used"
    )
    assert plan(QWEN2_VL_7B, 4).warnings == []


@pytest.mark.parametrize("degree", [3, 7, 8])
def test_a_degree_that_does_not_divide_the_heads_is_refused(degree: int) -> None:
    (problem,) = plan(QWEN2_VL_7B, 8, f"tensor_parallel_degree={degree}").problems
    below = 2 if degree == 3 else 4
    assert str(problem) == (
        f"option.tensor_parallel_degree = {degree}: the model's 28 attention and 4 key/value heads cannot be shared "
        f"evenly by {degree} devices; the next lower degree that works is {below}"
    )


def test_without_accelerators_a_degree_is_checked_too() -> None:
    assert plan(Heads(4, 2), 0, "tensor_parallel_degree=2").problems == []
    assert len(plan(Heads(4, 2), 0, "tensor_parallel_degree=3").problems) == 1


def test_several_machines_share_the_heads_as_well() -> None:
    assert plan(QWEN2_VL_7B, 8, "nnodes=2").tensor == 4
    (problem,) = plan(QWEN2_VL_7B, 8, "nnodes=2", "tensor_parallel_degree=16").problems
    assert "cannot be shared evenly by 16 devices" in str(problem)


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        ({"num_attention_heads": 28, "num_key_value_heads": 4}, QWEN2_VL_7B),
        ({"text_config": {"num_attention_heads": 8}}, Heads(8, 8)),
        ({"num_attention_heads": 128, "num_key_value_heads": 1, "kv_lora_rank": 512}, Heads(128, 128)),
        ({"n_head": 12}, Heads(12, 12)),
        (
            {"n_head": 12, "vision_config": {"model_type": "clip_vision_model", "num_attention_heads": 16}},
            Heads(12, 12, 16),
        ),
        (
            {"n_head": 12, "vision_config": {"model_type": "intern_vit_6b", "num_attention_heads": 25}},
            Heads(12, 12),
        ),
        ({"n_head": 12, "vision_config": {"model_type": "clip_vision_model"}}, Heads(12, 12)),
        ({"num_attention_heads": None}, None),
        ({}, None),
    ],
)
def test_heads_are_read_from_the_configuration(config: dict[str, Any], heads: Heads | None) -> None:
    assert heads_of(config) == heads


def test_what_config_json_leaves_out_is_its_familys(tmp_path: Path) -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "mistral"}, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_heads(tmp_path, config, trust_remote_code=False) == Heads(32, 8, 12)
    assert model_heads(tmp_path, config, trust_remote_code=True) is None
    config = {"model_type": "unheard_of"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_heads(tmp_path, config, trust_remote_code=False) is None


def test_check_says_which_degree_is_chosen(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen2", "hidden_size": 448, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64,
        "num_attention_heads": 28, "num_key_value_heads": 4, "dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    machine = Machine((Device("GPU", 24 << 30),) * 8, Device("host memory", 64 << 30))

    def found(*options: str) -> Any:
        configuration = resolve(model=str(tmp_path), environ={}, options=options)
        return fit(configuration, backend_of("vllm"), tmp_path, config, machine)

    chosen = found()
    assert (chosen.replicas, chosen.devices_per_replica) == (2, 4)
    assert "max is 4 here, not 8" in str(chosen.warnings[0])
    (error,) = found("tensor_parallel_degree=8").errors
    assert "cannot be shared evenly by 8 devices" in str(error)
