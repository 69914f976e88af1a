"""What becomes of requests that vLLM refuses, fails on or loses the images of: with its own errors and outputs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vllm.config import ModelConfig
from vllm.exceptions import MaxQueuedTokensError, QueueOverflowError, VLLMValidationError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.engine.exceptions import EngineGenerateError

from handlers.backends.base import EngineRequest
from handlers.backends.vllm.compat import load
from handlers.backends.vllm.outputs import VllmStream, failed
from handlers.backends.vllm.prompts import place_images
from handlers.errors import (
    EngineFailed,
    ImageError,
    ImagesLost,
    InvalidRequest,
    Overloaded,
    ServingError,
    Unavailable,
)
from handlers.request import Constraint, ImagePart, RequestSampling
from tests.support.shapes import SHAPES

VLLM = load()


def refusal() -> VLLMValidationError:
    return VLLMValidationError("inside: too many", parameter="top_k", value=3)


def wrapped(cause: Exception) -> EngineGenerateError:
    """As vLLM hands on what it did not expect."""
    error = EngineGenerateError()
    error.__cause__ = cause
    return error


REFUSALS = [refusal(), QueueOverflowError(), MaxQueuedTokensError(), wrapped(ValueError("inside: too many"))]


def output(index: int, *token_ids: int, reason: str | None = None, last: bool = False) -> RequestOutput:
    completion = CompletionOutput(index, "", list(token_ids), None, None, finish_reason=reason)
    return RequestOutput("r", None, [1, 2], None, [completion], finished=last)


class Outputs:
    """Scripted ones, of which some are exceptions; `aborted` once nobody wants more."""

    def __init__(self, *told: RequestOutput | Exception) -> None:
        self._told = told
        self.aborted = False

    async def given(self) -> AsyncGenerator[RequestOutput, None]:
        try:
            for one in self._told:
                if isinstance(one, Exception):
                    raise one
                yield one
        except GeneratorExit:
            self.aborted = True
            raise


def stream(
    outputs: Outputs,
    *,
    n: int = 1,
    images: bool = True,
    constrained: bool = False,
    failure: Callable[[Exception, bool], ServingError] | None = None,
) -> VllmStream:
    constraint = Constraint("json_object") if constrained else None
    serving = SimpleNamespace(errored=False)
    return VllmStream(
        outputs.given(),
        EngineRequest("r", RequestSampling(temperature=1.0), n, constraint),
        images=images,
        eos_token_ids=[0],
        failure=failure or (lambda error, begun: failed(VLLM, serving, error, begun=begun)),
        ended=lambda stream: None,
    )


async def whole(made: VllmStream) -> int:
    await made.start()
    return sum([len(output.token_ids) async for output in made])


@pytest.mark.parametrize("constrained", [False, True])
def test_an_image_that_one_of_several_answers_misses_is_lost_for_all(constrained: bool) -> None:
    """vLLM tells each answer's miss by itself, and that the request is finished with the last of them."""

    async def scenario() -> None:
        outputs = Outputs(output(0, reason="error"), output(1, reason="error", last=True))
        made = stream(outputs, n=2, constrained=constrained)
        with pytest.raises(ImagesLost):
            await made.start()
        assert outputs.aborted, "the other answer does not go on"

    asyncio.run(scenario())


def test_a_failure_after_a_token_or_without_images_is_no_lost_image() -> None:
    for told, images in (
        (Outputs(output(0, 5), output(0, reason="error", last=True)), True),
        (Outputs(output(0, 5, reason="error", last=True)), True),
        (Outputs(output(0, reason="error", last=True)), False),
    ):
        with pytest.raises(EngineFailed) as raised:
            asyncio.run(whole(stream(told, images=images)))
        assert type(raised.value) is EngineFailed


@pytest.mark.parametrize("error", REFUSALS)
def test_what_vllm_raises_after_an_output_is_no_refusal(error: Exception) -> None:
    with pytest.raises(ServingError) as first:
        asyncio.run(whole(stream(Outputs(error))))
    assert isinstance(first.value, InvalidRequest | Overloaded)
    assert "value=" not in first.value.message
    if isinstance(error, VLLMValidationError):
        assert (first.value.param, first.value.message) == (
            "top_k",
            "the engine refuses this request: inside: too many",
        )
    with pytest.raises(EngineFailed) as later:
        asyncio.run(whole(stream(Outputs(output(0, 5), error))))
    assert "inside" not in later.value.message


@pytest.mark.parametrize("error", REFUSALS)
def test_a_failure_of_vllms_own_loop_is_not_the_requests_fault(error: Exception) -> None:
    """It is handed to all requests as it is, those that wait for their first output included."""
    for errored in (False, True):
        engine = SimpleNamespace(errored=errored)

        def failure(error: Exception, begun: bool, engine: Any = engine) -> ServingError:
            return failed(VLLM, engine, error, begun=begun)

        with pytest.raises(ServingError) as raised:
            asyncio.run(stream(Outputs(error), failure=failure).start())
        assert isinstance(raised.value, EngineFailed if errored else InvalidRequest | Overloaded)
        assert ("too many" in raised.value.message) is isinstance(raised.value, InvalidRequest)


@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("lost", [False, True])
def test_a_renderer_that_was_shut_down_under_a_request_is_not_its_fault(images: int, lost: bool) -> None:
    async def render(prompts: Any, params: Any) -> Any:
        raise RuntimeError("cannot schedule new futures after shutdown")

    engine = SimpleNamespace(
        errored=lost,
        model_config=ModelConfig(model=str(SHAPES)),
        renderer=SimpleNamespace(render_cmpl_async=render),
    )
    parts = [ImagePart("", loaded=cast(Any, SimpleNamespace(digest=b"1", image=None))) for _ in range(images)]
    with pytest.raises(ServingError) as raised:
        asyncio.run(place_images(VLLM, engine, [1], parts))
    expected = Unavailable if lost else ImageError if images else InvalidRequest
    assert type(raised.value) is expected
    assert (raised.value.retry_after == 5) is lost
