"""From the user's configuration to vLLM's `AsyncEngineArgs`: our options, LMI's names, and any field of vLLM's own."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from engine.machine import computes_bfloat16
from handlers.backends.mistral_format import format_problems
from handlers.backends.vllm.compat import Vllm, load
from handlers.backends.vllm.options.checks import refused_values, refused_whole
from handlers.backends.vllm.options.fields import SECRET
from handlers.backends.vllm.options.heads import model_heads
from handlers.backends.vllm.options.mistral import (
    format_warnings,
    replaced_formats,
    weight_problems,
)
from handlers.backends.vllm.options.plan import plan_devices
from handlers.backends.vllm.options.precision import served_dtype, stored_dtype
from handlers.backends.vllm.options.values import BadValue, coerce
from handlers.backends.vllm.options.weights import vllm_load_format
from handlers.errors import InvalidConfiguration
from properties.configuration import Configuration, read_model_config
from properties.field import Level
from properties.names import key_of
from properties.problem import MASK, ConfigurationError, Problem

if TYPE_CHECKING:
    import argparse

    from engine.machine import Machine

logger = logging.getLogger(__name__)

ALWAYS = {
    "dtype": "dtype",
    "max_rolling_batch_size": "max_num_seqs",
    "gpu_memory_utilization": "gpu_memory_utilization",
    "trust_remote_code": "trust_remote_code",
    "enable_mm_embeds": "enable_mm_embeds",
    "max_loras": "max_loras",
    "max_lora_rank": "max_lora_rank",
}
"""Our options whose value, default or not, vLLM is given -> its field."""

WHERE_GIVEN = {
    "max_rolling_batch_prefill_tokens": "max_num_batched_tokens",
    "max_model_len": "max_model_len",
    "block_size": "block_size",
    "kv_cache_dtype": "kv_cache_dtype",
    "enable_prefix_caching": "enable_prefix_caching",
    "enable_chunked_prefill": "enable_chunked_prefill",
    "enforce_eager": "enforce_eager",
    "cpu_offload_gb_per_gpu": "cpu_offload_gb",
    "speculative_config": "speculative_config",
    "kv_transfer_config": "kv_transfer_config",
    "quantize": "quantization",
    "load_format": "load_format",
    "tokenizer_mode": "tokenizer_mode",
    "seed": "seed",
    "mm_processor_kwargs": "mm_processor_kwargs",
    "enable_lora": "enable_lora",
    "max_cpu_loras": "max_cpu_loras",
    "lora_dtype": "lora_dtype",
    "fully_sharded_loras": "fully_sharded_loras",
    "kv_cache_memory_mb": "kv_cache_memory_bytes",
    "tensor_parallel_degree": "tensor_parallel_size",
    "pipeline_parallel_degree": "pipeline_parallel_size",
    "data_parallel_degree": "data_parallel_size",
}
"""Our options that vLLM is given only when somebody wrote them; it knows better defaults otherwise."""

REFUSED = {
    "model": "write option.model_id",
    "model_weights": "write option.model_id",
    "tokenizer": "the tokenizer is the model's own",
    "skip_tokenizer_init": "prompts are tokenised here",
    "device_ids": "write load_on_devices, e.g. load_on_devices=0;2",
}
"""Fields of vLLM's that this server sets or needs."""

CPU_CACHE_MOST = 4 << 30
"""On a CPU, whose memory is shared with everything else, the key/value cache takes a quarter of it and never more
than this many bytes; vLLM would take nearly all."""


