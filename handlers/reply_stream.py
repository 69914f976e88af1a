"""The streamed reply of a request, from the engine's deltas to chunks for the client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from handlers.deltas import Delta
from handlers.errors import DeadlineExceeded
from handlers.generation_task import GenerationTask, cancels_this
from handlers.protocols.errors import log_error
from handlers.request import Observer

MOST_WAITING = 2**20
"""Bytes of a reply that may wait for its client; one chunk may exceed this."""


class ReplyStream:
    """The chunks of one `GenerationTask` that has its first delta. Exhaust it or `aclose` it.

    A separate asyncio task reads the engine, so that a slow client delays no other request; the client then gets
    everything that has waited in one chunk. Generation may end before the client has read it all: then the
    `GenerationTask` is stopped, but it is closed, which frees its places in the queue, only when everything has been
    read. While more than `MOST_WAITING` bytes are waiting, the engine is not read, and after `read_timeout` the stream
    fails.
    """

    def __init__(
        self,
        generating: GenerationTask,
        first: Delta,
        rest: AsyncIterator[Delta],
        observer: Observer,
        *,
        keep_alive: float,
        read_timeout: float,
    ) -> None:
        """keep_alive: seconds of silence after which a comment is sent."""
        self._generating = generating
        self._rest = rest
        self._observer = observer
        self._writer = generating.task.writer
        self._read_timeout = read_timeout
        self._ready: list[bytes] = []
        self._size = 0
        self._room: asyncio.Future[None] | None = None
        self._waiting: asyncio.Future[None] | None = None
        self._silent = False
        self._timer: asyncio.TimerHandle | None = None
        self._interval = keep_alive if self._writer.keep_alive else None
        self._put(self._writer.chunk(first, generating.stats_of(first.index)))
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
        chunks, self._ready, self._size = self._ready, [], 0
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def aclose(self) -> None:
        """Abort what is still running; safe to call twice, and from another task than the one that iterates."""
        if self._timer is not None:
            self._timer.cancel()
        self._reader.cancel()
        try:
            await asyncio.wait([self._reader])
        finally:
            await self._generating.close()
            self._wake()

    async def _read(self) -> None:
        generating, writer = self._generating, self._writer
        try:
            async with generating.time_limit():
                async for delta in self._rest:
                    self._put(writer.chunk(delta, generating.stats_of(delta.index)))
                    if self._size > MOST_WAITING:
                        await self._wait_for_room()
            self._put(writer.end(generating.stats))
        except (Exception, asyncio.CancelledError) as error:
            if cancels_this(error):
                raise
            known = generating.failure(error)
            log_error(known, generating.facts.request_id)
            self._observer.on_error(known.kind)
            self._put(writer.failed(known))
        finally:
            self._reader.add_done_callback(lambda _: self._wake())
            await generating.stop()

    async def _wait_for_room(self) -> None:
        self._room = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(self._read_timeout) as limit:
                await self._room
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise DeadlineExceeded(
                f"the reply was not read for {self._read_timeout:g} seconds (chunked_read_timeout)"
            ) from error

    def _put(self, chunk: bytes) -> None:
        if chunk:
            self._silent = False
            self._ready.append(chunk)
            self._size += len(chunk)
            self._wake()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _tick(self) -> None:
        """Add a comment at each interval in which nothing else was added."""
        if self._interval is None or self._reader.done():
            return
        if self._silent and not self._ready:
            self._put(self._writer.keep_alive)
        self._silent = True
        self._timer = asyncio.get_running_loop().call_later(self._interval, self._tick)
