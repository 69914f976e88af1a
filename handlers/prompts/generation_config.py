"""A model's generation_config.json: the tokens that end an answer, and the sampling defaults of requests."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from engine.errors import ModelLoadError, one_line
from engine.sampling_params import MAX_INTEGER, SamplingParams
from properties.model import read_object

log = logging.getLogger(__name__)


def read_generation_config(path: str) -> dict[str, Any]:
    """Return the content of a model's generation_config.json; empty if there is no such file."""
    try:
        return read_object(Path(path, "generation_config.json"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"generation_config.json of the model cannot be read: {one_line(error)}") from error


def read_eos_token_ids(generation: dict[str, Any], text_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that end an answer.

    generation_config.json decides, as in transformers; else the model's config; else the tokenizer.
    """
    for source in (generation.get("eos_token_id"), getattr(text_config, "eos_token_id", None), tokenizer.eos_token_id):
        if source is not None:
            return tuple(source) if isinstance(source, list) else (int(source),)
    return ()


_SAME_NAME = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty",
)  # fmt: skip
_DEFAULTS = {name: name for name in _SAME_NAME} | {"max_new_tokens": "max_tokens"}
"""A field of generation_config.json -> of SamplingParams: those that vLLM takes, and typical_p."""

_OF_SAMPLING = frozenset({"temperature", "top_k", "top_p", "min_p", "typical_p"})

_UNREAD = (
    "min_length", "min_new_tokens", "stop_strings", "num_beams", "penalty_alpha", "dola_layers", "top_h",
    "epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size", "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias",
    "exponential_decay_length_penalty", "guidance_scale", "watermarking_config", "forced_bos_token_id",
    "forced_eos_token_id", "diversity_penalty", "force_words_ids", "constraints", "max_time", "renormalize_logits",
)  # fmt: skip
"""Fields that change the answers of transformers' `generate`, but not those of vLLM's server or of this one."""


def read_default_sampling(generation: dict[str, Any]) -> dict[str, float | int]:
    """Return the defaults in generation_config.json, by the names of SamplingParams, for requests that do not set them.

    `do_sample: false` is greedy. Values that are out of range or have no effect here are left out with a warning. The
    other fields are about ends of sequences (see `read_eos_token_ids`), the total length (`max_length`; as in vLLM, the
    context's length counts instead), beam search, caches, speed, and the shape of `generate`'s result.
    """
    found: dict[str, float | int] = {}
    for field, name in _DEFAULTS.items():
        value = generation.get(field)
        if value is None or (generation.get("do_sample") is False and name in _OF_SAMPLING):
            continue
        if name in ("top_k", "max_tokens") and isinstance(value, float) and value.is_integer():
            value = int(value)
        if name == "max_tokens" and isinstance(value, int) and value > MAX_INTEGER:
            continue  # more than any context: the same as no limit
        if _allowed(name, value):
            found[name] = value
        else:
            log.warning("generation_config.json: %s = %.40r is not used: no such value is allowed", field, value)
    if generation.get("do_sample") is False:
        found["temperature"] = 0.0
    if unread := [field for field in _UNREAD if _changes(field, generation.get(field))]:
        log.warning("generation_config.json: these fields have no effect on this server: %s", ", ".join(unread))
    return found


def _changes(field: str, value: object) -> bool:
    """Forced tokens, `true` and a time limit always change something; other values do unless they are 0 or 1."""
    if field.startswith("forced_") or value is True or field == "max_time":
        return value not in (None, [])
    return value not in (None, 0, 1, [], {})


def _allowed(name: str, value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if name in ("top_k", "max_tokens") and not isinstance(value, int):
        return False
    try:
        SamplingParams(**{name: value}).validate()  # type: ignore[arg-type]
    except ValueError:
        return False
    return True
