"""Values that a model's config.json suggests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config.json: nested under text_config (or llm_config), or the whole."""
    for name in ("text_config", "llm_config", "language_config"):
        part = config.get(name)
        if isinstance(part, Mapping):
            return part
    return config


def model_dtype(config: Mapping[str, Any]) -> str | None:
    """float32, float16 or bfloat16 where config.json names one of them."""
    for part in (config, text_config(config)):
        for name in ("dtype", "torch_dtype"):
            value = part.get(name)
            if value in ("float32", "float16", "bfloat16"):
                return str(value)
    return None


def context_length(config: Mapping[str, Any]) -> int | None:
    """Most positions that the language model was made for."""
    for part in (text_config(config), config):
        for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
            value = part.get(name)
            if isinstance(value, int) and value > 0:
                return value
    return None


def recommended(config: Mapping[str, Any]) -> dict[str, object]:
    """Attribute of `Settings` -> recommended value.

    dtype is not among them: its default, auto, leaves the choice to the backend, which knows the device.
    """
    length = context_length(config)
    return {} if length is None else {"max_model_len": length}
