"""The arguments of `LLM` as a configuration: options by their own names, and by those of vLLM's constructor."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from handlers.backends.select import vllm_backend_present, vllm_installed
from handlers.backends.vllm.compat import engine_argument_names
from properties.configuration import Configuration, resolve
from properties.field import Level
from properties.names import nearest
from properties.problem import ConfigurationError

logger = logging.getLogger(__name__)

_MOST_IMAGES = 999
"""In one prompt, unless `limit_mm_per_prompt` says otherwise: a script is its own client. vLLM's value."""

_OWN_PROCESSOR = "the model's own processor is used"
_TENSORS = "tensors are known as such, and images are always prepared"
_CACHE = "see image_cache_mb"
_ONE_WAY = "there is one way here"

_OF_PIXELS = ("image_input_type", "image_input_shape")

WITHOUT_EFFECT: dict[str, str] = {
    "allowed_local_media_path": "open a file with Pillow and give the image",
    "async_scheduling": _ONE_WAY,
    "attention_config": _ONE_WAY,
    "compilation_config": _ONE_WAY,
    "convert": "only generation is served",
    "device": "set load_on_devices, or hide the devices from the process",
    "disable_async_output_proc": _ONE_WAY,
    "disable_cascade_attn": _ONE_WAY,
    "disable_chunked_mm_input": _ONE_WAY,
    "disable_custom_all_reduce": _ONE_WAY,
    "disable_image_processor": _TENSORS,
    "disable_log_stats": "nothing is logged",
    "disable_mm_preprocessor_cache": _CACHE,
    "distributed_executor_backend": _ONE_WAY,
    "generation_config": "give SamplingParams",
    "image_processor_revision": _OWN_PROCESSOR,
    "interleave_mm_strings": "placeholders are always written in place",
    "max_context_len_to_capture": _ONE_WAY,
    "max_seq_len_to_capture": _ONE_WAY,
    "mm_encoder_tp_mode": _ONE_WAY,
    "mm_processor_cache_gb": _CACHE,
    "mm_processor_cache_type": _CACHE,
    "no_image_processor": _TENSORS,
    "profiler_config": _ONE_WAY,
    "runner": "only generation is served",
    "skip_mm_profiling": _ONE_WAY,
    "swap_space": "what is preempted is computed again",
    "use_v2_block_manager": _ONE_WAY,
    "worker_use_ray": _ONE_WAY,
}
"""Arguments of vLLM's constructor that change no answer, and why the embedded engine does not need them."""

REFUSED: dict[str, str] = {
    "hf_overrides": "change the model's config.json",
    "image_processor": _OWN_PROCESSOR,
    "logits_processors": "custom logits processors cannot be run",
    "pooler_config": "only generation is served",
    "skip_tokenizer_init": "give prompts as text or as token ids; the tokenizer is needed for the answers",
    "tokenizer": "the model's own tokenizer is used",
    "tokenizer_revision": "the model's own tokenizer is used",
}
"""Arguments that would change answers and that the embedded engine cannot take, and what to do."""


def configure(model: str, given: Mapping[str, Any]) -> Configuration:
    """As for a server, with the arguments in the place of the command line's options.

    Raises TypeError for a name that is unknown or refused, ConfigurationError for a value.
    """
    options = []
    if given.get("image_input_type") == "image_features":  # of a shape of their own
        given = {name: value for name, value in given.items() if name not in _OF_PIXELS}
        given = {"enable_mm_embeds": True, **given}
    for name, value in given.items():
        if (
            value is None
            or (name in ("tokenizer", "image_processor") and value == model)
            or (name == "hf_token" and value is True)
        ):
            continue
        if name == "kv_cache_memory_bytes":
            options.append(f"kv_cache_memory_mb={int(value) >> 20}")
        else:
            options.append(f"{name}={_text(name, value)}")
    configuration = _resolve(model, options)
    if not (vllm_installed() and vllm_backend_present()):
        check_names(configuration)
    if configuration.sources["limit_mm_per_prompt"].level is Level.DEFAULT:
        configuration = _resolve(model, [*options, f"limit_mm_per_prompt=image={_MOST_IMAGES}"])
    own = tuple(f"option.{name} (--option" for name in WITHOUT_EFFECT)
    for problem in configuration.warnings:
        if not problem.message.startswith(own):
            logger.warning("%s", problem)
    return configuration


def check_names(configuration: Configuration) -> None:
    """Judge the arguments that are not options of ours, where no engine judges them itself. Raises TypeError."""
    for name in _unknown(configuration):
        if name in WITHOUT_EFFECT:
            continue
        if name in REFUSED:
            raise TypeError(f"LLM() does not take {name}: {REFUSED[name]}")
        known = nearest(name, Level.COMMAND_LINE)
        meant = f"; did you mean {known}?" if known else ""
        raise TypeError(f"LLM() got an unexpected keyword argument {name!r}{meant}")


def warn_of_names(configuration: Configuration) -> None:
    """A warning for each argument that has no effect where no engine takes it."""
    for name in _unknown(configuration):
        if name in WITHOUT_EFFECT:
            logger.warning("LLM's %s has no effect here: %s", name, WITHOUT_EFFECT[name])


def _unknown(configuration: Configuration) -> list[str]:
    return [n for n, item in configuration.extra.items() if item.source.level is Level.COMMAND_LINE]


def _resolve(model: str, options: list[str]) -> Configuration:
    try:
        return resolve(
            model=model, environ=os.environ, options=options, backend_options=engine_argument_names()
        )
    except ConfigurationError as error:
        told = [
            replace(problem, message=problem.message.replace("--option ", "LLM's argument "))
            for problem in error.problems
        ]
        raise ConfigurationError(told, error.warnings) from None


def _text(name: str, value: object) -> str:
    """A Python value as an option's text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if (
        name == "chat_template"
        and len(str(value)) < 4096
        and "\n" not in str(value)
        and Path(str(value)).is_file()
    ):
        return str(Path(str(value)).absolute())
    if isinstance(value, Mapping | list | tuple | set):
        return json.dumps(sorted(value) if isinstance(value, set) else value)
    return str(value).removeprefix("torch.") if name == "dtype" else str(value)
