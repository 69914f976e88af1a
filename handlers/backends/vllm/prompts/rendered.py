"""What vLLM's renderer has made of a prompt with images."""

from __future__ import annotations

from typing import Any


def placeholders(prompt: Any) -> list[Any]:
    """Where an input's images stand, in no order: each has an `offset` and a `length` in tokens."""
    return _images(prompt, "mm_placeholders")


def prepared(prompt: Any) -> list[Any]:
    """What the engine gets of each image; None for what it has already."""
    return _images(prompt, "mm_kwargs")


def _images(prompt: Any, name: str) -> list[Any]:
    return list((prompt.get(name) or {}).get("image", ()))
