"""The embedded engine behind the backend seam: prompts in, deltas out, and what it refuses."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from engine.errors import EngineStopped
from handlers.backends.rolling.engine import RollingStream
from handlers.errors import InvalidRequest, ServingError, Unavailable
from handlers.request import (
    GenerationRequest,
    RequestSampling,
    TextPart,
    TextPrompt,
)
from tests.support.live import children_running
from tests.support.models import CHAT_TEMPLATE, make_llava
from tests.support.rolling import answer, loaded, request, tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("models") / "tiny")


def test_what_it_answers_and_what_it_refuses(model: Path) -> None:
    async def scenario() -> None:
        async with loaded(model) as backend:
            assert backend.health().ready
            asked = request("look ", 1, " there")
            plain = await answer(backend, asked)
            assert len(tokens(plain)) == 12
            assert plain[-1].finish_reason == "length"
            (image,) = asked.images()
            assert image.loaded is None, "the decoded image is let go of once it is prepared"

            several = await answer(backend, request("look ", 1, " there", n=3))
            assert [tokens(several, index) for index in range(3)] == [tokens(plain)] * 3

            seeded = {"temperature": 1.0, "seed": 7}
            first = await answer(backend, request("draw", sampling=seeded, n=2))
            again = await answer(backend, request("draw", sampling={**seeded, "seed": 8}))
            assert tokens(first, 0) != tokens(first, 1)
            assert tokens(first, 1) == tokens(again), "the second answer's seed is the next number"

            generation = await backend.generate(request("abc", sampling={"prompt_logprobs": 1, "logprobs": 0}))
            deltas = [delta async for delta in generation]
            assert generation.stats.prompt_logprobs is not None
            assert len(generation.stats.prompt_logprobs) == generation.stats.prompt_tokens
            assert generation.stats.prompt_logprobs[0] is None
            assert deltas[0].logprobs is not None
            assert deltas[0].logprobs[0].chosen.token_id == deltas[0].token_ids[0]

            nothing = TextPrompt([TextPart("")], add_special_tokens=False)
            for refused, message in (
                (request("x" * 600), "512 tokens"),
                (request("x", sampling={"max_tokens": 600}), "ask for at most"),
                (request("x", sampling={"max_tokens": None, "min_tokens": 512}), "room for 507 tokens"),
                (request("x", sampling={"logit_bias": {10**6: 1.0}}), "not in the vocabulary"),
                (request("x", sampling={"stop_token_ids": (2**31,)}), "not in the vocabulary"),
                (request("x", sampling={"stop_token_ids": tuple(range(200)) * 6}), "allowed: 1024"),
                (
                    GenerationRequest("id", nothing, RequestSampling()),
                    "empty",
                ),
            ):
                with pytest.raises(InvalidRequest, match=message):
                    await backend.generate(refused)
            shortened = request("x" * 500, sampling={"max_tokens": 30}, max_tokens_is_default=True)
            assert (await answer(backend, shortened))[-1].finish_reason == "length"

            stopped = await backend.generate(request("abc", sampling={"max_tokens": 400}))
            async for _ in stopped:
                break
            await stopped.aclose()
            await stopped.aclose()
            assert len(tokens(await answer(backend, request("look ", 1, " there")))) == 12
            assert backend.stats().encoder_cache_hits >= 1

    asyncio.run(scenario())


def test_a_request_whose_engine_was_stopped_is_to_be_sent_again() -> None:
    class Stopped:
        ids = ("a",)

        async def get(self) -> Any:
            raise EngineStopped

    async def read() -> None:
        outputs: Any = Stopped()
        async for _ in RollingStream(outputs, ()):
            pass

    with pytest.raises(Unavailable, match="the server is stopping; send the request again"):
        asyncio.run(read())


def test_the_placeholder_can_be_another_token_than_the_processors(model: Path) -> None:
    async def scenario() -> None:
        async with loaded(model) as backend:
            want = tokens(await answer(backend, request("look ", 1)))
        template = CHAT_TEMPLATE.replace("<image>", "<pad>")
        async with loaded(model, chat_template=template, image_placeholder_token="<pad>") as backend:
            assert tokens(await answer(backend, request("look ", 1))) == want

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_placeholder_token": "two tokens"}, "must be one"),
        ({"chat_template": "missing.jinja"}, "neither a template nor a readable file"),
        ({"chat_template": "{% if %}"}, "error in line 1"),
        ({"max_model_len": 100_000}, "more than the model's own 512 positions"),
        ({"tensor_parallel_degree": 3}, "does not divide"),
    ],
)
def test_what_cannot_be_loaded_is_said_plainly(model: Path, settings: dict[str, Any], message: str) -> None:
    async def scenario() -> None:
        async with loaded(model, **settings):
            pytest.fail("it was loaded")

    with pytest.raises(ServingError, match=message):
        asyncio.run(scenario())
    assert not children_running(os.getpid(), "engine.process")


def test_images_that_fill_the_context_are_told_at_the_start(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def start() -> None:
        async with loaded(model, limit_mm_per_prompt={"image": 40}):
            pass

    with caplog.at_level("WARNING", "handlers.backends.rolling.engine"):
        asyncio.run(start())
    assert "40 images (option.limit_mm_per_prompt) take 640 tokens" in caplog.text
