"""What vLLM itself says of the values of our options, before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from handlers.backends.vllm.compat import cpu_takes_block_size, registered_names
from handlers.backends.vllm.failures import refusal_reason
from handlers.backends.vllm.options.values import BadValue, coerce
from properties.names import key_of
from properties.problem import Problem

if TYPE_CHECKING:
    import argparse

    from handlers.backends.vllm.compat import Vllm
    from properties.configuration import Configuration

KERNEL_TOKENS = 16
"""On accelerators every attention kernel of vLLM's takes blocks of a multiple of so many tokens."""

NAMED = frozenset({"quantization", "load_format", "tokenizer_mode"})
"""Fields for which vLLM's command line takes any text, so that a wrong one ends the engine's process later."""

OURS = frozenset({"kv_cache_memory_bytes", "tensor_parallel_size"})
"""Fields whose options have values of their own, MiB and `max`, and are checked by their own types."""

GONE = {
    "bitsandbytes": "vLLM has no bitsandbytes any more; int8_per_channel_weight_only or fp8 quantise while loading",
    "smoothquant": "that is TensorRT-LLM's; int8_per_channel_weight_only or fp8 quantise while loading",
    "marlin": "vLLM chooses its kernels itself: leave the option out for a model that is quantised already",
    "gguf": "vLLM reads GGUF no more: serve the model's safetensors",
    "squeezellm": "vLLM has it no more",
    "aqlm": "vLLM has it no more",
    "deepspeedfp": "vLLM has it no more",
    "eetq": "that is Text Generation Inference's; fp8 or int8_per_channel_weight_only quantise while loading",
    "exl2": "that is Text Generation Inference's",
}
"""Quantisations that LMI, TGI or older versions of vLLM name -> why this one has none."""


def refused_values(
    configuration: Configuration,
    given: Mapping[str, str],
    actions: Mapping[str, argparse.Action],
    annotations: Mapping[str, str],
    *,
    cpu: bool,
) -> list[Problem]:
    """A problem for each of our options whose value vLLM's command line would refuse.

    given: vLLM's field -> our option, of those that somebody wrote. actions, annotations: field -> what vLLM's parser
    does with its text, and its type as written.
    """
    problems = []
    for field, name in given.items():
        value = getattr(configuration.settings, name)
        if field in OURS or value is None:
            continue
        try:
            coerce(actions.get(field), _text(value), annotations[field])
            _registered(field, value)
            if field == "block_size":
                _block_size(value, cpu)
        except BadValue as bad:
            source = configuration.sources[name]
            shown = source.raw if source.raw is not None else value
            reason = f"{bad.reason}; " if bad.reason else ""
            problems.append(
                Problem(
                    f"{key_of(name)} = {shown!r} ({source.location}): {reason}allowed: {bad.allowed}",
                    name,
                    source,
                )
            )
    return problems


def refused_whole(vllm: Vllm, arguments: dict[str, Any], names: Callable[[str], str | None]) -> list[Problem]:
    """What vLLM finds wrong when it puts all arguments together with the model's config.json.

    The same that a start does first, in milliseconds; nothing is loaded. names: field -> our option, where we have one.
    """
    if arguments["trust_remote_code"]:
        return []  # It would run the model's own code.
    asked = dict(arguments)
    speculative = asked.get("speculative_config")
    if isinstance(speculative, Mapping) and "model" in speculative:
        del asked["speculative_config"]  # It would fetch that model's configuration.
    try:
        vllm.AsyncEngineArgs(**asked).create_engine_config(vllm.server_context)
    except Exception as error:
        field = _field(error)
        name = None if field is None else names(field)
        told = f"vLLM {vllm.version} cannot serve the model as configured: "
        if name is not None:
            told += f"{key_of(name)} = {arguments[str(field)]!r}: "
        return [Problem(told + refusal_reason(error), name)]
    return []


def _text(value: Any) -> str:
    """As one would write it on a command line."""
    return json.dumps(value) if isinstance(value, dict | list | bool) else str(value)


def _registered(field: str, value: Any) -> None:
    if field not in NAMED:
        return
    names = registered_names()[field]
    if value in names or (field != "quantization" and value.lower() in names):
        return
    word = "bitsandbytes" if value.lower().startswith("bitsandbytes") else value.lower()
    reason = GONE.get(word, "") if field == "quantization" else ""
    raise BadValue(_listed(names), reason)


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names))


def _block_size(tokens: int, cpu: bool) -> None:
    if cpu:
        multiple = next(step for step in range(1, 1025) if cpu_takes_block_size(step))
        if not cpu_takes_block_size(tokens):
            raise BadValue(f"a multiple of {multiple} on a CPU")
    elif tokens % KERNEL_TOKENS:
        raise BadValue(f"a multiple of {KERNEL_TOKENS}")


def _field(error: Exception) -> str | None:
    """Which field of vLLM's a pydantic error is about, where it says so."""
    listed = getattr(error, "errors", None)
    if not callable(listed):
        return None
    try:
        where = listed(include_url=False, include_input=False)[0]["loc"]
    except (TypeError, KeyError, IndexError):
        return None
    return str(where[0]) if where else None
