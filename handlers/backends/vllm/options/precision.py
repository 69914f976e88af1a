"""The type that vLLM computes in, and why: its own rule, without importing it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from handlers.backends.weight_files import read_header, safetensors_files
from properties.model import model_dtype

_HEADERS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def stored_dtype(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The type that config.json says, else that of the safetensors headers which holds all others.

    As `get_torch_dtype` of vllm/transformers_utils/model_arch_config_convertor.py. None where neither tells.
    """
    vision = config.get("vision_config")
    named = model_dtype(config) or (model_dtype(vision) if isinstance(vision, Mapping) else None)
    if named is not None:
        return named
    try:
        files = safetensors_files(directory)
        found = {_HEADERS.get(tensor.dtype) for path in files for tensor in read_header(path).values()}
    except (ValueError, OSError):  # told where the files are checked
        return None
    found.discard(None)
    return "float32" if "float32" in found else found.pop() if len(found) == 1 else None


def served_dtype(name: str, stored: str | None, *, bfloat16: bool) -> tuple[str, str]:
    """(type, reason). name: option.dtype. stored: see `stored_dtype`. bfloat16: whether the device computes in it.

    The rule is `_resolve_auto_dtype` of vllm/config/model.py: float32 becomes the first type that the device supports.
    """
    if name != "auto":
        return name, "option.dtype says so"
    half = "bfloat16" if bfloat16 else "float16"
    if stored is None:
        return half, "config.json names no type, and the weights none or several"
    if stored == "float32":
        return half, f"vLLM serves what is stored in float32 in {half}; option.dtype=float32 keeps it"
    if stored == "bfloat16" and not bfloat16:
        return half, "the model is stored in bfloat16, in which this accelerator does not compute"
    return stored, "as the model is stored"
