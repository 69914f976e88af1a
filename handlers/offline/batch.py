"""Many requests through one backend: a window of them at a time, each failing alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence

from handlers.errors import EngineFailed, ServingError, Unavailable
from handlers.images.loader import ImageLoader
from handlers.pipeline import Pipeline
from handlers.protocols.base import Answer, Answered
from handlers.protocols.errors import client_error
from handlers.request import GenerationRequest

Outcome = Answered | ServingError

_POLL_SECONDS = 0.2
_TRIES = 3
"""How often a request is handed to an engine that was gone when it came."""


class Batch:
    """Used on the backend's event loop.

    window: requests under way, so that the engine always has the next ones ready and memory is bounded.
    restart_seconds: how long an engine that died may take to come back.
    """

    def __init__(self, backend: Pipeline, images: ImageLoader, window: int, restart_seconds: float) -> None:
        self._backend = backend
        self._images = images
        self._window = window
        self._restart_seconds = restart_seconds

    async def run(self, requests: Sequence[GenerationRequest], done: Callable[[int, Outcome], None]) -> None:
        """`done` is called once for each request, with its place in the sequence; it must not raise.

        Requests that an engine failed on, its own death included, are tried once more, one by one: the one that
        brought it down fails, and those that were beside it do not. Cancelled, it aborts all.
        """
        again: list[int] = []
        numbers = iter(range(len(requests)))
        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._window, len(requests))):
                group.create_task(self._work(numbers, requests, done, again))
        for number in sorted(again):
            await self._work(iter([number]), requests, done, None)

    async def _work(
        self,
        numbers: Iterator[int],
        requests: Sequence[GenerationRequest],
        done: Callable[[int, Outcome], None],
        again: list[int] | None,
    ) -> None:
        """again: where to note what is worth another try; None for a last one."""
        for number in numbers:
            outcome: Outcome
            try:
                outcome = await self._answered(requests[number])
            except EngineFailed as error:
                if again is not None:
                    again.append(number)
                    continue
                outcome = error
            except Exception as error:
                outcome = client_error(error, requests[number].request_id)
            done(number, outcome)

    async def _answered(self, request: GenerationRequest) -> Answered:
        for left in reversed(range(_TRIES)):
            try:
                return await self._answer(request)
            except Unavailable:
                if not left or not await self._comes_back():
                    raise
        raise AssertionError

    async def _answer(self, request: GenerationRequest) -> Answered:
        parts = list(request.images())
        try:
            if parts:
                await self._images.load(parts)
            generation = await self._backend.generate(request)
            try:
                answers = [Answer() for _ in range(request.n)]
                async for delta in generation:
                    answers[delta.index].add(delta)
            finally:
                await generation.aclose()
        finally:
            for part in parts:
                part.release()
        if any(answer.finish_reason in (None, "abort") for answer in answers):
            raise EngineFailed("the engine ended the answer too early")
        return Answered(generation.stats, answers)

    async def _comes_back(self) -> bool:
        """Wait until the backend can generate again; False when it will not."""
        end = time.monotonic() + self._restart_seconds
        while not (health := self._backend.health()).ready:
            if health.lost or time.monotonic() > end:
                return False
            await asyncio.sleep(_POLL_SECONDS)
        return True
