"""What an `LLM` runs on: a fetched model, its backend, and the batches of requests that it answers."""

from __future__ import annotations

import logging
import queue
import sys
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from handlers import progress
from handlers.artefacts.fetch import fetch
from handlers.backends.select import backend_of
from handlers.build import build_engine, build_images, build_part, choose_backend, with_model_directory
from handlers.errors import InvalidConfiguration, InvalidRequest
from handlers.images.loader import ImageLoader
from handlers.offline.batch import Batch, Outcome
from handlers.offline.images import ImageTokens
from handlers.offline.loop_thread import LoopThread
from handlers.offline.options import check_names, warn_of_names
from handlers.pipeline import Pipeline
from handlers.request import EmbeddingsPart, GenerationRequest, MediaPart, TextPrompt
from handlers.request_checks import check_images
from properties.configuration import Configuration

logger = logging.getLogger(__name__)

_AHEAD = 64
"""How many requests are fetched, prepared and queued beyond those that generate."""

_CLOSE_SECONDS = 10.0


class Core:
    """Loads a model and answers requests. It never refers to the `LLM`, whose end must close it."""

    def __init__(self, configuration: Configuration) -> None:
        cancelled = threading.Event()
        try:
            self.directory = fetch(configuration.model_location, configuration.settings, cancelled)
        finally:
            cancelled.set()
        progress.current().begin("")
        self.configuration = configuration = with_model_directory(configuration, self.directory)
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
        start_engine = build_engine(configuration, self.directory, choice)
        self._close_backend: Callable[[], Awaitable[None]] | None = None
        self._images: ImageLoader | None = None
        self._loop = LoopThread()
        try:
            with _script_not_run_again():
                engine = self._loop.run(start_engine())
            self._close_backend = engine.close
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
        limit = f"limit_mm_per_prompt allows {self._max_images}"
        check_images(len(images), self._max_images, limit, accepted=capabilities.images)

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
        work = self._loop.start(self._batch.run(requests, lambda number, outcome: ready.put((number, outcome))))
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
        if self._close_backend is not None:
            await self._close_backend()


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
