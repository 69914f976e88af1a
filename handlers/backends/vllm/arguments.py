"""From the configuration to vLLM's `AsyncEngineArgs`: our options, LMI's names, and any field of vLLM's own."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields as fields_of
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from handlers.backends.vllm.checkpoint import replaced_formats, served_dtype, stored_dtype
from handlers.backends.vllm.compat import SECRET, Vllm, cpu_takes_block_size, load, registered_names
from handlers.backends.vllm.devices import model_heads, plan_devices
from handlers.backends.vllm.outputs import refusal_reason, wrong_fields
from handlers.errors import InvalidConfiguration
from properties.configuration import Configuration, read_model_config
from properties.field import Level
from properties.names import key_of
from properties.problem import MASK, ConfigurationError, Problem, assigned

if TYPE_CHECKING:
    from engine.machine import Machine

logger = logging.getLogger(__name__)

ALWAYS = {
    name: name
    for name in (
        "dtype", "gpu_memory_utilization", "trust_remote_code", "enable_mm_embeds", "max_loras", "max_lora_rank",
    )
} | {"max_rolling_batch_size": "max_num_seqs"}  # fmt: skip
"""Our options that are always passed on, also as defaults -> vLLM's fields."""

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
"""Our options that are passed on only if somebody set them, since vLLM's own defaults are better -> vLLM's fields."""

REFUSED = {
    "model": "write option.model_id",
    "model_weights": "write option.model_id",
    "tokenizer": "the tokenizer is the model's own",
    "skip_tokenizer_init": "prompts are tokenised here",
    "device_ids": "write load_on_devices, e.g. load_on_devices=0;2",
}
"""Fields of vLLM's that this server sets or needs."""

GONE = {
    "bitsandbytes": "vLLM has no bitsandbytes any more; int8_per_channel_weight_only or fp8 quantise while loading",
    "smoothquant": "that is TensorRT-LLM's; int8_per_channel_weight_only or fp8 quantise while loading",
    "marlin": "vLLM chooses its kernels itself: leave the option out for a model that is quantised already",
    "gguf": "vLLM no longer reads GGUF: serve the model's safetensors",
    "eetq": "that is Text Generation Inference's; fp8 or int8_per_channel_weight_only quantise while loading",
    "exl2": "that is Text Generation Inference's",
} | dict.fromkeys(("squeezellm", "aqlm", "deepspeedfp"), "vLLM no longer has it")
"""Quantisations of LMI's, TGI's or older versions of vLLM -> why this one does not have them."""

CPU_CACHE_MOST = 4 << 30
"""The most bytes of the KV cache on a CPU, where vLLM would take nearly all memory and we take a quarter."""

_BOOLEAN = TypeAdapter(bool)
_KERNEL_TOKENS = 16
"""On accelerators, every attention kernel of vLLM's accepts blocks of a multiple of so many tokens."""

_CONVERTED = frozenset({"kv_cache_memory_bytes", "tensor_parallel_size"})
"""Fields whose options have values of their own (MiB, `max`), which have been checked."""

_LONGEST = 200


