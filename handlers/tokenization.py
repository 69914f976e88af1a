"""Requests for tokens, which need everything that a request needs except the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from handlers.backends.base import TokenizedPrompt
from handlers.errors import DeadlineExceeded, InvalidRequest
from handlers.exchange import Incoming, Reply
from handlers.generation_task import Admission
from handlers.images.loader import ImageLoader
from handlers.pipeline import Pipeline
from handlers.protocols.base import JSON, ServerContext
from handlers.protocols.body import warning
from handlers.protocols.tokens import TokenTask, detokenize_reply, read_detokenize, read_tokenize
from handlers.request import longest_prompt, media_parts

MOST_TOKENIZED_BYTES = 2**20
"""Of a body, its images not counted, that is turned into tokens; never more than a prompt may have."""

LONG_TEXT_BYTES = 20_000
"""Longer texts are tokenized one at a time, which leaves the other threads to requests for answers."""


class Tokenization:
    """Answers with a prompt's tokens, or with the text of tokens. The work is done in threads.

    check_images: raises InvalidRequest for more images than a prompt may hold.
    timeout: seconds that a request may take; None for any time.
    """

    def __init__(
        self,
        backend: Pipeline,
        images: ImageLoader,
        admission: Admission,
        check_images: Callable[[int, bool], None],
        timeout: float | None,
    ) -> None:
        self._backend = backend
        self._images = images
        self._admission = admission
        self._check_images = check_images
        self._timeout = timeout
        self._long = asyncio.Semaphore(1)

    async def tokenize(
        self, body: dict[str, Any], server: ServerContext, incoming: Incoming, long: bool
    ) -> Reply:
        """long: reading the body takes long. Raises ServingError."""
        if long:
            task = await asyncio.to_thread(read_tokenize, body, server, incoming)
        else:
            task = read_tokenize(body, server, incoming)
        parts = list(media_parts(task.prompt))
        self._check_images(len(parts), self._backend.capabilities.images)
        size = max(0, incoming.size - sum(part.characters for part in parts))
        most = min(MOST_TOKENIZED_BYTES, longest_prompt(self._backend.capabilities.max_model_len))
        if size > most:
            raise InvalidRequest(
                f"the text is too long to be tokenised at once: {size} bytes; allowed: {most}"
            )
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        incoming.parsed()
        with self._admission.admit(1):
            try:
                async with _within(self._timeout):
                    if parts:
                        await self._images.load(parts, deadline)
                    if size <= LONG_TEXT_BYTES:
                        written = await self._written(task)
                    else:
                        async with self._long:
                            written = await self._written(task)
                    return Reply(200, JSON, written, headers=warning(task.misspelt))
            finally:
                for part in parts:
                    part.release()

    async def detokenize(self, body: dict[str, Any], incoming: Incoming, long: bool) -> Reply:
        """long: reading the body takes long. Raises ServingError."""
        token_ids = await asyncio.to_thread(read_detokenize, body) if long else read_detokenize(body)
        incoming.parsed()
        with self._admission.admit(1):
            async with _within(self._timeout):
                if incoming.size <= LONG_TEXT_BYTES:
                    text = await self._backend.detokenize(token_ids)
                else:
                    async with self._long:
                        text = await self._backend.detokenize(token_ids)
        if len(text) > MOST_TOKENIZED_BYTES:
            return Reply(200, JSON, await asyncio.to_thread(detokenize_reply, text))
        return Reply(200, JSON, detokenize_reply(text))

    async def _written(self, task: TokenTask) -> bytes:
        found = await self._backend.tokenize(task.prompt)
        if len(found.token_ids) <= LONG_TEXT_BYTES // 8:
            return _write(task, found)
        return await asyncio.to_thread(_write, task, found)


def _write(task: TokenTask, found: TokenizedPrompt) -> bytes:
    if task.keep is not None:
        keep = slice(max(0, len(found.token_ids) - task.keep), None)
        found = replace(
            found, token_ids=found.token_ids[keep], pieces=found.pieces[keep], spans=found.spans[keep]
        )
    return task.write(found)


@asynccontextmanager
async def _within(seconds: float | None) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds) as limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise DeadlineExceeded("the request's time (option.predict_timeout) is up") from error
