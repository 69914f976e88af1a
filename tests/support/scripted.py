"""A backend that says what a test tells it to say, for the ways of a request around any engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any

from handlers.backends.adapters import AdapterStore
from handlers.backends.base import BackendStats, Capabilities, Health
from handlers.deltas import Delta, PositionLogprobs, PromptStats, TokenizedPrompt, TokenLogprob
from handlers.errors import InvalidRequest
from handlers.request import (
    GenerationRequest,
    ImagePart,
    Incoming,
    Prompt,
    Reply,
    RequestFacts,
    TextPart,
    prompt_parts,
)
from handlers.service import Service
from properties.settings import Settings

Step = Delta | float | Callable[[], Awaitable[object]] | BaseException
"""A delta to give, seconds or something else to wait for, or an error to raise."""


def token(token_id: int, text: str, logprob: float = -0.5, rank: int = 1) -> TokenLogprob:
    return TokenLogprob(token_id, text, logprob, rank)


def said(*texts: str, index: int = 0, reason: str = "stop", pause: float | None = None, **last: Any) -> list[Step]:
    """A delta for each text, the last one with a finish reason."""
    steps: list[Step] = []
    for i, text in enumerate(texts):
        if pause is not None:
            steps.append(pause)
        chosen = token(i + 10, text)
        logprobs = [PositionLogprobs(chosen, (chosen, token(99, "other", -2.0, 2)))]
        steps.append(Delta(index, [i + 10], text, logprobs))
    final = steps[-1]
    assert isinstance(final, Delta)
    final.finish_reason = reason  # type: ignore[assignment]
    for name, value in last.items():
        setattr(final, name, value)
    return steps


class ScriptedGeneration:
    def __init__(self, backend: ScriptedBackend, steps: Iterable[Step], stats: PromptStats) -> None:
        self.stats = stats
        self._backend = backend
        self._steps = iter(steps)
        self.closed = False
        backend.running += 1

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        for step in self._steps:
            if isinstance(step, Delta):
                return step
            if isinstance(step, BaseException):
                raise step
            await (step() if callable(step) else asyncio.sleep(step))
        raise StopAsyncIteration

    async def aclose(self) -> None:
        if not self.closed:
            self.closed = True
            self._backend.running -= 1


class ScriptedBackend:
    """script: the steps of the answer to a request. running: generations that nobody has closed."""

    def __init__(
        self,
        script: Callable[[GenerationRequest], Sequence[Step]] | Sequence[Step],
        *,
        stats: Callable[[], PromptStats] = lambda: PromptStats(7, 4, 2),
        images: bool = True,
        **capabilities: Any,
    ) -> None:
        self._script = script if callable(script) else lambda _: script
        self._stats = stats
        self.adapters: AdapterStore | None = None
        self.capabilities = Capabilities(max_model_len=64, images=images, **capabilities)
        self.running = 0
        self.requests: list[GenerationRequest] = []

    async def load(self) -> None:
        pass

    async def generate(self, request: GenerationRequest) -> ScriptedGeneration:
        self.requests.append(request)
        return ScriptedGeneration(self, self._script(request), self._stats())

    async def tokenize(self, prompt: Prompt) -> TokenizedPrompt:
        """A token is a character, an image is two of them."""
        text = "".join(part.text if isinstance(part, TextPart) else "##" for part in prompt_parts(prompt))
        spans = [(0, 0), *((number, number + 1) for number in range(len(text)))]
        return TokenizedPrompt(text, [1, *map(ord, text)], ["<s>", *text], spans)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        if max(token_ids, default=0) > 0xD7FF:
            raise InvalidRequest("tokens holds an id that is not in the vocabulary", param="tokens")
        return "".join(map(chr, token_ids))

    def health(self) -> Health:
        return Health(True, "ready")

    def stats(self) -> BackendStats:
        return BackendStats()

    async def close(self) -> None:
        pass


class ScriptedImages:
    """Loads nothing, and takes its time."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.asked = False
        self.loaded: list[str] = []
        self.cancelled = False

    async def load(self, parts: Sequence[ImagePart], deadline: float | None = None, first_index: int = 0) -> None:
        self.asked = True
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        self.loaded += [part.url for part in parts]


class Watched:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.admitted = 0
        self.first_tokens: list[float] = []
        self.gaps: list[float] = []
        self.finished: list[RequestFacts] = []
        self.errors: list[str] = []

    def on_admitted(self, facts: RequestFacts) -> None:
        self.admitted += 1

    def on_first_token(self, seconds: float) -> None:
        self.first_tokens.append(seconds)

    def on_token_gap(self, seconds: float) -> None:
        self.gaps.append(seconds)

    def on_finished(self, facts: RequestFacts) -> None:
        self.finished.append(facts)

    def on_error(self, kind: str) -> None:
        self.errors.append(kind)


def service(backend: ScriptedBackend, images: ScriptedImages | None = None, **options: Any) -> Service:
    own = {name: options.pop(name) for name in ("observer", "formats", "gates", "keep_alive") if name in options}
    settings = Settings(**options)
    return Service(backend, images or ScriptedImages(), settings, model_name="shapes", **own)  # type: ignore[arg-type]


def incoming(body: Any, route: str = "/v1/chat/completions", **headers: str) -> Incoming:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Incoming(route, data, {"content-type": "application/json", **named}, "req-1")


def chat(text: Any = "hi", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **fields}


async def everything(reply: Reply) -> bytes:
    if reply.chunks is None:
        return reply.body
    return b"".join([chunk async for chunk in reply.chunks])
