"""The same requests to both backends: in float32 and greedy, the same words with nearly the same certainty."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image, ImageDraw

from tests.support.live import LiveServer, message
from tests.support.shapes import SHAPES

OPTIONS = ("dtype=float32", 'limit_mm_per_prompt={"image": 4}')
QUESTIONS = (
    "What is this an image of?",
    "Describe this image.",
    "What is in the second image?",
    "How many shapes are there?",
    "What is this an image of? Answer in JSON.",
    "What's the color of this image?",
    "hello",
    "Is there a red circle?",
)
COLORS = ("red", "green", "blue", "yellow", "black", "orange", "purple")
PROMPTS = 200
CLOSE = 0.05
"""Largest difference of a token's log probability."""


def draw_image(rng: random.Random) -> Image.Image:
    """One or two shapes of any size on a plain ground; sizes that no processor resizes by a whole factor."""
    size = (rng.randint(50, 400), rng.randint(50, 400))
    image = Image.new("RGB", size, rng.choice(["white", "black", "gray"]))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(1, 2)):
        x, y = (rng.randint(0, side // 2) for side in size)
        box = (x, y, x + size[0] // 3, y + size[1] // 3)
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)(box, fill=rng.choice(COLORS))
    return image


def bodies() -> list[dict[str, Any]]:
    rng = random.Random(7)
    pool = [draw_image(rng) for _ in range(40)]
    made = []
    for number in range(PROMPTS):
        content: list[Any] = [rng.choice(QUESTIONS)]
        for _ in range(number % 5):
            content.insert(rng.randint(0, len(content)), rng.choice(pool))
        turns = [message(*content)]
        if number % 7 == 0:
            turns += [message("a red circle", role="assistant"), message(rng.choice(QUESTIONS))]
        made.append({"messages": turns, "temperature": 0, "max_tokens": 24, "logprobs": True, "top_logprobs": 2})
    return made


def answers(requests: Sequence[dict[str, Any]], backend: str) -> list[dict[str, Any]]:
    with LiveServer(SHAPES, f"rolling_batch={backend}", *OPTIONS) as server, ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda body: server.http.post("/v1/chat/completions", json=body), requests))
    assert all(reply.status_code == 200 for reply in replies), [r.text for r in replies if r.status_code != 200]
    return [reply.json() for reply in replies]


@pytest.fixture(scope="module")
def both() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One after the other: each has the machine to itself."""
    requests = bodies()
    return answers(requests, "rolling"), answers(requests, "vllm")


def test_the_prompts_are_the_same_tokens(both: Any) -> None:
    ours, theirs = both
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        for count in ("prompt_tokens", "completion_tokens"):
            assert one["usage"][count] == other["usage"][count], number
        details = "prompt_tokens_details"
        assert one["usage"][details]["image_tokens"] == other["usage"][details]["image_tokens"] == 64 * (number % 5)


def test_the_answers_are_the_same_words(both: Any) -> None:
    ours, theirs = both
    different = [
        (number, one["choices"][0]["message"]["content"], other["choices"][0]["message"]["content"])
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True))
        if one["choices"][0]["message"] != other["choices"][0]["message"]
        or one["choices"][0]["finish_reason"] != other["choices"][0]["finish_reason"]
    ]
    assert not different


def test_the_certainties_are_close(both: Any) -> None:
    ours, theirs = both
    far = []
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        pairs = zip(one["choices"][0]["logprobs"]["content"], other["choices"][0]["logprobs"]["content"], strict=True)
        for place, (a, b) in enumerate(pairs):
            assert a["token"] == b["token"]
            if abs(a["logprob"] - b["logprob"]) > CLOSE:
                far.append((number, place, a["token"], a["logprob"], b["logprob"]))
    assert not far