def engine_arguments(vllm: Vllm, configuration: Configuration, model_path: Path, machine: Machine) -> dict[str, Any]:
    """Return keyword arguments for `AsyncEngineArgs`. Raises ConfigurationError with all problems."""
    settings, cpu = configuration.settings, not machine.accelerators
    fields = _Fields(vllm, cpu=cpu)
    given = {
        field: name
        for name, field in (WHERE_GIVEN | ALWAYS).items()
        if configuration.sources[name].level < Level.RECOMMENDED
    }
    problems: list[Problem] = []
    extra = _extra(configuration, fields, problems)
    problems += _refused_values(configuration, given, fields)
    arguments: dict[str, Any] = {field: getattr(settings, name) for name, field in ALWAYS.items()}
    arguments |= {field: getattr(settings, name) for field, name in given.items()}
    if settings.kv_cache_memory_mb is not None:
        arguments["kv_cache_memory_bytes"] = settings.kv_cache_memory_mb << 20
    if settings.request_priorities:
        arguments["scheduling_policy"] = "priority"
    images = settings.limit_mm_per_prompt.get("image", 1)
    arguments["limit_mm_per_prompt"] = {"image": images, "video": 0, "audio": 0}
    problems += _differing(configuration, given, arguments, extra)
    arguments |= extra

    config = read_model_config(model_path) or {}
    heads = model_heads(model_path, config, trust_remote_code=settings.trust_remote_code)
    plan = plan_devices(settings, configuration.extra_texts, len(machine.accelerators), heads)
    arguments |= plan.sizes() | replaced_formats(configuration, model_path)
    for warning in plan.warnings:
        logger.info("%s", warning)  # info, because `lmi check` prints it itself
    stored = stored_dtype(model_path, config)
    dtype, reason = served_dtype(settings.dtype, stored, bfloat16=cpu or machine.computes_bfloat16())
    logger.info("vLLM computes in %s: %s", dtype, reason)
    if problems := problems + plan.problems:
        raise ConfigurationError(problems)
    sizes = {"kv_cache_memory_bytes", "gpu_memory_utilization", "num_gpu_blocks_override"}
    if cpu and not sizes & (given.keys() | extra.keys()) and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        cache = min(CPU_CACHE_MOST, machine.host.memory // 4)
        arguments["kv_cache_memory_bytes"] = cache // (plan.tensor * plan.data)
    location = configuration.model_location
    name = location.value if location.kind == "hub" else location.name
    arguments["served_model_name"] = settings.served_model_name or [name]
    return {"model": str(model_path.absolute()), **arguments}


def _differing(
    configuration: Configuration, given: Mapping[str, str], ours: Mapping[str, Any], extra: Mapping[str, Any]
) -> Iterator[Problem]:
    """Yield a problem for each of vLLM's fields that has another value than our option. given: field -> option."""
    for field in sorted(extra.keys() & given.keys()):
        if ours[field] != extra[field]:
            written, name = configuration.extra[field], given[field]
            theirs = assigned(f"option.{field}", repr(written.value), written.location)
            yield Problem(f"{theirs} and {configuration.assigned(name)} differ, but mean the same: keep one", name)


def refused_options(configuration: Configuration, model_path: Path | None, machine: Machine) -> list[Problem]:
    """See `Backend`: what is wrong with the options, as far as vLLM can say without loading the model."""
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
    if arguments["trust_remote_code"]:
        return []  # the next step would run the model's own code
    given = dict(arguments)
    if "model" in (given.get("speculative_config") or ()):
        del given["speculative_config"]  # the next step would download that model's configuration
    try:
        vllm.AsyncEngineArgs(**given).create_engine_config(vllm.server_context)
    except Exception as error:
        where = next((item["loc"] for item in wrong_fields(error)), ())
        field = str(where[0]) if where else ""
        option = {field: name for name, field in (ALWAYS | WHERE_GIVEN).items()}.get(field)
        shown = f"{key_of(option)} = {arguments[field]!r}: " if option is not None else ""
        text = f"vLLM {vllm.version} cannot serve the model as configured: {shown}{refusal_reason(error)}"
        return [Problem(text, option)]
    return []


class BadValue(Exception):
    """A value that vLLM would refuse; its text says what is wrong, if vLLM does, and what is allowed."""

    def __init__(self, allowed: str, reason: str = "") -> None:
        super().__init__(f"{f'{reason}; ' if reason else ''}allowed: {allowed}")


class _Fields:
    """The fields of `AsyncEngineArgs`, which read text as vLLM's command line does."""

    def __init__(self, vllm: Vllm, *, cpu: bool) -> None:
        parser = vllm.AsyncEngineArgs.add_cli_args(vllm.FlexibleArgumentParser())
        self._actions = {action.dest: action for action in parser._actions}
        self._types = {field.name: str(field.type) for field in fields_of(vllm.AsyncEngineArgs)}
        self._cpu = cpu

    def __contains__(self, name: str) -> bool:
        return name in self._types

    def read(self, name: str, text: str) -> Any:
        """Return the value that a text means. Raises BadValue."""
        action = self._actions.get(name)
        if action is None:  # not on the command line
            try:
                return json.loads(text)
            except ValueError:
                return text
        if isinstance(action, argparse.BooleanOptionalAction) or action.nargs in (0, "?"):
            try:
                return _BOOLEAN.validate_python(text.strip())
            except ValidationError:
                if action.nargs != "?":
                    raise BadValue("true or false") from None
        if action.nargs in ("+", "*"):
            return [self._one(action, item) for item in _items(text)]
        value = self._one(action, text)
        if name in ("quantization", "load_format", "tokenizer_mode"):
            _check_name(name, value)
        elif name == "block_size":
            _check_block_size(value, self._cpu)
        return value

    def _one(self, action: argparse.Action, text: str) -> Any:
        value: Any = text
        if callable(action.type):
            try:
                value = action.type(_whole(text) if "int" in self._types[action.dest] else text)
            except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
                wrong = wrong_fields(error.__cause__)
                found = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in wrong)
                raise BadValue(self._allowed(action), found[:_LONGEST]) from error
        choices = {choice.lower() if isinstance(choice, str) else choice: choice for choice in action.choices or ()}
        if not choices or value in choices.values():
            return value
        word = value.strip().lower() if isinstance(value, str) else value
        if word not in choices:
            raise BadValue(self._allowed(action))
        return choices[word]

    def _allowed(self, action: argparse.Action) -> str:
        if action.choices:
            return ", ".join("none" if choice is None else str(choice) for choice in action.choices)
        kinds = {
            "bool": "true or false", "int": "a whole number", "float": "a number", "dict": "a JSON object",
            "list": "a list: a,b or a JSON list", "Config": "a JSON object",
        }  # fmt: skip
        return next((text for word, text in kinds.items() if word in self._types[action.dest]), "text")


