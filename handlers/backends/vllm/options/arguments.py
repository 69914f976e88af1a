"""From the user's configuration to vLLM's `AsyncEngineArgs`: our options, LMI's names, and any field of vLLM's own."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from handlers.backends.mistral_format import format_problems
from handlers.backends.vllm.compat import Vllm, load
from handlers.backends.vllm.options.checkpoint import (
    format_warnings,
    replaced_formats,
    served_dtype,
    stored_dtype,
    weight_problems,
)
from handlers.backends.vllm.options.fields import SECRET
from handlers.backends.vllm.options.plan import model_heads, plan_devices
from handlers.backends.vllm.options.values import BadValue, coerce, refused_values, refused_whole
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
    name: name
    for name in (
        "dtype", "gpu_memory_utilization", "trust_remote_code", "enable_mm_embeds", "max_loras", "max_lora_rank",
    )
} | {"max_rolling_batch_size": "max_num_seqs"}  # fmt: skip
"""Our options whose value, default or not, vLLM is given -> its field."""

WHERE_GIVEN = {
    name: name
    for name in (
        "max_model_len", "block_size", "kv_cache_dtype", "enable_prefix_caching", "enable_chunked_prefill",
        "enforce_eager", "speculative_config", "kv_transfer_config", "load_format", "tokenizer_mode", "seed",
        "mm_processor_kwargs", "enable_lora", "max_cpu_loras", "lora_dtype", "fully_sharded_loras",
    )
} | {
    "max_rolling_batch_prefill_tokens": "max_num_batched_tokens",
    "cpu_offload_gb_per_gpu": "cpu_offload_gb",
    "quantize": "quantization",
    "kv_cache_memory_mb": "kv_cache_memory_bytes",
    "tensor_parallel_degree": "tensor_parallel_size",
    "pipeline_parallel_degree": "pipeline_parallel_size",
    "data_parallel_degree": "data_parallel_size",
}  # fmt: skip
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
"""On a CPU, whose memory is shared with everything else, the KV cache takes a quarter of it and never more than this
many bytes; vLLM would take nearly all."""


def engine_arguments(
    vllm: Vllm, configuration: Configuration, model_path: Path, machine: Machine
) -> dict[str, Any]:
    """Keyword arguments for `AsyncEngineArgs`. Raises ConfigurationError with all problems."""
    settings = configuration.settings
    cpu = not machine.accelerators
    annotations = {field.name: str(field.type) for field in fields(vllm.AsyncEngineArgs)}
    parser = vllm.AsyncEngineArgs.add_cli_args(vllm.FlexibleArgumentParser())
    actions = {action.dest: action for action in parser._actions}
    given = {
        field: name
        for name, field in (WHERE_GIVEN | ALWAYS).items()
        if configuration.sources[name].level < Level.RECOMMENDED
    }
    arguments: dict[str, Any] = {field: getattr(settings, name) for name, field in ALWAYS.items()}
    arguments |= {field: getattr(settings, name) for field, name in given.items()}
    problems: list[Problem] = []
    extra = _extra(configuration, actions, annotations, problems)
    problems += refused_values(configuration, given, actions, annotations, cpu=cpu)
    if settings.kv_cache_memory_mb is not None:
        arguments["kv_cache_memory_bytes"] = settings.kv_cache_memory_mb << 20
    if settings.request_priorities:
        arguments["scheduling_policy"] = "priority"
    images = settings.limit_mm_per_prompt.get("image", 1)
    arguments["limit_mm_per_prompt"] = {"image": images, "video": 0, "audio": 0}
    for field, value in extra.items():
        if field in given and arguments[field] != value:
            problems.append(_contradiction(configuration, field, given[field]))
    arguments |= extra

    texts = {name: item.value for name, item in configuration.extra.items()}
    config = read_model_config(model_path) or {}
    heads = model_heads(model_path, config, trust_remote_code=settings.trust_remote_code)
    plan = plan_devices(settings, texts, len(machine.accelerators), heads)
    arguments |= plan.sizes() | replaced_formats(configuration, model_path)
    problems += plan.problems + format_problems(model_path) + weight_problems(model_path)
    for warning in plan.warnings + format_warnings(configuration, model_path):
        logger.info("%s", warning)  # info: `lmi check` prints it itself
    dtype, reason = served_dtype(
        settings.dtype, stored_dtype(model_path, config), bfloat16=cpu or machine.computes_bfloat16()
    )
    logger.info("vLLM computes in %s: %s", dtype, reason)
    said = {"kv_cache_memory_bytes", "gpu_memory_utilization", "num_gpu_blocks_override"}
    if cpu and not said & (given.keys() | extra.keys()) and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        cache = min(CPU_CACHE_MOST, machine.host.memory // 4)
        arguments["kv_cache_memory_bytes"] = cache // (plan.tensor * plan.data)
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
    options = {field: name for name, field in (ALWAYS | WHERE_GIVEN).items()}
    return refused_whole(vllm, arguments, options.get)


def _extra(
    configuration: Configuration,
    actions: Mapping[str, argparse.Action],
    annotations: Mapping[str, str],
    problems: list[Problem],
) -> dict[str, Any]:
    """Fields of vLLM's own that the user wrote, as values."""
    values: dict[str, Any] = {}
    for name, written in configuration.extra.items():
        if name not in annotations:
            continue
        shown = MASK if name in SECRET else repr(written.value[:200])
        option = f"option.{name} = {shown} ({written.source.location})"
        try:
            if name in REFUSED:
                problems.append(Problem(f"{option}: not to be set here: {REFUSED[name]}"))
            else:
                values[name] = coerce(actions.get(name), written.value, annotations[name])
        except BadValue as bad:
            problems.append(Problem(f"{option}: {bad}"))
    return values


def _contradiction(configuration: Configuration, field: str, name: str) -> Problem:
    written = configuration.extra[field]
    return Problem(
        f"option.{field} = {written.value!r} ({written.source.location}) and {key_of(name)} = "
        f"{getattr(configuration.settings, name)!r} ({configuration.sources[name].location}) differ, but mean the "
        "same: keep one",
        name,
    )
