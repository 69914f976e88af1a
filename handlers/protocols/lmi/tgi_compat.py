"""LMI's `option.tgi_compat`: the LMI body, answered as Text Generation Inference answers on managed endpoints."""

from __future__ import annotations

import secrets

import msgspec

from handlers.backends.base import Delta, PromptStats
from handlers.errors import ServingError
from handlers.protocols.base import Answered, Conventions
from handlers.protocols.lmi.parameters import Parameters
from handlers.protocols.tgi.reply import TgiWriter
from handlers.request import GenerationRequest

_DRAWN_BITS = 53
"""Of a seed that the client did not choose: what a JavaScript number holds, as the reply tells it."""


class LmiTgiWriter:
    """A list with TGI's object for each prompt; the stream of a single one."""

    def __init__(self, writers: list[TgiWriter]) -> None:
        """writers: one for each prompt."""
        self._writers = writers
        self.stream_type = writers[0].stream_type
        self.keep_alive = writers[0].keep_alive

    def whole(self, answered: list[Answered]) -> bytes:
        replies = [writer.whole([one]) for writer, one in zip(self._writers, answered, strict=True)]
        return b"[" + b",".join(replies) + b"]"

    def chunk(self, delta: Delta, stats: PromptStats) -> bytes:
        return self._writers[0].chunk(delta, stats)

    def end(self, stats: PromptStats) -> bytes:
        return self._writers[0].end(stats)

    def failed(self, error: ServingError) -> bytes:
        return self._writers[0].failed(error)


def tgi_writer(
    prompts: list[str], requests: list[GenerationRequest], parameters: Parameters, conventions: Conventions
) -> LmiTgiWriter:
    """The writer of a task; a request that draws without a seed gets one, because the reply tells it."""
    writers = []
    for prompt, request in zip(prompts, requests, strict=True):
        seeds: list[int | None] = [None] * request.n
        if not request.sampling.greedy:
            first = request.sampling.seed
            if first is None:
                first = secrets.randbits(_DRAWN_BITS)
                request.sampling = msgspec.structs.replace(request.sampling, seed=first)
            seeds = [first + number for number in range(request.n)]
        writers.append(
            TgiWriter(
                prompt,
                details=bool(parameters.details),
                prefill=request.sampling.prompt_logprobs is not None,
                full_text=bool(parameters.return_full_text),
                top_tokens=parameters.top_tokens,
                seeds=seeds,
                special_token_ids=conventions.special_token_ids,
            )
        )
    return LmiTgiWriter(writers)
