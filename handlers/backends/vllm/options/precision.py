"""The type that vLLM computes in, and why: its own rule, without importing it."""

from __future__ import annotations


def served_dtype(name: str, stored: str | None, *, bfloat16: bool) -> tuple[str, str]:
    """(type, reason). name: option.dtype. stored: what config.json says. bfloat16: whether the device computes in it.

    The rule is `_resolve_auto_dtype` of vllm/config/model.py: float32 becomes the first type that the device supports.
    """
    if name != "auto":
        return name, "option.dtype says so"
    half = "bfloat16" if bfloat16 else "float16"
    if stored is None:
        return half, "config.json names no type"
    if stored == "float32":
        return half, f"vLLM serves what is stored in float32 in {half}; option.dtype=float32 keeps it"
    if stored == "bfloat16" and not bfloat16:
        return half, "the model is stored in bfloat16, in which this accelerator does not compute"
    return stored, "as the model is stored"
