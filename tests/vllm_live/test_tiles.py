"""Models that cut images into tiles give the same answers with both backends, to the same prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.exactness import image_of
from tests.support.live import LiveServer, message
from tests.support.tiny_tiles import make_idefics3, make_internvl

CHATS = (
    [message(image_of(60, 40), "what?")],
    [message(image_of(200, 8), image_of(20, 90, 1), " and this? ")],
    [message("look"), message("yes", role="assistant"), message(" here:", image_of(50, 50, 2))],
    [message("nothing to see")],
)


def make_smolvlm(path: Path) -> Path:
    return make_idefics3(path, "smolvlm")


@pytest.mark.parametrize("make", [make_idefics3, make_smolvlm, make_internvl])
def test_both_backends_answer_alike(make: Callable[[Path], Path], tmp_path: Path) -> None:
    model = make(tmp_path)
    assert answers(model, "rolling") == answers(model, "vllm")


def answers(model: Path, backend: str) -> list[tuple[Any, ...]]:
    options = (
        f"rolling_batch={backend}",
        "dtype=float32",
        'limit_mm_per_prompt={"image": 2}',
        "max_model_len=768",
    )
    found = []
    with LiveServer(model, *options) as server:
        for chat in CHATS:
            body = {"messages": chat, "temperature": 0, "max_tokens": 12, "ignore_eos": True}
            reply = server.http.post("/v1/chat/completions", json=body)
            assert reply.status_code == 200, reply.text
            found.append((reply.json()["usage"]["prompt_tokens"], reply.json()["choices"][0]["message"]["content"]))
    return found
