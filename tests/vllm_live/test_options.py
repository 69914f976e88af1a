"""Options become vLLM's engine arguments, and what is wrong with them is said in the options' own names."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from container.check import run_check
from engine.machine import Device, Machine
from handlers.backends.vllm import devices as device_plan
from handlers.backends.vllm.arguments import engine_arguments
from handlers.backends.vllm.checkpoint import served_dtype
from handlers.backends.vllm.compat import engine_argument_names, load
from handlers.backends.vllm.devices import Cluster
from properties.configuration import Configuration, resolve
from properties.problem import ConfigurationError
from tests.support.shapes import SHAPES

CPU = Machine((), Device("host memory", 16 << 30))


WIDE = tempfile.TemporaryDirectory(prefix="lmi-test-")
"""The configuration of a model whose attention, also that of its tower, 16 devices can share."""


@pytest.fixture(scope="module", autouse=True)
def wide_model() -> None:
    config = json.loads((SHAPES / "config.json").read_text())
    config["text_config"] |= {"num_attention_heads": 16, "num_key_value_heads": 16}
    config["vision_config"] |= {"num_attention_heads": 16}
    Path(WIDE.name, "config.json").write_text(json.dumps(config))


def configure(*options: str, **environ: str) -> Configuration:
    return resolve(model=str(SHAPES), environ=environ, options=options, backend_options=engine_argument_names())


def devices(count: int) -> Machine:
    return Machine(tuple(Device("A10G", 24 << 30) for _ in range(count)), CPU.host)


def arguments(*options: str, machine: Machine = CPU, **environ: str) -> dict[str, Any]:
    return engine_arguments(load(), configure(*options, **environ), Path(WIDE.name), machine)


def problems(*options: str, machine: Machine = CPU) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        arguments(*options, machine=machine)
    return [str(problem) for problem in caught.value.problems]


def test_lmis_names_are_vllms_arguments() -> None:
    found = arguments(
        "tensor_parallel_degree=2", "max_rolling_batch_size=7", "max_rolling_batch_prefill_tokens=512",
        "quantize=fp8", "cpu_offload_gb_per_gpu=1.5", "kv_cache_memory_mb=64", "dtype=fp32",
        'limit_mm_per_prompt={"image": 4}', "request_priorities=true",
    )  # fmt: skip
    want = {
        "tensor_parallel_size": 2, "max_num_seqs": 7, "max_num_batched_tokens": 512, "quantization": "fp8",
        "cpu_offload_gb": 1.5, "kv_cache_memory_bytes": 64 << 20, "dtype": "float32",
        "limit_mm_per_prompt": {"image": 4, "video": 0, "audio": 0}, "scheduling_policy": "priority",
    }  # fmt: skip
    assert {name: found[name] for name in want} == want
    assert Path(found["model"]).is_absolute(), "Ray's workers have another working directory"
    assert found["served_model_name"] == ["shapes"], "no path of this machine in vLLM's own metrics"


def test_words_for_vllm_may_have_capital_letters() -> None:
    found = arguments("quantize=FP8", "scheduling_policy=Priority", "load_format=Dummy")
    assert (found["quantization"], found["scheduling_policy"]) == ("fp8", "priority")
    assert found["load_format"] == "dummy"


def test_what_nobody_wrote_is_left_to_vllm() -> None:
    assert not {"seed", "enable_prefix_caching", "max_model_len", "block_size"} & arguments().keys()


@pytest.mark.parametrize(
    ("option", "name", "value"),
    [
        ("max_logprobs=64.0", "max_logprobs", 64),
        ("kv_cache_memory_bytes=1G", "kv_cache_memory_bytes", 1 << 30),
        ("async_scheduling=False", "async_scheduling", False),
        ("mm_processor_cache_gb=0.5", "mm_processor_cache_gb", 0.5),
        ('hf_overrides={"a": 1}', "hf_overrides", {"a": 1}),
        ("mm_encoder_tp_mode=data", "mm_encoder_tp_mode", "data"),
        ("ignore_patterns=*.bin,*.pt", "ignore_patterns", ["*.bin", "*.pt"]),
        ("distributed_executor_backend=mp", "distributed_executor_backend", "mp"),
    ],
)
def test_any_argument_of_vllms_is_an_option(option: str, name: str, value: object) -> None:
    assert arguments(option)[name] == value


def test_the_environment_names_them_too() -> None:
    assert arguments(OPTION_MAX_LOGPROBS="9")["max_logprobs"] == 9


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "max_logprobs=many",
            "option.max_logprobs = 'many' (--option max_logprobs): allowed: a whole number",
        ),
        ("async_scheduling=perhaps", "allowed: true or false"),
        ("mm_encoder_tp_mode=rows", "allowed: data, weights"),
        ('compilation_config={"modee": 3}', "modee: Unexpected keyword argument; allowed: a JSON object"),
        ("tokenizer=other", "not to be set here: the tokenizer is the model's own"),
        ("model=other", "not to be set here: write option.model_id"),
    ],
)
def test_a_bad_value_is_told_with_the_option_and_what_is_allowed(option: str, message: str) -> None:
    (problem,) = problems(option)
    assert message in problem


def test_check_tells_it_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check(str(SHAPES), ["rolling_batch=vllm", "max_logprobs=many"], False, {}) == 1
    assert "option.max_logprobs = 'many' (--option max_logprobs): allowed: a whole number" in (capsys.readouterr().out)


def test_two_spellings_may_agree_but_not_differ() -> None:
    same = arguments("kv_cache_memory_mb=64", f"kv_cache_memory_bytes={64 << 20}")
    assert same["kv_cache_memory_bytes"] == 64 << 20
    (problem,) = problems("kv_cache_memory_mb=64", "kv_cache_memory_bytes=1")
    assert "option.kv_cache_memory_bytes = '1'" in problem
    assert "option.kv_cache_memory_mb = 64" in problem
    with pytest.raises(ConfigurationError, match=r"max_num_seqs = '8'.*max_rolling_batch_size = '9'"):
        configure("max_num_seqs=8", "max_rolling_batch_size=9")
    assert arguments("max_num_seqs=8", "max_rolling_batch_size=8.0")["max_num_seqs"] == 8


def test_a_misspelt_name_is_told_the_nearest_of_ours_and_of_vllms() -> None:
    (warning,) = configure("mm_encoder_tp_moed=data").warnings
    assert str(warning).endswith("no such option; did you mean mm_encoder_tp_mode?")
    assert not configure("mm_encoder_tp_mode=data").warnings
    assert configure("mm_encoder_tp_mode=data", "strict_options=true").extra
    (told,) = configure("mm_encoder_tp_mode=data").unhonoured("rolling")
    assert "option.mm_encoder_tp_mode (--option mm_encoder_tp_mode) has no effect with the rolling" in str(told)


@pytest.mark.parametrize(
    ("options", "count", "sizes"),
    [
        ((), 0, (1, 1, 1)),
        ((), 4, (4, 1, 1)),
        (("tensor_parallel_degree=2",), 4, (2, 1, 2)),
        (("tensor_parallel_degree=2", "max_workers=1"), 4, (2, 1, 1)),
        (("pipeline_parallel_degree=2",), 4, (2, 2, 1)),
        (("data_parallel_degree=2",), 4, (2, 1, 2)),
        (("tensor_parallel_degree=1", "load_on_devices=0;2"), 4, (1, 1, 2)),
        (("nnodes=2",), 4, (8, 1, 1)),
        (("nnodes=2", "pipeline_parallel_degree=2"), 4, (4, 2, 1)),
        (("tensor_parallel_degree=2",), 0, (2, 1, 1)),
    ],
)  # fmt: skip
def test_what_is_not_written_fills_the_machine(
    options: tuple[str, ...], count: int, sizes: tuple[int, int, int]
) -> None:
    found = arguments(*options, machine=devices(count))
    assert tuple(found[f"{kind}_parallel_size"] for kind in ("tensor", "pipeline", "data")) == sizes


def test_a_degree_that_the_heads_do_not_allow_is_told_before_anything_is_loaded() -> None:
    (problem,) = problems("tensor_parallel_degree=3", machine=devices(3))
    assert "16 key/value heads and its vision tower's 16 heads cannot be shared evenly by 3 devices" in problem
    assert arguments(machine=devices(6))["tensor_parallel_size"] == 4


def test_too_few_devices_are_told_with_how_many_are_needed() -> None:
    (problem,) = problems("tensor_parallel_degree=4", "data_parallel_degree=2", machine=devices(4))
    assert "needs 8 devices, but 4 are there" in problem


@pytest.mark.parametrize(
    ("options", "devices_there", "sizes"),
    [
        ((), 16, (16, 1, 1)),
        (("pipeline_parallel_degree=2",), 16, (8, 2, 1)),
        (("data_parallel_degree=4",), 16, (4, 1, 4)),
        (("tensor_parallel_degree=8", "pipeline_parallel_degree=2"), 16, (8, 2, 1)),
        (("tensor_parallel_degree=8", "pipeline_parallel_degree=2"), 8, (8, 2, 1)),
    ],
)
def test_what_is_not_written_fills_the_ray_cluster(
    monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], devices_there: int, sizes: tuple[int, int, int]
) -> None:
    """That a real cluster is counted, test_ray.py shows. With too few devices vLLM waits for more."""
    monkeypatch.setattr(device_plan, "running_cluster", lambda: Cluster(devices_there, 2))
    found = arguments("distributed_executor_backend=ray", *options, machine=devices(8))
    assert tuple(found[f"{kind}_parallel_size"] for kind in ("tensor", "pipeline", "data")) == sizes


def test_where_no_ray_cluster_runs_there_is_this_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_plan, "running_cluster", lambda: None)
    (problem,) = problems("distributed_executor_backend=ray", "tensor_parallel_degree=16", machine=devices(8))
    assert "needs 16 devices, but 8 are there: no Ray cluster runs" in problem
    assert "`ray start --head`" in problem
    assert arguments("data_parallel_backend=ray", machine=devices(8))["tensor_parallel_size"] == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("tensor_parallel_degree=16",),
            "needs 16 devices, but 8 are there, were the 2 machines all like this one",
        ),
        (("tensor_parallel_degree=1",), "option.nnodes = 2, but 1 processes"),
    ],
)
def test_machines_without_ray_take_equal_parts(options: tuple[str, ...], message: str) -> None:
    (problem,) = problems("nnodes=2", *options, machine=devices(4))
    assert message in problem


def test_vllm_is_told_of_the_machines() -> None:
    made = load().AsyncEngineArgs(
        **arguments("tensor_parallel_degree=2", "nnodes=2", "node_rank=1", "master_addr=10.0.0.7", "master_port=4711")
    )
    found = made.create_engine_config(headless=True).parallel_config
    assert (found.nnodes, found.node_rank, found.world_size, found.local_world_size) == (2, 1, 2, 1)
    assert (found.master_addr, found.master_port) == ("10.0.0.7", 4711)


def test_on_a_cpu_the_cache_leaves_memory_to_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    assert arguments()["kv_cache_memory_bytes"] == 4 << 30
    assert arguments(machine=Machine((), Device("host", 4 << 30)))["kv_cache_memory_bytes"] == 1 << 30
    assert "kv_cache_memory_bytes" not in arguments("gpu_memory_utilization=0.5")


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_our_words_for_vllms_choice_of_a_type_are_true(stored: str) -> None:
    from vllm.config.model import _resolve_auto_dtype

    theirs = _resolve_auto_dtype("llama", getattr(torch, stored), is_pooling_model=False)
    ours, _ = served_dtype("auto", stored, bfloat16=True)
    assert str(theirs) == f"torch.{ours}"
