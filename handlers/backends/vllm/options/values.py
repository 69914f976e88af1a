"""Values of vLLM's engine arguments: read from an option's text, and checked before anything is loaded."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from handlers.backends.vllm.compat import cpu_takes_block_size, registered_names
from handlers.backends.vllm.failures import refusal_reason, wrong_fields
from properties.names import key_of
from properties.problem import Problem

if TYPE_CHECKING:
    from handlers.backends.vllm.compat import Vllm
    from properties.configuration import Configuration

_BOOLEANS = dict.fromkeys(("true", "1", "yes", "on", "t", "y"), True) | dict.fromkeys(
    ("false", "0", "no", "off", "f", "n"), False
)
_LONGEST = 200

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


class BadValue(Exception):
    """As text: what is wrong, where vLLM says so, and what is allowed."""

    def __init__(self, allowed: str, reason: str = "") -> None:
        super().__init__(f"{f'{reason}; ' if reason else ''}allowed: {allowed}")


def coerce(action: argparse.Action | None, text: str, annotation: str) -> Any:
    """The value that `text` means to vLLM's own command line.

    action: the argument's, from vLLM's parser; None for a field that is not on its command line.
    annotation: the field's type as written, for messages. Raises BadValue.
    """
    if action is None:
        try:
            return json.loads(text)
        except ValueError:
            return text
    word = text.strip().lower()
    flag = isinstance(action, argparse.BooleanOptionalAction) or action.nargs == 0
    if flag or (action.nargs == "?" and word in _BOOLEANS):
        if word not in _BOOLEANS:
            raise BadValue("true or false")
        return _BOOLEANS[word]
    if action.nargs in ("+", "*"):
        return [_one(action, item, annotation) for item in _items(text)]
    return _one(action, text, annotation)


def _items(text: str) -> list[str]:
    """`["a", "b"]` or `a,b`."""
    if not text.lstrip().startswith("["):
        return [item.strip() for item in text.split(",") if item.strip()]
    try:
        value = json.loads(text)
    except ValueError:
        raise BadValue("a list: a,b or a JSON list") from None
    return [item if isinstance(item, str) else json.dumps(item) for item in value]


def _one(action: argparse.Action, text: str, annotation: str) -> Any:
    value: Any = text
    if callable(action.type):
        try:
            value = action.type(_whole(text) if "int" in annotation else text)
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            found = (
                f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in wrong_fields(error.__cause__)
            )
            raise BadValue(_allowed(action, annotation), "; ".join(found)[:_LONGEST]) from error
    choices = list(action.choices or ())
    if not choices or value in choices:
        return value
    words = {choice.lower(): choice for choice in choices if isinstance(choice, str)}
    if not isinstance(value, str) or value.strip().lower() not in words:
        raise BadValue(_allowed(action, annotation))
    return words[value.strip().lower()]


def _whole(text: str) -> str:
    """64.0 is a whole number here, as in LMI."""
    head, point, tail = text.partition(".")
    return head if point and head.lstrip("+-").isdigit() and not tail.strip("0") else text


def _allowed(action: argparse.Action, annotation: str) -> str:
    if action.choices:
        return ", ".join("none" if choice is None else str(choice) for choice in action.choices)
    kinds = {
        "bool": "true or false", "int": "a whole number", "float": "a number", "dict": "a JSON object",
        "list": "a list: a,b or a JSON list", "Config": "a JSON object",
    }  # fmt: skip
    return next((meaning for word, meaning in kinds.items() if word in annotation), "text")


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
        written = json.dumps(value) if isinstance(value, dict | list | bool) else str(value)
        try:
            coerce(actions.get(field), written, annotations[field])
            if field in NAMED:
                _check_name(field, value, registered_names()[field])
            elif field == "block_size":
                _check_block_size(value, cpu)
        except BadValue as bad:
            source = configuration.sources[name]
            shown = source.raw if source.raw is not None else value
            text = f"{key_of(name)} = {shown!r} ({source.location}): {bad}"
            problems.append(Problem(text, name, source))
    return problems


def _check_name(field: str, value: str, names: Collection[str]) -> None:
    word = value.lower()
    if value in names or (field != "quantization" and word in names):
        return
    word = "bitsandbytes" if word.startswith("bitsandbytes") else word
    raise BadValue(", ".join(sorted(names)), GONE.get(word, "") if field == "quantization" else "")


def _check_block_size(tokens: int, cpu: bool) -> None:
    if cpu and not cpu_takes_block_size(tokens):
        multiple = next(step for step in range(1, 1025) if cpu_takes_block_size(step))
        raise BadValue(f"a multiple of {multiple} on a CPU")
    if not cpu and tokens % KERNEL_TOKENS:
        raise BadValue(f"a multiple of {KERNEL_TOKENS}")


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
        where = next((item["loc"] for item in wrong_fields(error)), ())
        field = str(where[0]) if where else ""
        name = names(field)
        told = f"{key_of(name)} = {arguments[field]!r}: " if name is not None else ""
        text = f"vLLM {vllm.version} cannot serve the model as configured: {told}{refusal_reason(error)}"
        return [Problem(text, name)]
    return []