def engine_arguments(
    vllm: Vllm, configuration: Configuration, model_path: Path, machine: Machine
) -> dict[str, Any]:
    """Keyword arguments for `AsyncEngineArgs`. Raises ConfigurationError with all problems."""
    settings = configuration.settings
    problems: list[Problem] = []
    known = {field.name: str(field.type) for field in fields(vllm.AsyncEngineArgs)}
    parser = vllm.AsyncEngineArgs.add_cli_args(vllm.ArgumentParser())
    actions = {action.dest: action for action in parser._actions}
    extra = _extra(configuration, actions, known, problems)
    given = {
        field: name
        for name, field in WHERE_GIVEN.items()
        if configuration.sources[name].level < Level.RECOMMENDED
    }
    arguments: dict[str, Any] = {field: getattr(settings, name) for name, field in ALWAYS.items()}
    arguments |= {field: getattr(settings, name) for field, name in given.items()}
    given |= {
        field: name for name, field in ALWAYS.items() if configuration.sources[name].level < Level.RECOMMENDED
    }
    problems += refused_values(configuration, given, actions, known, cpu=not machine.accelerators)
    if settings.kv_cache_memory_mb is not None:
        arguments["kv_cache_memory_bytes"] = settings.kv_cache_memory_mb << 20
    if settings.request_priorities:
        arguments["scheduling_policy"] = "priority"
    arguments["limit_mm_per_prompt"] = {
        "image": settings.limit_mm_per_prompt.get("image", 1)
    } | dict.fromkeys(("video", "audio"), 0)
    for name, value in extra.items():
        if name in given and arguments[name] != value:
            written = configuration.extra[name]
            problems.append(
                Problem(
                    f"option.{name} = {written.value!r} ({written.source.location}) and "
                    f"{key_of(given[name])} = {getattr(settings, given[name])!r} "
                    f"({configuration.sources[given[name]].location}) differ, but mean the same: keep one",
                    given[name],
                )
            )
        arguments[name] = value
    texts = {name: item.value for name, item in configuration.extra.items()}
    config = read_model_config(model_path) or {}
    heads = model_heads(model_path, config, trust_remote_code=settings.trust_remote_code)
    plan = plan_devices(settings, texts, len(machine.accelerators), heads)
    problems += plan.problems
    for warning in plan.warnings:
        logger.info("%s", warning)  # info: `lmi check` prints it itself
    arguments |= plan.sizes()
    told = served_dtype(
        settings.dtype,
        stored_dtype(model_path, config),
        bfloat16=not machine.accelerators or computes_bfloat16("cuda"),
    )
    logger.info("vLLM computes in %s: %s", *told)
    problems += format_problems(model_path) + weight_problems(model_path)
    for warning in format_warnings(configuration, model_path):
        logger.info("%s", warning)
    arguments |= vllm_load_format(model_path, settings.load_format)
    arguments |= replaced_formats(configuration, model_path)
    if not machine.accelerators:
        _cpu_cache(arguments, given, extra, machine.host.memory)
    if problems:
        raise ConfigurationError(problems)
    location = configuration.model_location
    name = location.value if location.kind == "hub" else location.name
    arguments["served_model_name"] = settings.served_model_name or [name]
    return {"model": str(model_path.absolute()), **arguments}


def refused_options(configuration: Configuration, model_path: Path | None, machine: Machine) -> list[Problem]:
    """What is wrong with the options, as far as vLLM can say without loading the model. Slow: imports vLLM.

    model_path: None while the model is not on this machine.
    """
    try:
        vllm = load()
        if model_path is None:
            with TemporaryDirectory(prefix="lmi-") as nothing:
                engine_arguments(vllm, configuration, Path(nothing), machine)
            return []
        arguments = engine_arguments(vllm, configuration, model_path, machine)
    except ConfigurationError as error:
        return error.problems
    except InvalidConfiguration as error:
        return [Problem(error.message, "rolling_batch")]
    options = {field: name for name, field in {**ALWAYS, **WHERE_GIVEN}.items()}
    return refused_whole(vllm, arguments, options.get)


def _extra(
    configuration: Configuration,
    actions: Mapping[str, argparse.Action],
    known: Mapping[str, str],
    problems: list[Problem],
) -> dict[str, Any]:
    """Fields of vLLM's own that the user wrote, as values."""
    written = {name: sourced for name, sourced in configuration.extra.items() if name in known}
    values: dict[str, Any] = {}
    for name, sourced in written.items():
        told = f"option.{name} = {_shown(name, sourced.value)} ({sourced.source.location})"
        if name in REFUSED:
            problems.append(Problem(f"{told}: not to be set here: {REFUSED[name]}"))
            continue
        try:
            values[name] = coerce(actions.get(name), sourced.value, known[name])
        except BadValue as bad:
            reason = f"{bad.reason}; " if bad.reason else ""
            problems.append(Problem(f"{told}: {reason}allowed: {bad.allowed}"))
    return values


def _shown(name: str, value: str) -> str:
    return MASK if name in SECRET else repr(value[:200])


def _cpu_cache(
    arguments: dict[str, Any], given: Mapping[str, str], extra: Mapping[str, Any], memory: int
) -> None:
    said = {"kv_cache_memory_bytes", "gpu_memory_utilization", "num_gpu_blocks_override"}
    if said & (given.keys() | extra.keys()) or "VLLM_CPU_KVCACHE_SPACE" in os.environ:
        return
    ranks = arguments["tensor_parallel_size"] * arguments["data_parallel_size"]
    arguments["kv_cache_memory_bytes"] = min(CPU_CACHE_MOST, memory // 4) // ranks
