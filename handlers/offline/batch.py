"""Answers many requests at once, and survives an engine that dies under some of them."""

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

_TRIES = 3
"""How often a request is passed to an engine that turns out to be restarting."""


class Batch:
    """Answers many requests, each of which fails alone. Used on the backend's event loop."""

    def __init__(
        self, backend: Pipeline, images: ImageLoader, window: int, restart_seconds: float, poll_seconds: float = 0.2
    ) -> None:
        """Prepare to answer requests.

        Args:
            backend: What generates.
            images: What loads their images.
            window: How many requests are under way, so that the engine always has the next ones and memory is bounded.
            restart_seconds: How long an engine that died may take to come back.
            poll_seconds: The pause between two looks at whether it is back.
        """
        self._backend = backend
        self._images = images
        self._window = window
        self._restart_seconds = restart_seconds
        self._poll_seconds = poll_seconds

    async def run(self, requests: Sequence[GenerationRequest], done: Callable[[int, Outcome], None]) -> None:
        """Answer all, and call `done`, which must not raise, once for each, with its place in the sequence.

        Requests on which an engine failed or died are tried once more, one by one: the one that brought it down fails,
        and those that ran beside it do not. Cancelled, it aborts all.
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
        """Answer the next ones. `again` collects those to try once more; None if this is the last try."""
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
        """Wait until the backend can generate again; False if it will not."""
        end = time.monotonic() + self._restart_seconds
        while not (health := self._backend.health()).ready:
            if health.lost or time.monotonic() > end:
                return False
            await asyncio.sleep(self._poll_seconds)
        return True
