"""Our own requests to vLLM's engine, to one that refuses what vLLM refuses; no vLLM is needed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from handlers.backends.vllm.probes import Counters, ask, stat_logger, warm


class ClientError(Exception):
    pass


class EngineGenerateError(Exception):
    pass


def _sampling(**fields: Any) -> SimpleNamespace:
    plain = {"temperature": 1.0, "top_k": 0, "logprobs": None, "prompt_logprobs": None}
    return SimpleNamespace(**(plain | fields))


VLLM: Any = SimpleNamespace(
    EngineDeadError=type("EngineDeadError", (Exception,), {}),
    EngineGenerateError=EngineGenerateError,
    VLLMClientError=ClientError,
    GracefulHTTPError=(),
    refusals=(ClientError, ValueError),
    SamplingParams=_sampling,
)


class Engine:
    """Refuses what vLLM refuses with these options; `served` are the parameters of what it does not refuse."""

    def __init__(
        self,
        max_logprobs: int = 20,
        return_sampling_mask: bool = False,
        kv_sharing_fast_prefill: bool = False,
        max_model_len: int = 100,
        fails: bool = False,
    ) -> None:
        self.errored = False
        self.model_config = SimpleNamespace(max_logprobs=max_logprobs, return_sampling_mask=return_sampling_mask)
        self.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(data_parallel_size=1),
            cache_config=SimpleNamespace(kv_sharing_fast_prefill=kv_sharing_fast_prefill),
        )
        self.max_model_len = max_model_len
        self.fails = fails
        self.served: list[SimpleNamespace] = []

    async def generate(
        self, prompt: dict[str, Any], params: Any, request_id: str, **_: Any
    ) -> AsyncGenerator[None, None]:
        if self.fails:
            raise EngineGenerateError from RuntimeError()
        most = self.model_config.max_logprobs
        if most >= 0 and max(params.logprobs or 0, params.prompt_logprobs or 0) > most:
            raise ClientError("greater than max allowed")
        if self.vllm_config.cache_config.kv_sharing_fast_prefill and params.prompt_logprobs:
            raise ClientError("incorrect logprobs for prompt tokens")
        if self.model_config.return_sampling_mask and (params.temperature <= 0 or params.top_k <= 0):
            raise EngineGenerateError from ValueError("sampling distribution replay requires top_k > 0")
        if len(prompt["prompt_token_ids"]) + params.max_tokens > self.max_model_len:
            raise ClientError("the prompt is too long")
        self.served.append(params)
        yield


@pytest.mark.parametrize(
    ("options", "logprobs", "prompt_logprobs"),
    [
        ({}, 1, 1),
        ({"max_logprobs": -1}, 1, 1),
        ({"max_logprobs": 0}, 0, 0),
        ({"kv_sharing_fast_prefill": True}, 1, None),
        ({"return_sampling_mask": True}, 1, 1),
    ],
)
def test_nothing_is_asked_for_that_an_option_forbids(
    options: dict[str, Any], logprobs: int, prompt_logprobs: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(**options)
    with caplog.at_level(logging.WARNING):
        asyncio.run(warm(VLLM, engine, 0))
    assert not caplog.messages
    (warmed,) = engine.served
    assert (warmed.logprobs, warmed.prompt_logprobs) == (logprobs, prompt_logprobs)
    asyncio.run(ask(VLLM, engine, 0))
    assert len(engine.served) == 2


def test_a_refused_warm_up_is_logged_and_the_engine_asked_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = Engine(max_model_len=2)
    with caplog.at_level(logging.WARNING):
        asyncio.run(warm(VLLM, engine, 0))
    assert "the prompt is too long" in caplog.text
    assert len(engine.served) == 1


def test_an_engine_that_fails_on_its_warm_up_does_not_serve() -> None:
    with pytest.raises(EngineGenerateError):
        asyncio.run(warm(VLLM, Engine(fails=True), 0))


def test_statistics_that_are_not_understood_are_logged_once_and_the_next_count(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """vLLM's output handler calls `record`: an exception there would end all requests."""
    counters = Counters()
    vllm: Any = SimpleNamespace(StatLoggerBase=object)
    recorder = stat_logger(vllm, counters)(None, 0)
    prefix = SimpleNamespace(queries=10, hits=4)
    whole = SimpleNamespace(kv_cache_usage=0.5, prefix_cache_stats=prefix)
    with caplog.at_level(logging.WARNING):
        for scheduler in (SimpleNamespace(kv_cache_usage=0.25), SimpleNamespace(), whole):
            recorder.record(
                scheduler_stats=scheduler,
                iteration_stats=SimpleNamespace(num_preempted_reqs=1),
                mm_cache_stats=None,
                engine_idx=1,
                of_a_later_version=True,
            )
    (line,) = caplog.messages
    assert "prefix_cache_stats" in line
    assert (counters.prefix_queries, counters.prefix_hits) == (10, 4)
    assert (counters.preemptions, counters.cache_usage, list(counters.signs)) == (1, {1: 0.5}, [1])
