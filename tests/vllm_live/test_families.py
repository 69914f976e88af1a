"""Families of vision models, tiny and random: both backends give the same words to the same chats."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.likeness import noise
from tests.support.live import LiveServer, message
from tests.support.tiny_llava_next import make_llava_next
from tests.support.tiny_llava_onevision import make_llava_onevision
from tests.support.tiny_pixtral import make_pixtral

MAKERS: dict[str, Callable[[Path], Path]] = {
    "llava_next": make_llava_next,
    "pixtral": make_pixtral,
    # vLLM knows no other number
    "llava_onevision": lambda path: make_llava_onevision(path, most_tiles=9),
    "mistral3": lambda path: make_pixtral(path, merge=2),
}
OPTIONS = ("dtype=float32", 'limit_mm_per_prompt={"image": 2}')
OWN = dict.fromkeys(("pixtral", "mistral3"), ("image_placeholder_token=[IMG]",))
"""By family: the tiny tokenizer, unlike Pixtral's, also has the token that vLLM writes for a Llava's image."""
SIZES = [(56, 56), (30, 90), (200, 40), (9, 9), (150, 140), (64, 33)]


def chats(several: bool) -> list[dict[str, Any]]:
    images: list[Image.Image] = [noise(*size, seed) for seed, size in enumerate(SIZES)]
    said = [message("look: ", image) for image in images] + [message("no image at all")]
    if several:
        said += [message(images[0], " and ", images[1]), message(images[4], images[2], "?")]
    return [{"messages": [turn], "temperature": 0, "max_tokens": 16, "ignore_eos": True} for turn in said]


def answers(path: Path, backend: str, bodies: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """Tokens of the prompt, and the text."""
    with (
        LiveServer(path, f"rolling_batch={backend}", *OPTIONS, *OWN.get(path.name, ())) as server,
        ThreadPoolExecutor(16) as pool,
    ):
        replies = list(pool.map(lambda body: server.http.post("/v1/chat/completions", json=body), bodies))
    assert [reply.text for reply in replies if reply.status_code != 200] == []
    found = [reply.json() for reply in replies]
    return [(r["usage"]["prompt_tokens"], r["choices"][0]["message"]["content"]) for r in found]


@pytest.mark.parametrize("family", MAKERS)
def test_both_backends_answer_alike(family: str, tmp_path: Path) -> None:
    """vLLM cuts images of Llava-OneVision into tiles also where there are several, unlike transformers."""
    path = MAKERS[family](tmp_path / family)
    bodies = chats(several=family != "llava_onevision")
    ours, theirs = (answers(path, backend, bodies) for backend in ("rolling", "vllm"))
    assert ours == theirs
