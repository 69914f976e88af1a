"""Images that vLLM's front has rendered and that were never sent: the next request with the same image is served.

The front notes an image as sent when it has rendered it, and sends it without data from then on. Where the engine has
not got it, vLLM forgets the note and ends the request, which is then made again with the image.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from PIL import Image

from tests.support.live import LiveServer, chat_body
from tests.support.shapes import SHAPES


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with LiveServer(SHAPES, "max_logprobs=2") as live:
        yield live


def noise(size: int) -> Image.Image:
    """No two are the same, so that none is in a cache."""
    return Image.frombytes("RGB", (size, size), os.urandom(size * 3) * size)


def test_of_a_count_of_tokens(server: LiveServer) -> None:
    body = chat_body(noise(40), "What?")
    assert server.http.post("/tokenize", json={"messages": body["messages"]}).status_code == 200
    assert server.http.post("/v1/chat/completions", json=body).status_code == 200


def test_of_a_request_that_was_too_long(server: LiveServer) -> None:
    body = chat_body(noise(40), "What?")
    refused = server.http.post("/v1/chat/completions", json={**body, "max_tokens": 4060})
    assert refused.status_code == 400
    served = server.http.post("/v1/chat/completions", json=body)
    assert served.status_code == 200
    tokens = served.json()["usage"]["prompt_tokens"]
    assert f"the prompt has {tokens} tokens" in refused.json()["error"]["message"]


def test_of_a_request_that_only_vllm_refuses(server: LiveServer) -> None:
    body = chat_body(noise(40), "What?", temperature=1.0)
    refused = server.http.post("/v1/chat/completions", json={**body, "logprobs": True, "top_logprobs": 5})
    assert refused.status_code == 400
    assert "greater than max allowed: 2" in refused.json()["error"]["message"]
    assert server.http.post("/v1/chat/completions", json={**body, "n": 2}).status_code == 200


def test_of_clients_that_left_while_their_image_was_rendered(server: LiveServer) -> None:
    """At every moment of it: as SageMaker's clients do, which give up and send the same again."""
    for number in range(40):
        body = chat_body(noise(1000), "What?", max_tokens=1)
        with contextlib.suppress(httpx.TimeoutException):
            httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.015 + 0.0015 * number)
        reply = server.http.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, (number, reply.text)


def test_of_requests_refused_while_others_are_served() -> None:
    """What the front believes is cached and what is drift apart when images keep going in and out of both."""
    images = [noise(40) for _ in range(60)]
    chosen = random.Random(1)
    with LiveServer(SHAPES, "mm_processor_cache_gb=0.002") as server:

        def one(_: int) -> int:
            body = chat_body(chosen.choice(images), "What?", max_tokens=2)
            too_long = {"max_tokens": 4060} if chosen.random() < 0.3 else {}
            reply = server.http.post("/v1/chat/completions", json=body | too_long)
            assert reply.status_code == (400 if too_long else 200), reply.text
            return reply.status_code

        with ThreadPoolExecutor(12) as pool:
            answered = Counter(pool.map(one, range(600)))
        assert answered[200] > 300
        assert answered[400] > 100
        assert "cache miss" in server.log, "the caches were too large to show anything"
