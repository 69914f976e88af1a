"""Embeddings in place of images: read from a request's parts, and sent to a server."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from handlers.backends.embeddings import EmbeddingsWanted
from handlers.images.limits import ImageLimits
from handlers.images.loader import ImageLoader
from handlers.protocols.openai.messages import read_messages
from handlers.request import EmbeddingsPart, LoadedEmbeddings
from tests.support.live import LiveServer
from tests.support.saved_tensors import part

WANTED = EmbeddingsWanted(hidden_size=16, most_tokens=64, dtype="float32")


def messages(*parts: dict[str, Any]) -> list[Any]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]


def loaded(*parts: dict[str, Any], wanted: EmbeddingsWanted = WANTED, **limits: Any) -> list[LoadedEmbeddings]:
    """The way of a request's parts to a backend."""

    async def load() -> list[LoadedEmbeddings]:
        (turn,) = read_messages(messages(*parts), embeddings=True)
        read = [item for item in turn.parts if isinstance(item, EmbeddingsPart)]
        assert len(read) == len(parts)
        loader = ImageLoader(ImageLimits(**limits))
        try:
            await loader.load(read)
            found = wanted.checked(read)
            assert loader.memory.used == sum(one.rows.nbytes for one in found)
            for item in read:
                item.release()
            assert loader.memory.used == 0
            return found
        finally:
            await loader.aclose()

    return asyncio.run(load())


class Shell:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('the pickle was run')",)


WHAT = "What is this an image of?"


def body(*things: Any, text: str = WHAT, **fields: Any) -> dict[str, Any]:
    content = [part(thing) for thing in things] + [{"type": "text", "text": text}]
    return {
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 32,
        **fields,
    }


def post(server: LiveServer, asked: dict[str, Any], route: str = "/v1/chat/completions") -> httpx.Response:
    return server.http.post(route, json=asked)


def answer(server: LiveServer, asked: dict[str, Any]) -> str:
    reply = post(server, asked)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])
