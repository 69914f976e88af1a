"""Turns the arguments of `LLM` into a configuration: our options, and the arguments of vLLM's constructor."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from handlers.backends.select import vllm_installed
from handlers.backends.vllm.compat import engine_argument_names
from properties.configuration import Configuration, resolve
from properties.field import Level
from properties.names import by_name, nearest
from properties.problem import ConfigurationError

logger = logging.getLogger(__name__)

_MAX_IMAGES = 999
"""Images in a prompt, unless `limit_mm_per_prompt` is given: a script is its own client. vLLM's value."""

_NO_EFFECT = "LLM's %s has no effect here: %s"

_OF_PIXELS = ("image_input_type", "image_input_shape")

WITHOUT_EFFECT = by_name(
    {
        "only one way is implemented": (
            "async_scheduling attention_config compilation_config disable_cascade_attn disable_chunked_mm_input "
            "disable_custom_all_reduce distributed_executor_backend mm_encoder_tp_mode profiler_config "
            "skip_mm_profiling"
        ),
        "only generation is served": "convert runner",
        "tensors are recognised, and images are always prepared": "disable_image_processor no_image_processor",
        "nothing is logged": "disable_log_stats",
        "see image_cache_mb": "mm_processor_cache_gb mm_processor_cache_type",
        "give SamplingParams": "generation_config",
        "the model's own processor is used": "image_processor_revision",
        "placeholders are always written in place": "interleave_mm_strings",
    }
)
"""Arguments of vLLM's constructor that change no answer, and why the embedded engine does not need them, besides those
that `properties.lmi` ignores."""

_OF_FILES = {"allowed_local_media_path": "open a file with Pillow and give the image"}
"""Arguments that no backend needs, where the advice to a server's clients (`properties.lmi`) is not one to scripts."""

REFUSED = by_name(
    {
        "change the model's config.json": "hf_overrides",
        "the model's own processor is used": "image_processor",
        "custom logits processors cannot be run": "logits_processors",
        "only generation is served": "pooler_config",
        "give prompts as text or as token ids; the tokenizer is needed for the answers": "skip_tokenizer_init",
        "the model's own tokenizer is used": "tokenizer tokenizer_revision",
    }
)
"""Arguments that would change answers and that the embedded engine cannot take, and what to do."""


def configure(model: str, given: Mapping[str, Any]) -> Configuration:
    """Configure as for a server, with the arguments in place of the command line's options.

    Raises TypeError for a name that is unknown or refused, and ConfigurationError for a value.
    """
    options = []
    if given.get("image_input_type") == "image_features":  # whose shape says the rest
        given = {name: value for name, value in given.items() if name not in _OF_PIXELS}
        given = {"enable_mm_embeds": True, **given}
    for name, value in given.items():
        if (
            value is None
            or (name in ("tokenizer", "image_processor") and value == model)
            or (name == "hf_token" and value is True)
        ):
            continue
        if name in _OF_FILES:
            logger.warning(_NO_EFFECT, name, _OF_FILES[name])
        elif name == "kv_cache_memory_bytes":
            options.append(f"kv_cache_memory_mb={int(value) >> 20}")
        else:
            options.append(f"{name}={_text(name, value)}")
    configuration = _resolve(model, options)
    if not vllm_installed():
        check_names(configuration)
    if configuration.sources["limit_mm_per_prompt"].level is Level.DEFAULT:
        configuration = _resolve(model, [*options, f"limit_mm_per_prompt=image={_MAX_IMAGES}"])
    configuration = configuration.with_default("spare_engine", False)  # a script can be run again
    # A script's prompts come at once, before a second replica would be there, which would only take processor time.
    configuration = configuration.with_default("min_workers", 1)
    own = tuple(f"option.{name} (--option" for name in WITHOUT_EFFECT)
    for problem in configuration.warnings:
        if not problem.message.startswith(own):
            logger.warning("%s", problem)
    return configuration


def check_names(configuration: Configuration) -> None:
    """Raises TypeError for an argument that is not an option and that the embedded engine refuses or does not know."""
    for name in _unknown(configuration):
        if name in WITHOUT_EFFECT:
            continue
        if name in REFUSED:
            raise TypeError(f"LLM() does not take {name}: {REFUSED[name]}")
        known = nearest(name, Level.COMMAND_LINE)
        meant = f"; did you mean {known}?" if known else ""
        raise TypeError(f"LLM() got an unexpected keyword argument {name!r}{meant}")


def warn_of_names(configuration: Configuration) -> None:
    """Log a warning for each argument that has no effect with the embedded engine."""
    for name in _unknown(configuration):
        if name in WITHOUT_EFFECT:
            logger.warning(_NO_EFFECT, name, WITHOUT_EFFECT[name])


def _unknown(configuration: Configuration) -> list[str]:
    return [n for n, item in configuration.extra.items() if item.level is Level.COMMAND_LINE]


def _resolve(model: str, options: list[str]) -> Configuration:
    try:
        return resolve(model=model, environ=os.environ, options=options, backend_options=engine_argument_names())
    except ConfigurationError as error:
        told = [
            replace(problem, message=problem.message.replace("--option ", "LLM's argument "))
            for problem in error.problems
        ]
        raise ConfigurationError(told, error.warnings) from None


def _text(name: str, value: object) -> str:
    """Return a Python value as an option's text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping | list | tuple | set):
        return json.dumps(sorted(value) if isinstance(value, set) else value)
    text = str(value)
    if name == "chat_template" and len(text) < 4096 and "\n" not in text and Path(text).is_file():
        return str(Path(text).absolute())
    return text.removeprefix("torch.") if name == "dtype" else text
