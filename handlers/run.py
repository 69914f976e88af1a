"""One admitted task from its first look at the engine to its last delta: deadline, abort, counts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from handlers.admission import Permit
from handlers.backends.base import Delta, PromptStats, total
from handlers.errors import (
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    PicturesLost,
    ServingError,
    Unavailable,
)
from handlers.exchange import Reply, RequestFacts
from handlers.images.loader import ImageLoader
from handlers.observer import Observer
from handlers.own_words import own_words_of
from handlers.pipeline import Generation, Pipeline
from handlers.protocols.base import Answer, Answered, Task
from handlers.protocols.errors import ErrorFormat, client_error, error_reply, log_error
from handlers.request import GenerationRequest, PicturePart

log = logging.getLogger(__name__)

T = TypeVar("T")

_TRIES = 3
"""How often a request is handed to an engine that has lost its pictures."""

_MOST_MERGED = 256
"""Deltas of several prompts that may wait to be written."""


class Run:
    """Holds the permit, the pictures and the generations of one task, and gives them back once, in `close`.

    Either `answers` or (for a stream) `deltas` may be asked for, once. Whoever made a Run must `close` it, also
    after an error or a cancellation.
    """

    def __init__(
        self,
        task: Task,
        permit: Permit,
        images: ImageLoader,
        facts: RequestFacts,
        observer: Observer,
        deadline: float | None,
        keep: Callable[[int], None],
    ) -> None:
        """deadline: `time.monotonic()` seconds. keep: see `Incoming`."""
        self.task = task
        self.facts = facts
        self._images = images
        self._permit = permit
        self._observer = observer
        self._deadline = deadline
        self._keep = keep
        self._arrival = task.requests[0].arrival
        self._pictures = [list(request.images()) for request in task.requests]
        facts.images = sum(map(len, self._pictures))
        self._generations: dict[int, Generation] = {}
        self._running: list[Generation] = []
        self._forwarding: list[asyncio.Task[None]] = []
        self._closed = False
        self._limit = asyncio.timeout(None)
        facts.arrival = self._arrival
        facts.max_tokens = sum(request.n * (request.sampling.max_tokens or 0) for request in task.requests)
        observer.on_admitted(facts)

    @property
    def stats(self) -> PromptStats:
        """Of all prompts together."""
        return total([generation.stats for generation in self._generations.values()])

    def stats_of(self, index: int) -> PromptStats:
        """Of the prompt that a delta of `deltas` answers."""
        return self._generations[index // self.task.requests[0].n].stats

    def time_limit(self) -> asyncio.Timeout:
        """What is left of the request's time, for `async with`; `failure` knows when it has run out."""
        left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        self._limit = asyncio.timeout(left)
        return self._limit

    def failure(self, error: Exception | asyncio.CancelledError) -> ServingError:
        """What the client is told of an exception of this run, which is noted here.

        A CancelledError is one that `is_cancelled` denies.
        """
        if isinstance(error, TimeoutError) and self._limit.expired():
            known: ServingError = DeadlineExceeded("the request's time (option.predict_timeout) is up")
            known.__cause__ = error
        elif isinstance(error, asyncio.CancelledError):
            known = stopping(error)
        else:
            known = client_error(error, self.facts.request_id)
        self.facts.error, self.facts.reason = known.kind, own_words_of(known)
        return known

    async def answers(self, backend: Pipeline) -> list[Answered]:
        """All answers, whole. The prompts generate together; the first that fails ends all."""
        requests = self.task.requests
        if len(requests) == 1:
            return [await self._answer(backend, 0)]
        return await _together(self._answer(backend, number) for number in range(len(requests)))

    async def deltas(self, backend: Pipeline) -> AsyncIterator[Delta]:
        """The deltas of a stream. Answer i of prompt p, of which each has n, has the index p * n + i.

        All prompts are admitted before the first delta comes: what one of them does wrong is raised first.
        """
        count = len(self.task.requests)
        if count == 1:
            await self._generate(backend, 0)
            async for delta in self._checked(0):
                yield delta
            return
        await _together(self._generate(backend, number) for number in range(count))
        merged: asyncio.Queue[Delta | Exception | None] = asyncio.Queue(_MOST_MERGED)
        self._forwarding = [asyncio.create_task(self._forward(number, merged)) for number in range(count)]
        while count:
            item = await merged.get()
            if item is None:
                count -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item

    async def _forward(self, number: int, merged: asyncio.Queue[Delta | Exception | None]) -> None:
        before = number * self.task.requests[0].n
        try:
            async for delta in self._checked(number):
                await merged.put(replace(delta, index=before + delta.index) if before else delta)
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and is_cancelled():
                raise
            await merged.put(error if isinstance(error, Exception) else stopping(error))
        else:
            await merged.put(None)

    async def _checked(self, number: int) -> AsyncIterator[Delta]:
        """The deltas of a prompt that generates, counted."""
        unfinished = self.task.requests[number].n
        last = [0.0] * unfinished
        async for delta in self._generations[number]:
            self._count(delta, last)
            unfinished -= delta.finish_reason is not None
            yield delta
        if unfinished:
            raise EngineFailed("the engine ended the answer too early")

    async def stop(self) -> None:
        """Abort what still runs and let go of the pictures; the places stay taken. Safe to call twice."""
        for parts in self._pictures:
            _release(parts)
        for task in self._forwarding:
            task.cancel()
        cancelled: asyncio.CancelledError | None = None
        while self._running:
            generation = self._running.pop()
            try:
                await generation.aclose()
            except asyncio.CancelledError as error:
                if is_cancelled():
                    cancelled = error
            except Exception:
                log.exception("request %s: the backend failed to abort", self.facts.request_id)
        if cancelled is not None:
            raise cancelled

    async def close(self) -> None:
        """`stop`, free the places, complete the facts. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        try:
            await self.stop()
        finally:
            self._permit.release()
            self._complete_facts()
            self._observer.on_finished(self.facts)

    async def _generate(self, backend: Pipeline, number: int) -> Generation:
        """Of prompt `number`: its pictures are loaded, and held no longer than until its answer ends."""
        request, parts = self.task.requests[number], self._pictures[number]
        for left in reversed(range(_TRIES)):
            if parts:
                await self._images.load(parts, self._deadline, sum(map(len, self._pictures[:number])))
            try:
                generation = await backend.generate(request)
                break
            except PicturesLost:
                if not left:
                    raise
            except InvalidRequest as error:
                error.rename(self.task.names)
                raise
        self._generations[number] = generation
        self.facts.prepared = time.monotonic() - self._arrival
        self._running.append(generation)
        if len(self._generations) == len(self.task.requests):
            self._forget_images()
        return generation

    def _forget_images(self) -> None:
        """Nothing is handed to an engine again from now on: what the images were loaded from is not needed."""
        for parts in self._pictures:
            for part in parts:
                part.forget()
        self._keep(self.task.requests[0].text_bytes)

    async def _answer(self, backend: Pipeline, number: int) -> Answered:
        try:
            return await self._answered(await self._generate(backend, number), self.task.requests[number])
        finally:
            _release(self._pictures[number])

    async def _answered(self, generation: Generation, request: GenerationRequest) -> Answered:
        answers = [Answer() for _ in range(request.n)]
        last = [0.0] * request.n
        async for delta in generation:
            self._count(delta, last)
            answers[delta.index].add(delta)
        if any(answer.finish_reason is None for answer in answers):
            raise EngineFailed("the engine ended the answer too early")
        return Answered(generation.stats, answers)

    def _count(self, delta: Delta, last: list[float]) -> None:
        """last: when each answer of this prompt had its last token."""
        now = time.monotonic()
        facts = self.facts
        if last[delta.index]:
            self._observer.on_token_gap(now - last[delta.index])
        elif facts.first_token is None:
            facts.first_token = now - self._arrival
            self._observer.on_first_token(facts.first_token)
        last[delta.index] = now
        facts.completion_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            if delta.finish_reason == "abort":
                raise self._aborted()
            facts.finish_reason = delta.finish_reason

    def _aborted(self) -> DeadlineExceeded | EngineFailed:
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return DeadlineExceeded("the request's time (option.predict_timeout) is up")
        return EngineFailed("the engine aborted the request")

    def _complete_facts(self) -> None:
        facts = self.facts
        facts.total = time.monotonic() - self._arrival
        for generation in self._generations.values():
            facts.prompt_tokens += generation.stats.prompt_tokens
            facts.image_tokens += generation.stats.image_tokens
            facts.cached_tokens += generation.stats.cached_tokens
            facts.queued = max(facts.queued, generation.stats.queued)
        if facts.finish_reason is None and facts.error is None:
            facts.finish_reason = "abort"


async def _together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results in order. The first failure, and a cancellation, ends all of them before it is raised."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def is_cancelled() -> bool:
    """Whether a CancelledError is about this task, and not about something that it awaited."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def refusal(
    error: Exception | asyncio.CancelledError, facts: RequestFacts, written: ErrorFormat, observer: Observer
) -> Reply:
    """The reply to a request that failed before its reply began; logged, counted and noted in its facts.

    Raises the error itself where it cancels this very task.
    """
    if isinstance(error, asyncio.CancelledError):
        if is_cancelled():
            raise error
        known: ServingError = stopping(error)
    else:
        known = client_error(error, facts.request_id)
    log_error(known, facts.request_id)
    observer.on_error(known.kind)
    reply = error_reply(known, written)
    facts.status, facts.error, facts.reason = reply.status, known.kind, own_words_of(known)
    reply.facts = facts
    return reply


def stopping(error: asyncio.CancelledError) -> Unavailable:
    """What has become of work that was cancelled under a request: only a server that stops does that."""
    known = Unavailable("the server is stopping; send the request again", retry_after=5)
    known.__cause__ = error
    return known


def _release(parts: Sequence[PicturePart]) -> None:
    for part in parts:
        part.release()
