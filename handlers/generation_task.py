"""A request while its answers are generated: its images, its deadline, and its counts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from handlers.admission import Permit
from handlers.deltas import Delta, PromptStats, total
from handlers.errors import DeadlineExceeded, EngineFailed, ImagesLost, InvalidRequest, ServingError, stopping
from handlers.images.loader import ImageLoader
from handlers.pipeline import Generation, Pipeline
from handlers.protocols.base import Answer, Answered, ErrorFormat, Task
from handlers.protocols.errors import client_error, error_reply, log_error, own_words_of
from handlers.request import MediaPart, Observer, Reply, RequestFacts

log = logging.getLogger(__name__)

T = TypeVar("T")

_TRIES = 3
"""How often a request is handed to an engine that has lost its images."""

_MOST_MERGED = 256
"""The most deltas of several prompts that may wait to be written."""


class GenerationTask:
    """Holds the permit, the images and the generations of one task, and gives them back once, in `close`.

    It fills in the facts, and notifies the observer, as the task proceeds.

    Call `answers` or, for a stream, `deltas`, and only once. Its maker must `close` it, also after an error or a
    cancellation.
    """

    def __init__(
        self,
        task: Task,
        permit: Permit,
        pipeline: Pipeline,
        images: ImageLoader,
        facts: RequestFacts,
        observer: Observer,
        deadline: float,
        keep: Callable[[int], None],
    ) -> None:
        """Take over an admitted task. deadline: in `time.monotonic()` seconds. keep: see `Incoming`."""
        self.task = task
        self.facts = facts
        self._pipeline = pipeline
        self._images = images
        self._permit = permit
        self._observer = observer
        self._deadline = deadline
        self._keep = keep
        self._media = [list(request.images()) for request in task.requests]
        facts.images = sum(map(len, self._media))
        self._generations: dict[int, Generation] = {}
        self._running: list[Generation] = []
        self._forwarding: list[asyncio.Task[None]] = []
        self._closed = False
        self._limit = asyncio.timeout(None)
        facts.max_tokens = sum(request.n * (request.sampling.max_tokens or 0) for request in task.requests)
        observer.on_admitted(facts)

    @property
    def stats(self) -> PromptStats:
        """The counts of all prompts together."""
        return total([generation.stats for generation in self._generations.values()])

    def stats_of(self, index: int) -> PromptStats:
        """Return the counts of the prompt to which the delta with this index belongs."""
        return self._generations[index // self.task.requests[0].n].stats

    def time_limit(self) -> asyncio.Timeout:
        """Return the rest of the request's time, for `async with`; `failure` recognises when it has expired."""
        self._limit = asyncio.timeout(max(0.0, self._deadline - time.monotonic()))
        return self._limit

    def failure(self, error: Exception | asyncio.CancelledError) -> ServingError:
        """Return the error that the client gets for an exception of this task, and note it in the facts."""
        if isinstance(error, TimeoutError) and self._limit.expired():
            known: ServingError = DeadlineExceeded()
            known.__cause__ = error
        else:
            known = client_error(error, self.facts.request_id)
        self.facts.error, self.facts.reason = known.kind, own_words_of(known)
        return known

    async def answers(self) -> list[Answered]:
        """Return the complete answers to all prompts.

        The prompts are generated together; the first failure ends all of them.
        """
        requests = self.task.requests
        if len(requests) == 1:
            return [await self._answer(0)]
        return await _together(self._answer(number) for number in range(len(requests)))

    async def deltas(self) -> AsyncIterator[Delta]:
        """Yield the deltas of a stream. Answer i of prompt p has the index p * n + i.

        All prompts are given to the engine before the first delta arrives, so a mistake in any of them is raised first.
        """
        count = len(self.task.requests)
        if count == 1:
            await self._generate(0)
            async for delta in self._checked(0):
                yield delta
            return
        await _together(self._generate(number) for number in range(count))
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
            if cancels_this(error):
                raise
            await merged.put(error if isinstance(error, Exception) else stopping(error))
        else:
            await merged.put(None)

    async def _checked(self, number: int) -> AsyncIterator[Delta]:
        """Yield the deltas of a prompt that is being generated, and count them. Raises ServingError."""
        unfinished = self.task.requests[number].n
        last = [0.0] * unfinished
        async for delta in self._generations[number]:
            self._count(delta, last)
            unfinished -= delta.finish_reason is not None
            yield delta
        if unfinished:
            raise EngineFailed("the engine ended the answer too early")

    async def stop(self) -> None:
        """Abort what is still running and release the images; the permit is kept. Safe to call twice."""
        for parts in self._media:
            _release(parts)
        for task in self._forwarding:
            task.cancel()
        cancelled: asyncio.CancelledError | None = None
        while self._running:
            generation = self._running.pop()
            try:
                await generation.aclose()
            except asyncio.CancelledError as error:
                if cancels_this(error):
                    cancelled = error
            except Exception:
                log.exception("request %s: the engine failed to abort", self.facts.request_id)
        if cancelled is not None:
            raise cancelled

    async def close(self) -> None:
        """Call `stop`, release the permit and complete the facts. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        try:
            await self.stop()
        finally:
            self._permit.release()
            self._complete_facts()
            self._observer.on_finished(self.facts)

    async def _generate(self, number: int) -> Generation:
        """Start the generation of prompt `number`. Its images are loaded, and held until its answer ends at most."""
        request, parts = self.task.requests[number], self._media[number]
        for left in reversed(range(_TRIES)):
            if parts:
                await self._images.load(parts, self._deadline, sum(map(len, self._media[:number])))
            try:
                generation = await self._pipeline.generate(request)
                break
            except ImagesLost:
                if not left:
                    raise
            except InvalidRequest as error:
                error.rename(self.task.names)
                raise
        self._generations[number] = generation
        self.facts.prepared = time.monotonic() - self.facts.arrival
        self._running.append(generation)
        if len(self._generations) == len(self.task.requests):
            self._forget_images()
        return generation

    def _forget_images(self) -> None:
        """Drop what the images were loaded from: no engine will be given them again."""
        for parts in self._media:
            for part in parts:
                part.forget()
        self._keep(self.task.requests[0].text_bytes)

    async def _answer(self, number: int) -> Answered:
        try:
            generation = await self._generate(number)
            answers = [Answer() for _ in range(self.task.requests[number].n)]
            async for delta in self._checked(number):
                answers[delta.index].add(delta)
            return Answered(generation.stats, answers)
        finally:
            _release(self._media[number])

    def _count(self, delta: Delta, last: list[float]) -> None:
        """Count a delta. last: the time of each answer's last token."""
        now = time.monotonic()
        facts = self.facts
        if last[delta.index]:
            self._observer.on_token_gap(now - last[delta.index])
        elif facts.first_token is None:
            facts.first_token = now - facts.arrival
            self._observer.on_first_token(facts.first_token)
        last[delta.index] = now
        facts.completion_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            if delta.finish_reason == "abort":
                raise DeadlineExceeded() if now >= self._deadline else EngineFailed("the engine aborted the request")
            facts.finish_reason = delta.finish_reason

    def _complete_facts(self) -> None:
        facts = self.facts
        facts.total = time.monotonic() - facts.arrival
        for generation in self._generations.values():
            facts.prompt_tokens += generation.stats.prompt_tokens
            facts.image_tokens += generation.stats.image_tokens
            facts.cached_tokens += generation.stats.cached_tokens
            facts.queued = max(facts.queued, generation.stats.queued)
        if facts.finish_reason is None and facts.error is None:
            facts.finish_reason = "abort"


async def _together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Return the results in order. The first failure, or a cancellation, ends all of them before it is raised."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def cancels_this(error: BaseException) -> bool:
    """Whether an exception cancels the current task, rather than something that it awaited."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0


def refusal(
    error: Exception | asyncio.CancelledError, facts: RequestFacts, written: ErrorFormat, observer: Observer
) -> Reply:
    """Return the reply to a request that failed before its reply began; it is logged, counted and noted in its facts.

    Raises:
        CancelledError: The error itself, if it cancels the current task.
    """
    if cancels_this(error):
        raise error
    known = client_error(error, facts.request_id)
    log_error(known, facts.request_id)
    observer.on_error(known.kind)
    reply = error_reply(known, written)
    facts.status, facts.error, facts.reason = reply.status, known.kind, own_words_of(known)
    reply.facts = facts
    return reply


def _release(parts: Sequence[MediaPart]) -> None:
    for part in parts:
        part.release()
