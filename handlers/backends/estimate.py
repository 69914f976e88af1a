"""How much memory a model needs, from its files' headers and its config.json, without loading it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.families.registry import register
from handlers.backends.weight_files import BITS, INDEX, PICKLED_INDEX, read_header, safetensors_files
from properties.model import model_dtype, read_object, text_config

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class Weights:
    """The bytes of all weights in the type they are served in, and what they were counted from."""

    size: int
    basis: str


def weights(directory: Path, config: Mapping[str, Any], dtype: str) -> Weights | None:
    """Estimate from safetensors headers, else from an index's total_size, else from config.json's shapes.

    Returns:
        None if nothing allows an estimate. dtype is a key of DTYPE_BYTES.

    Raises:
        ValueError: A file is damaged; the message names it.
    """
    width = DTYPE_BYTES[dtype]
    files = safetensors_files(directory)
    if files and all(path.is_file() for path in files):
        return Weights(sum(_tensor_bytes(path, width) for path in files), "safetensors headers")
    for name in (INDEX, PICKLED_INDEX):
        index = directory / name
        if index.is_file():
            stored = DTYPE_BYTES[model_dtype(config) or "bfloat16"]
            return Weights(_total_size(index) * width // stored, f"total_size in {name}")
    parameters = _parameters(config)
    return Weights(parameters * width, "shapes in config.json") if parameters else None


def completed(directory: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return config.json with the values that it leaves to its family's defaults, as many models on the hub do.

    It is returned unchanged if transformers does not know the family. Imports transformers.
    """
    from transformers import AutoConfig

    register(str(config.get("model_type")))
    try:
        full: dict[str, Any] = AutoConfig.from_pretrained(directory, local_files_only=True).to_dict()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return config
    return {**full, **{name: config[name] for name in ("dtype", "torch_dtype") if name in config}}


def shared_output(config: Mapping[str, Any], dtype: str) -> int:
    """Return the bytes of an output layer that is the embedding: on a CPU the embedded engine keeps a packed copy."""
    text = text_config(config)
    if not text.get("tie_word_embeddings", config.get("tie_word_embeddings")):
        return 0
    return (first_number(text, "vocab_size") or 0) * (first_number(text, "hidden_size") or 0) * DTYPE_BYTES[dtype]


def cache_bytes_per_token(config: Mapping[str, Any], dtype: str) -> int | None:
    """Return the size of one token's keys and values: 2 * layers * key/value heads * head size * bytes."""
    text = text_config(config)
    layers, heads, hidden = (
        first_number(text, *names)
        for names in (("num_hidden_layers", "n_layer"), ("num_attention_heads", "n_head"), ("hidden_size", "n_embd"))
    )
    if layers is None or heads is None:
        return None
    size = first_number(text, "head_dim") or (hidden // heads if hidden else None)
    if size is None:
        return None
    return 2 * layers * (first_number(text, "num_key_value_heads") or heads) * size * DTYPE_BYTES[dtype]


def _tensor_bytes(path: Path, width: int) -> int:
    """Return the bytes of a file's tensors: floating-point ones at `width` bytes an element, others as stored."""
    return sum(
        math.prod(tensor.shape) * width
        if tensor.dtype in _FLOATS
        else -(-math.prod(tensor.shape) * BITS.get(tensor.dtype, 8) // 8)
        for tensor in read_header(path).values()
    )


def _total_size(index: Path) -> int:
    try:
        return int(read_object(index).get("metadata", {}).get("total_size", 0))
    except ValueError:
        raise ValueError(f"{index.name} holds no JSON object") from None


def _parameters(config: Mapping[str, Any]) -> int:
    """Return the parameters of the layers and embeddings that config.json describes; 0 if it does not."""
    return sum(_stack(part) for part in _parts(config))


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield text_config(config)
    vision = config.get("vision_config")
    if isinstance(vision, Mapping):
        yield vision


def _stack(part: Mapping[str, Any]) -> int:
    hidden = first_number(part, "hidden_size", "n_embd")
    layers = first_number(part, "num_hidden_layers", "n_layer")
    if hidden is None or layers is None:
        return 0
    heads = first_number(part, "num_attention_heads", "n_head") or 1
    size = first_number(part, "head_dim") or hidden // heads
    shared = first_number(part, "num_key_value_heads") or heads
    wide = first_number(part, "intermediate_size") or 4 * hidden
    vocabulary = first_number(part, "vocab_size") or 0
    matrices = 3 if vocabulary else 2
    embeddings = vocabulary * hidden * (1 if part.get("tie_word_embeddings") else 2)
    return embeddings + layers * (2 * hidden * size * (heads + shared) + matrices * hidden * wide)


def first_number(part: Mapping[str, Any], *names: str) -> int | None:
    """Return the first of these fields of a config.json that is a positive whole number; None if none is."""
    values = (part.get(name) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)
