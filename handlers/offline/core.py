"""What an `LLM` runs on: a fetched model, its backend, and the thread with the event loop on which they work."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

from handlers import progress
from handlers.artefacts.fetch import fetch
from handlers.backends.select import backend_of
from handlers.build import build_engine, build_images, build_part, choose_backend
from handlers.errors import EngineFailed, InvalidConfiguration, InvalidRequest, ServingError, Unavailable
from handlers.images.loader import ImageLoader
from handlers.offline.images import ImageTokens
from handlers.offline.options import check_names, warn_of_names
from handlers.pipeline import Pipeline
from handlers.protocols.base import Answer, Answered
from handlers.protocols.errors import client_error
from handlers.request import EmbeddingsPart, GenerationRequest, MediaPart, TextPrompt
from properties.configuration import Configuration

logger = logging.getLogger(__name__)

T = TypeVar("T")
Outcome = Answered | ServingError

_AHEAD = 64
"""How many requests are fetched, prepared and queued beyond those that generate."""

_CLOSE_SECONDS = 10.0
POLL_SECONDS = 0.2
_TRIES = 3
"""How often a request is passed to an engine that turns out to be restarting."""


class Core:
    """Loads a model and answers requests. It never refers to the `LLM`, whose end must close it."""

    def __init__(self, configuration: Configuration) -> None:
        cancelled = threading.Event()
        try:
            self.directory = fetch(configuration.model_location, configuration.settings, cancelled)
        finally:
            cancelled.set()
        progress.current().begin("")
        known = {problem.message for problem in configuration.warnings}
        self.configuration = configuration = configuration.with_model_directory(self.directory)
        for problem in configuration.warnings:
            if problem.message not in known:
                logger.warning("%s", problem)
        settings = configuration.settings
        choice = choose_backend(configuration, self.directory)
        if not backend_of(choice.backend).takes_engine_arguments:
            check_names(configuration)
            warn_of_names(configuration)
        if build_part(configuration, self.directory, choice) is not None:
            raise InvalidConfiguration(
                "node_rank: a script generates on the first machine only; on the others, which hold parts of the "
                "model, run lmi serve with the same options"
            )
        engine = build_engine(configuration, self.directory, choice)
        self._close_backend = engine.close
        self._images: ImageLoader | None = None
        self._loop = LoopThread()
        try:
            with _script_not_run_again():
                self._loop.run(engine.load())
            self.backend = Pipeline(engine, settings.guided_decoding_timeout)
            self._close_backend = self.backend.close
            self._images = build_images(settings)
        except BaseException:
            self.close()
            raise
        self._max_images = settings.limit_mm_per_prompt.get("image", 1)
        window = settings.max_rolling_batch_size + min(_AHEAD, settings.max_rolling_batch_size)
        self._batch = Batch(self.backend, self._images, window, settings.model_loading_timeout)

    def check(self, request: GenerationRequest) -> None:
        """Raises InvalidRequest if the model cannot answer such a request."""
        capabilities = self.backend.capabilities
        if request.constraint is not None and not capabilities.structured_outputs:
            raise InvalidRequest("answers cannot be constrained here: leave structured_outputs out")
        images = list(request.images())
        if any(isinstance(part, EmbeddingsPart) for part in images) and not capabilities.embeddings:
            raise InvalidRequest("embeddings are taken only after LLM(..., enable_mm_embeds=True)")
        if images and not capabilities.images:
            raise InvalidRequest("this model does not take images")
        if len(images) > self._max_images:
            raise InvalidRequest(
                f"the prompt has {len(images)} images; limit_mm_per_prompt allows {self._max_images}"
            )

    def image_tokens(self, part: MediaPart) -> ImageTokens:
        """Return the tokens that an image becomes in a prompt. Raises ImageError."""
        return self._loop.run(self._image_tokens(part))

    async def _image_tokens(self, part: MediaPart) -> ImageTokens:
        assert self._images is not None
        try:
            await self._images.load([part])
            prompt = await self.backend.tokenize(TextPrompt([part], add_special_tokens=False))
        finally:
            part.release()
        ((token_id, count),) = Counter(prompt.token_ids).most_common(1)
        return ImageTokens(token_id, count)

    def outcomes(self, requests: Sequence[GenerationRequest]) -> Generator[tuple[int, Outcome], None, None]:
        """Yield (number, outcome) of each request when it is done. Closed early, it aborts the others."""
        if not self._loop.usable:
            raise RuntimeError("this LLM is closed, or belongs to the process that was forked")
        ready: queue.SimpleQueue[tuple[int, Outcome] | Future[None]] = queue.SimpleQueue()
        work = self._loop.start(
            self._batch.run(requests, lambda number, outcome: ready.put((number, outcome)))
        )
        work.add_done_callback(ready.put)
        try:
            while not isinstance(item := ready.get(), Future):
                yield item
            item.result()
        finally:
            work.cancel()

    def close(self) -> None:
        """End the backend and the thread. The garbage collector may call it in any thread."""
        if not self._loop.usable:
            return
        if self._loop.inside:
            threading.Thread(target=self.close, name="offline-close").start()
            return
        closing = self._loop.start(self._close())
        try:
            closing.result(_CLOSE_SECONDS)
        except TimeoutError:
            logger.warning("the engine did not end within %.0f s", _CLOSE_SECONDS)
        self._loop.stop()

    async def _close(self) -> None:
        if self._images is not None:
            await self._images.aclose()
        await self._close_backend()


class Batch:
    """Answers many requests, each of which fails alone. Used on the backend's event loop.

    window: how many requests are under way, so that the engine always has the next ones and memory is bounded.
    restart_seconds: how long an engine that died may take to come back.
    """

    def __init__(self, backend: Pipeline, images: ImageLoader, window: int, restart_seconds: float) -> None:
        self._backend = backend
        self._images = images
        self._window = window
        self._restart_seconds = restart_seconds

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
            await asyncio.sleep(POLL_SECONDS)
        return True


class LoopThread:
    """An event loop in its own thread, so that scripts, threads and notebooks can wait for what runs on it.

    Nothing of it survives a fork.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, daemon=True, name="offline")
        self._thread.start()

    @property
    def usable(self) -> bool:
        """Whether the thread can run something: not in a forked child, and not after `stop`."""
        return os.getpid() == self._pid and self._thread.is_alive()

    @property
    def inside(self) -> bool:
        """Whether the caller is the loop's own thread, which must not wait for itself."""
        return threading.current_thread() is self._thread

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for the work; if the wait is interrupted, the work is cancelled."""
        future = self.start(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """End the thread, and cancel what still runs on it."""
        if self.usable:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        finally:
            self._loop.close()


@contextmanager
def _script_not_run_again() -> Iterator[None]:
    """Keep processes that multiprocessing spawns meanwhile, as vLLM does, from running the user's script once more.

    They need nothing from it; otherwise it would need `if __name__ == "__main__":`.
    """
    main = sys.modules["__main__"]
    hidden: dict[str, Any] = {
        name: main.__dict__.pop(name) for name in ("__file__", "__spec__") if name in main.__dict__
    }
    main.__spec__ = None
    try:
        yield
    finally:
        main.__dict__.update(hidden)