def _items(text: str) -> list[str]:
    """Return the items of `["a", "b"]` or `a,b`."""
    if not text.lstrip().startswith("["):
        return [item.strip() for item in text.split(",") if item.strip()]
    try:
        value = json.loads(text)
    except ValueError:
        raise BadValue("a list: a,b or a JSON list") from None
    return [item if isinstance(item, str) else json.dumps(item) for item in value]


def _whole(text: str) -> str:
    """Return 64 for 64.0, which LMI accepts as a whole number."""
    head, point, tail = text.partition(".")
    return head if point and head.lstrip("+-").isdigit() and not tail.strip("0") else text


def _extra(configuration: Configuration, fields: _Fields, problems: list[Problem]) -> dict[str, Any]:
    """Return the values of vLLM's own fields that the user has set."""
    values: dict[str, Any] = {}
    for name, written in configuration.extra.items():
        if name not in fields:
            continue
        shown = MASK if name in SECRET else repr(written.value[:_LONGEST])
        option = assigned(f"option.{name}", shown, written.location)
        try:
            if name in REFUSED:
                problems.append(Problem(f"{option}: not to be set here: {REFUSED[name]}"))
            else:
                values[name] = fields.read(name, written.value)
        except BadValue as bad:
            problems.append(Problem(f"{option}: {bad}"))
    return values


def _refused_values(configuration: Configuration, given: Mapping[str, str], fields: _Fields) -> Iterator[Problem]:
    """Yield a problem for each of our options that vLLM's command line would refuse. given: field -> option."""
    for field, name in given.items():
        value = getattr(configuration.settings, name)
        if field in _CONVERTED or value is None:
            continue
        try:
            fields.read(field, json.dumps(value) if isinstance(value, dict | list | bool) else str(value))
        except BadValue as bad:
            raw = configuration.sources[name].raw
            shown = repr(value if raw is None else raw)
            yield Problem(f"{configuration.assigned(name, shown)}: {bad}", name)


def _check_name(field: str, value: str) -> None:
    """Raise BadValue for a name that vLLM's command line does not check: it would end the engine's process."""
    names, word = registered_names()[field], value.lower()
    if value in names or (field != "quantization" and word in names):
        return
    word = "bitsandbytes" if word.startswith("bitsandbytes") else word
    raise BadValue(", ".join(sorted(names)), GONE.get(word, "") if field == "quantization" else "")


def _check_block_size(tokens: int, cpu: bool) -> None:
    if cpu and not cpu_takes_block_size(tokens):
        multiple = next(step for step in range(1, 1025) if cpu_takes_block_size(step))
        raise BadValue(f"a multiple of {multiple} on a CPU")
    if not cpu and tokens % _KERNEL_TOKENS:
        raise BadValue(f"a multiple of {_KERNEL_TOKENS}")
