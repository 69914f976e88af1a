"""The user's input and output formatters, which model.py marks with decorators. They run in their own process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Literal

import msgspec

from handlers.custom.backend import CustomBackend
from handlers.errors import CustomCodeError, DeadlineExceeded, ServingError
from handlers.protocols.errors import log_error
from handlers.protocols.lmi.replies import LmiError

_MAX_SECONDS = 60.0
"""Time limit of one call of a formatter, after which its process is replaced."""


class Formatters:
    """Calls the formatters. reads, writes: whether there is a formatter for requests, and for replies."""

    def __init__(self, processes: CustomBackend, *, reads: bool, writes: bool) -> None:
        self.reads = reads
        self.writes = writes
        self._processes = processes

    async def load(self) -> None:
        await self._processes.load()

    async def close(self) -> None:
        await self._processes.close()

    async def read(self, body: dict[str, Any]) -> dict[str, Any]:
        """Format a request's body. Raises CustomCodeError and DeadlineExceeded."""
        changed = msgspec.json.decode(await self._call("input", msgspec.json.encode(body)))
        if not isinstance(changed, dict):
            raise CustomCodeError("the model's own input formatter returned no object")
        return changed

    async def write(self, reply: bytes) -> bytes:
        """Format a whole reply."""
        return await self._call("output", reply)

    async def write_event(self, event: bytes) -> bytes:
        """Format an event of a stream, its frame included."""
        return await self._call("event", event)

    async def _call(self, formatter: Literal["input", "output", "event"], body: bytes) -> bytes:
        call = None
        try:
            async with asyncio.timeout(_MAX_SECONDS):
                call = await self._processes.call({"formatter": formatter}, body)
                await call.next()
                return await call.rest()
        except TimeoutError as error:
            raise DeadlineExceeded("the model's own formatter takes too long") from error
        finally:
            if call is not None:
                call.abandon(0.0)


class FormattedStream:
    """A stream of server-sent events, each written by the user's formatter."""

    def __init__(self, events: AsyncIterator[bytes], formatters: Formatters, request_id: str) -> None:
        self._events = events
        self._formatters = formatters
        self._request_id = request_id
        self._failed = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        while not self._failed:
            chunk = await anext(self._events)
            try:
                written = [await self._formatters.write_event(event + b"\n\n") for event in _events(chunk)]
            except ServingError as error:
                self._failed = True
                log_error(error, self._request_id)
                return msgspec.json.encode(LmiError.of(error)) + b"\n"
            if data := b"".join(written):
                return data
        raise StopAsyncIteration

    async def aclose(self) -> None:
        aclose = getattr(self._events, "aclose", None)
        if aclose is not None:
            await aclose()


def _events(chunk: bytes) -> list[bytes]:
    """Return the events without comments, which only keep the connection open and are not formatted."""
    return [event for event in chunk.split(b"\n\n") if event.startswith(b"data:")]
