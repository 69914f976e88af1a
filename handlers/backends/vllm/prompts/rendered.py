"""What vLLM's renderer has made of a prompt with pictures."""

from __future__ import annotations

from typing import Any


def placeholders(prompt: Any) -> list[Any]:
    """Where an input's pictures stand, in no order: each has an `offset` and a `length` in tokens."""
    return _images(prompt, "mm_placeholders")


def prepared(prompt: Any) -> list[Any]:
    """What the engine gets of each picture; None for what it has already."""
    return _images(prompt, "mm_kwargs")


def take_back(engine: Any, prompt: Any) -> None:
    """Say that rendered pictures were not sent after all.

    vLLM's front notes when it renders a picture that the engine has it from now on: the next request with the same
    picture would come without it, and fail. What it rendered without data, the engine had before.
    """
    forget = getattr(getattr(engine.renderer, "mm_processor_cache", None), "invalidate", None)
    if forget is None:
        return
    for digest, item in zip(_images(prompt, "mm_hashes"), prepared(prompt), strict=True):
        if item is not None:
            forget(digest)


def _images(prompt: Any, name: str) -> list[Any]:
    return list((prompt.get(name) or {}).get("image", ()))
