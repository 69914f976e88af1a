"""vLLM's front notes a picture as sent when it has rendered it: what was not sent must not be missed later."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import httpx
import pytest
from PIL import Image

from tests.live import LiveServer, chat_body
from tests.test_shapes_live import SHAPES


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with LiveServer(SHAPES) as live:
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
    assert server.http.post("/v1/chat/completions", json=body).status_code == 200


def test_of_clients_that_left_while_their_picture_was_rendered(server: LiveServer) -> None:
    """At every moment of it: as SageMaker's clients do, which give up and send the same again."""
    for number in range(40):
        body = chat_body(noise(1000), "What?", max_tokens=1)
        with contextlib.suppress(httpx.TimeoutException):
            httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.015 + 0.0015 * number)
        reply = server.http.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, (number, reply.text)
    assert "cache miss" not in server.log
