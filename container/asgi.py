"""One HTTP exchange over ASGI: read a body within limits, send a reply, notice a client that leaves.

Written on ASGI itself: the framework's streaming response costs a task group and several coroutines a chunk.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Literal

from handlers.errors import PayloadTooLarge, ServingError
from handlers.exchange import Reply

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

BODY_PAUSE_SECONDS = 30.0
"""Longest wait for the next part of a request's body."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

_LINGER_SECONDS = 3.0
"""How long the rest of a refused body is thrown away, so that its sender gets to read the reply."""


class ClientGone(Exception):
    """The client closed the connection before it had sent its request."""


class BodyTimeout(ServingError):
    """The body stopped arriving, or takes too long in all."""

    status = 408
    kind = "body_timeout"


async def read_body(headers: Mapping[str, str], receive: Receive, limit: int, *, longest: float) -> bytes:
    """The whole body. longest: seconds that it may take in all; a pause of `BODY_PAUSE_SECONDS` ends it, too.

    Raises ClientGone, BodyTimeout, and PayloadTooLarge as soon as `limit` is passed.
    """
    declared = headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(limit)
    body = bytearray()
    more = True
    end = time.monotonic() + longest
    while more:
        left = end - time.monotonic()
        try:
            async with asyncio.timeout(min(BODY_PAUSE_SECONDS, left)):
                message = await receive()
        except TimeoutError:
            raise BodyTimeout(
                f"no part of the request's body came for {BODY_PAUSE_SECONDS:.0f} s; send it again"
                if left > BODY_PAUSE_SECONDS
                else f"the request's body took longer than {longest:.0f} s (predict_timeout); send less or faster"
            ) from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        more = message.get("more_body", False)
        if not body and not more:
            body = part
        else:
            body += part
        if len(body) > limit:
            raise _too_large(limit)
    return bytes(body)


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the request's body is larger than the {limit} bytes allowed (max_request_size)")


async def drop_body(receive: Receive) -> None:
    """Throw away the rest of a body, for a moment: closing a connection on unread data loses the reply."""
    try:
        async with asyncio.timeout(_LINGER_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


Ending = Literal["client_gone", "overdue", "stalled", "shutdown"]
"""Why a request was cancelled: its client left; its time was over; no part of its reply could be sent for too
long; the server stopped."""


class Exchange:
    """The reply's side of one request, and the watch over it.

    status: of the reply once it has begun, 0 before. ending: why the request was cancelled, if it was.
    """

    __slots__ = ("_closing", "_last", "_receive", "_send", "_task", "ending", "status")

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._task: asyncio.Task[Any] | None = None
        self._closing = False
        self._last: float | None = None
        self.status = 0
        self.ending: Ending | None = None

    async def run(
        self, work: Awaitable[Reply], headers: Mapping[str, str], *, longest: float, pause: float
    ) -> None:
        """Await a reply and send it; call it once, with the request's body read.

        longest: seconds for all of it. pause: seconds between two parts of a streamed reply.
        Work and reply are cancelled at once when the client leaves or one of these is over; then this returns
        with `ending` set. Raises what the work raises.
        """
        loop = asyncio.get_running_loop()
        self._task = task = asyncio.current_task()
        watcher = loop.create_task(self._watch_client())
        clock = loop.create_task(self._watch_clock(longest, pause))
        try:
            await self.send(await work, headers)
        except asyncio.CancelledError:
            if self.ending is None or task is None:
                raise
            task.uncancel()
        finally:
            self._task = None
            watcher.cancel()
            clock.cancel()

    def stop(self, ending: Ending) -> None:
        """Cancel what runs, unless the reply is complete."""
        if self._task is not None and self.ending is None:
            self.ending = ending
            self._task.cancel()

    async def send(self, reply: Reply, headers: Mapping[str, str], linger: bool = False) -> None:
        """Send a reply. linger: the request's body was not read; close the connection, but not at once."""
        if reply.chunks is not None:
            try:
                await self._send_stream(reply, reply.chunks, headers)
            finally:
                aclose = getattr(reply.chunks, "aclose", None)
                if aclose is not None:
                    await aclose()
            return
        own = {**headers, "content-length": str(len(reply.body))}
        if linger:
            own["connection"] = "close"
        await self._start(reply, own)
        if linger:
            await self._send({"type": "http.response.body", "body": reply.body, "more_body": True})
            await drop_body(self._receive)
            reply = Reply(reply.status, reply.content_type)
        self._closing = True
        await self._send({"type": "http.response.body", "body": reply.body, "more_body": False})

    async def _send_stream(
        self, reply: Reply, chunks: AsyncIterator[bytes], headers: Mapping[str, str]
    ) -> None:
        send, clock = self._send, asyncio.get_running_loop().time
        async for chunk in chunks:
            if self.status == 0:
                await self._start(reply, headers)
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            self._last = clock()
        if self.status == 0:
            await self._start(reply, headers)
        self._closing = True
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self, reply: Reply, headers: Mapping[str, str]) -> None:
        lines = [(b"content-type", reply.content_type.encode("latin-1", "replace"))]
        for name, value in (*headers.items(), *reply.headers.items()):
            lines.append((name.lower().encode("ascii"), _CONTROL.sub("", value).encode("latin-1", "replace")))
        self.status = reply.status
        await self._send({"type": "http.response.start", "status": reply.status, "headers": lines})

    async def _watch_client(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._closing:  # The server reports its own end of the exchange as a disconnect, too.
            self.stop("client_gone")

    async def _watch_clock(self, longest: float, pause: float) -> None:
        clock = asyncio.get_running_loop().time
        end = clock() + longest
        while True:
            now = clock()
            quiet_until = end if self._last is None else self._last + pause
            if now >= end:
                return self.stop("overdue")
            if now >= quiet_until:
                return self.stop("stalled")
            await asyncio.sleep(min(end, quiet_until) - now)
