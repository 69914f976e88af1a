"""A streamed reply: chunks as they come, comments in silence, an error as an event, an end in any case."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from handlers.backends.base import Delta
from handlers.dialects.error_replies import log_error
from handlers.observer import Observer
from handlers.run import Run


class ReplyStream:
    """The chunks of one run that has its first delta. Exhaust it or `aclose` it.

    A task of its own reads the engine, so that a slow client delays nobody and finds all that waited in one
    chunk; it closes the run at the end of generation, not at the end of reading.
    """

    def __init__(
        self, run: Run, first: Delta, rest: AsyncIterator[Delta], observer: Observer, keep_alive: float | None
    ) -> None:
        """keep_alive: seconds of silence after which a comment is sent; None for never."""
        self._run = run
        self._rest = rest
        self._observer = observer
        self._writer = run.task.writer
        self._ready: list[bytes] = []
        self._waiting: asyncio.Future[None] | None = None
        self._silent = False
        self._timer: asyncio.TimerHandle | None = None
        self._interval = keep_alive if self._writer.keep_alive else None
        self._put(self._writer.chunk(first, run.stats))
        self._reader = asyncio.create_task(self._read())
        self._tick()

    def __aiter__(self) -> ReplyStream:
        return self

    async def __anext__(self) -> bytes:
        while not self._ready:
            if self._reader.done():
                await self.aclose()
                raise StopAsyncIteration
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        chunks, self._ready = self._ready, []
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def aclose(self) -> None:
        """Abort what still runs; safe to call twice, and from another task than the one that iterates."""
        if self._timer is not None:
            self._timer.cancel()
        self._reader.cancel()
        try:
            await asyncio.wait([self._reader])
        finally:
            await self._run.close()
            self._wake()

    async def _read(self) -> None:
        run, writer = self._run, self._writer
        try:
            async with run.time_limit():
                async for delta in self._rest:
                    self._put(writer.chunk(delta, run.stats))
            self._put(writer.end(run.stats))
        except Exception as error:
            known = run.failure(error)
            log_error(known, run.facts.request_id)
            self._observer.on_error(known.kind)
            self._put(writer.failed(known))
        finally:
            self._reader.add_done_callback(lambda _: self._wake())
            await run.close()

    def _put(self, chunk: bytes) -> None:
        if chunk:
            self._silent = False
            self._ready.append(chunk)
            self._wake()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _tick(self) -> None:
        """Every interval: a comment, if nothing was put since the last."""
        if self._interval is None or self._reader.done():
            return
        if self._silent and not self._ready:
            self._put(self._writer.keep_alive)
        self._silent = True
        self._timer = asyncio.get_running_loop().call_later(self._interval, self._tick)
