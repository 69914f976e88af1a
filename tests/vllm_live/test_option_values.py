"""Values of our own options that vLLM would refuse, or die of, are told by `lmi check` as options."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from container.check import describe, run_check
from engine.machine import Device, Machine
from handlers.backends.vllm.arguments import engine_arguments, refused_options
from handlers.backends.vllm.compat import engine_argument_names, load
from properties.configuration import resolve
from properties.lmi import IGNORED
from properties.problem import ConfigurationError
from tests.support.shapes import SHAPES

CPU = Machine((), Device("host memory", 16 << 30))


def refusals(*options: str, machine: Machine = CPU, model: Path = SHAPES) -> list[str]:
    """As a start has them."""
    configuration = resolve(model=str(model), environ={}, options=options, backend_options=engine_argument_names())
    try:
        engine_arguments(load(), configuration, model, machine)
    except ConfigurationError as error:
        return [str(problem) for problem in error.problems]
    return []


def found_together(*options: str, model: Path = SHAPES) -> list[str]:
    """As `lmi check` has them."""
    configuration = resolve(model=str(model), environ={}, options=options, backend_options=engine_argument_names())
    return [str(problem) for problem in refused_options(configuration, model, CPU)]


@pytest.mark.parametrize(
    ("option", "told", "allowed"),
    [
        ("quantize=foo", "option.quantize = 'foo' (--option quantize)", "fp8"),
        ("quantization=foo", "option.quantize = 'foo' (--option quantization)", "compressed-tensors"),
        ("kv_cache_dtype=fp9", "option.kv_cache_dtype = 'fp9' (--option kv_cache_dtype)", "fp8_e4m3"),
        ("load_format=zzz", "option.load_format = 'zzz' (--option load_format)", "runai_streamer"),
        ("tokenizer_mode=slowx", "option.tokenizer_mode = 'slowx' (--option tokenizer_mode)", "mistral"),
        ("max_lora_rank=48", "option.max_lora_rank = '48' (--option max_lora_rank)", "16, 32, 64"),
        ("block_size=17", "option.block_size = '17' (--option block_size)", "a multiple of"),
        ("lora_dtype=fp32", "option.lora_dtype = 'fp32' (--option lora_dtype)", "bfloat16"),
        ('kv_transfer_config={"x": 1}', "option.kv_transfer_config = '{\"x\": 1}'", "a JSON object"),
    ],
)
def test_a_value_of_ours_that_vllm_refuses(option: str, told: str, allowed: str) -> None:
    (problem,) = refusals(option)
    assert problem.startswith(told)
    assert allowed in problem.partition("allowed: ")[2]


@pytest.mark.parametrize(
    "option",
    [
        "quantize=fp8", "quantize=int8_per_channel_weight_only", "kv_cache_dtype=fp8", "load_format=Safetensors",
        "tokenizer_mode=hf", "max_lora_rank=64", "block_size=64", "lora_dtype=bf16", "seed=7", "max_model_len=64",
        "tensor_parallel_degree=max", "kv_cache_memory_mb=64", "data_parallel_degree=1", "enforce_eager=true",
        "max_rolling_batch_prefill_tokens=4096", "cpu_offload_gb_per_gpu=1.5", 'speculative_config={"method": "ngram"}',
        "max_cpu_loras=8", 'mm_processor_kwargs={"a": 1}', "pipeline_parallel_degree=1", "gpu_memory_utilization=0.5",
    ],
)  # fmt: skip
def test_a_value_that_vllm_takes(option: str) -> None:
    assert refusals(option) == []


def test_sizes_of_blocks_are_those_of_the_device() -> None:
    gpu = Machine((Device("A10G", 24 << 30),), CPU.host)
    assert refusals("block_size=16", machine=gpu) == []
    (problem,) = refusals("block_size=17", machine=gpu)
    assert problem.endswith("allowed: a multiple of 16")


@pytest.mark.parametrize("value", ["bitsandbytes", "bitsandbytes8", "bitsandbytes-nf4"])
def test_bitsandbytes_is_refused_with_what_there_is_instead(value: str) -> None:
    (problem,) = refusals(f"quantize={value}")
    assert "vLLM has no bitsandbytes any more; int8_per_channel_weight_only or fp8" in problem


@pytest.mark.parametrize("switch", ["load_in_8bit", "load_in_4bit"])
def test_the_switches_that_meant_bitsandbytes_are_refused_too(switch: str) -> None:
    (problem,) = refusals(f"{switch}=true")
    assert f"option.quantize = 'bitsandbytes' (--option {switch})" in problem
    assert refusals(f"{switch}=false") == []


def test_what_only_the_model_shows_to_be_wrong_is_told_by_check() -> None:
    (problem,) = found_together("max_model_len=100000")
    assert "cannot serve the model as configured: User-specified max_model_len (100000)" in problem
    assert found_together("max_model_len=64") == []
    assert found_together('speculative_config={"model": "org/draft", "num_speculative_tokens": 2}') == []


def test_a_checkpoint_that_is_quantised_in_another_way(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(SHAPES, model)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    (model / "config.json").write_text(json.dumps(config))
    (problem,) = found_together("quantize=experts_int8", model=model)
    assert "model config (fp8) does not match" in problem


def test_vllms_own_choice_of_devices_is_ours() -> None:
    (problem,) = refusals("device_ids=1")
    assert problem.endswith("not to be set here: write load_on_devices, e.g. load_on_devices=0;2")


def test_values_are_judged_before_the_model_is_there() -> None:
    configuration = resolve(
        model="org/model",
        environ={},
        options=["rolling_batch=vllm", "quantize=foo", "stream_interval=x"],
        backend_options=engine_argument_names(),
    )
    first, second = describe(configuration, CPU)["errors"]
    assert first.startswith("option.stream_interval = 'x'")
    assert second.startswith("option.quantize = 'foo'")


def test_check_ends_with_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check(str(SHAPES), ["rolling_batch=vllm", "quantize=foo"], False, {}) == 1
    assert "error: option.quantize = 'foo' (--option quantize): allowed: " in capsys.readouterr().out


def test_no_argument_of_vllms_is_said_to_have_no_effect_but_the_one_that_reads_files() -> None:
    ignored = {name.removeprefix("option.") for name in IGNORED}
    assert ignored & engine_argument_names() == {"allowed_local_media_path"}
