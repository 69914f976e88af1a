"""What an `LLM` runs on: a model that was fetched, its backend, and the thread they live in."""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from pathlib import Path

from handlers.artefacts.fetch import fetch
from handlers.backends.select import backend_of
from handlers.build import build_backend, build_images, build_part, choose_backend
from handlers.errors import InvalidConfiguration, InvalidRequest
from handlers.images.loader import ImageLoader
from handlers.offline.background import LoopThread, script_not_run_again
from handlers.offline.batch import Batch, Outcome
from handlers.offline.multimodal import ImageTokens
from handlers.offline.options import check_names, warn_of_names
from handlers.request import EmbeddingsPart, GenerationRequest, MediaPart, TextPrompt
from properties.configuration import Configuration

logger = logging.getLogger(__name__)

_AHEAD = 64
"""Requests that are fetched, prepared and queued beyond those that generate."""

_CLOSE_SECONDS = 10.0


class Core:
    """Never refers to the `LLM` itself, which it must outlive until it is closed."""

    def __init__(self, configuration: Configuration) -> None:
        cancelled = threading.Event()
        try:
            self.directory = fetch(configuration.model_location, configuration.settings, cancelled)
        finally:
            cancelled.set()
        known = {problem.message for problem in configuration.warnings}
        self.configuration = configuration = configuration.with_model_directory(Path(self.directory))
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
        self.backend = build_backend(configuration, self.directory, choice)
        self._images: ImageLoader | None = None
        self._loop = LoopThread()
        try:
            with script_not_run_again():
                self._loop.run(self.backend.load())
            self._images = build_images(settings)
        except BaseException:
            self.close()
            raise
        self._most = settings.limit_mm_per_prompt.get("image", 1)
        window = settings.max_rolling_batch_size + min(_AHEAD, settings.max_rolling_batch_size)
        self._batch = Batch(self.backend, self._images, window, settings.model_loading_timeout)

    def check(self, request: GenerationRequest) -> None:
        """Raises InvalidRequest for what no backend is asked."""
        if request.constraint is not None and not self.backend.capabilities.structured_outputs:
            raise InvalidRequest("answers cannot be constrained here: leave structured_outputs out")
        embedded = any(isinstance(part, EmbeddingsPart) for part in request.images())
        if embedded and not self.backend.capabilities.embeddings:
            raise InvalidRequest("embeddings are taken only after LLM(..., enable_mm_embeds=True)")
        count = sum(1 for _ in request.images())
        if count and not self.backend.capabilities.images:
            raise InvalidRequest("this model does not take images")
        if count > self._most:
            raise InvalidRequest(f"the prompt holds {count} images; limit_mm_per_prompt allows {self._most}")

    def image_tokens(self, part: MediaPart) -> ImageTokens:
        """What an image becomes in a prompt. Raises ImageError."""
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
        """(number, outcome) of each request as it is done. Closed early, it aborts the others."""
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
        """End the backend and the thread. Called by the garbage collector too, in whatever thread."""
        if not self._loop.usable:
            return
        if self._loop.inside:
            threading.Thread(target=self.close, name="offline-close").start()
            return
        closing = self._loop.start(self._closed())
        try:
            closing.result(_CLOSE_SECONDS)
        except TimeoutError:
            logger.warning("the engine did not end within %.0f s", _CLOSE_SECONDS)
        self._loop.stop()

    async def _closed(self) -> None:
        if self._images is not None:
            await self._images.aclose()
        await self.backend.close()
