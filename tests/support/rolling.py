"""The embedded engine behind its backend, asked as a protocol asks it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from handlers.backends.rolling.engine import RollingEngine
from handlers.deltas import Delta
from handlers.pipeline import Pipeline
from handlers.request import (
    ChatPrompt,
    GenerationRequest,
    ImagePart,
    LoadedImage,
    Message,
    RequestSampling,
    TextPart,
)
from properties.settings import Settings
from tests.support.engine_driver import CAPITALS, random_image


@asynccontextmanager
async def loaded(model: Path, **settings: Any) -> AsyncIterator[Pipeline]:
    configuration: Any = SimpleNamespace(settings=Settings(**{"dtype": "float32", **settings}))
    backend = Pipeline(await RollingEngine.start(configuration, model), 20.0)
    try:
        yield backend
    finally:
        await backend.close()


def request(*content: str | int, sampling: dict[str, Any] | None = None, **fields: Any) -> GenerationRequest:
    """A chat turn: strings are text, numbers are images by seed."""
    parts = [
        TextPart(item)
        if isinstance(item, str)
        else ImagePart("data:", loaded=LoadedImage(random_image(item), item.to_bytes(4, "little")))
        for item in content
    ]
    params = RequestSampling(**{"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, **(sampling or {})})
    return GenerationRequest("id", ChatPrompt([Message("user", parts)]), params, **fields)


async def answer(backend: Pipeline, asked: GenerationRequest) -> list[Delta]:
    return [delta async for delta in await backend.generate(asked)]


async def check_stop_string(backend: Pipeline, make: Callable[..., GenerationRequest], *content: object) -> None:
    """Stops an answer to the content at the third character of what it is otherwise: capital letters."""
    letters: dict[str, Any] = {"allowed_token_ids": CAPITALS}
    whole = "".join(delta.text for delta in await answer(backend, make(*content, sampling=letters)))
    stop = whole[2]
    stopped = await answer(backend, make(*content, sampling={**letters, "stop": (stop,)}))
    assert "".join(delta.text for delta in stopped) == whole[: whole.index(stop)]
    assert stopped[-1].finish_reason == "stop"
    assert stopped[-1].stop_reason == stop


def tokens(deltas: list[Delta], index: int = 0) -> list[int]:
    return [token for delta in deltas if delta.index == index for token in delta.token_ids]
