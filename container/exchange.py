"""One HTTP exchange over ASGI: the request, its reply, and the detection of a client that leaves.

It uses ASGI directly, since a framework's streaming response does not do what is needed here: begin with the first
part, so that a failure before it still has a status; close the stream's source when it is cancelled; and notice a
reply that makes no progress.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qs

from handlers.protocols.base import Route
from handlers.request import Reply, RequestFacts
from handlers.service import REQUEST_ID_HEADERS

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_TOKEN = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)

Ending = Literal["client_gone", "overdue", "stalled", "shutdown"]
"""Why a request was cancelled: its client left, its time was up, nothing of its reply could be sent for too long, or
the server stopped."""


class ClientGone(Exception):
    """The client closed the connection before it had sent its request."""


class Exchange:
    """Sends the reply to one request, and cancels the work on it when the client can no longer receive it.

    Attributes:
        status: The reply's status once it has begun, 0 before.
        ending: Why the request was cancelled, if it was.
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

    async def run(self, work: Awaitable[Reply], headers: Mapping[str, str], *, longest: float, pause: float) -> None:
        """Await a reply and send it; call it once, after the request's body has been read.

        Work and reply are cancelled at once when the client leaves or a time limit is exceeded; then this returns with
        `ending` set. Raises what the work raises.

        Args:
            work: Makes the reply.
            headers: Sent together with the reply's own.
            longest: Seconds for all of it.
            pause: Seconds between two parts of a streamed reply.
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
        """Cancel the work, unless the reply is complete."""
        if self._task is not None and self.ending is None:
            self.ending = ending
            self._task.cancel()

    async def send(self, reply: Reply, headers: Mapping[str, str], close: bool = False) -> None:
        """Send a reply. close: also close the connection, because the request's body was not read."""
        if reply.chunks is not None:
            try:
                await self._send_stream(reply, reply.chunks, headers)
            finally:
                aclose = getattr(reply.chunks, "aclose", None)
                if aclose is not None:
                    await aclose()
            return
        own = {**headers, "content-length": str(len(reply.body))}
        if close:
            own["connection"] = "close"
        await self._start(reply, own)
        self._closing = True
        await self._send({"type": "http.response.body", "body": reply.body, "more_body": False})

    async def _send_stream(self, reply: Reply, chunks: AsyncIterator[bytes], headers: Mapping[str, str]) -> None:
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
        self.status = reply.status
        lines = [(b"content-type", reply.content_type.encode("latin-1", "replace"))]
        for name, value in (*headers.items(), *reply.headers.items()):  # without what could end a line
            lines.append((name.lower().encode("ascii"), _CONTROL.sub("", value).encode("latin-1", "replace")))
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


@dataclass(slots=True, eq=False)
class Call:
    """One request while it is answered.

    Attributes:
        crowded: Whether more connections than allowed were open when its head arrived.
        route: None if no route matches.
        logged: Whether its line in the log is written elsewhere.
    """

    method: str
    path: str
    query: str
    headers: dict[str, str]
    receive: Receive
    exchange: Exchange
    request_id: str
    crowded: bool = False
    route: Route | None = None
    model: str | None = None
    body_read: bool = False
    facts: RequestFacts | None = None
    error: str | None = None
    reason: str | None = None
    logged: bool = False
    arrival: float = field(default_factory=time.monotonic)

    @property
    def template(self) -> str:
        return "unknown" if self.route is None else self.route.template

    def parameters(self) -> dict[str, str]:
        """Return the first value of each parameter of the query."""
        given = parse_qs(self.query, keep_blank_values=True) if self.query else {}
        return {name: values[0] for name, values in given.items()}

    def line(self, status: int, facts: RequestFacts | None) -> dict[str, Any]:
        """Return the facts for the request's log line: never its prompt, its answer or its images."""
        line: dict[str, Any] = {
            "request_id": self.request_id,
            "method": self.method,
            "route": self.template,
            "status": status,
        }
        if facts is not None:
            line |= {
                "stream": facts.stream,
                "prompt_tokens": facts.prompt_tokens,
                "completion_tokens": facts.completion_tokens,
                "cached_tokens": facts.cached_tokens,
                "images": facts.images,
                "image_tokens": facts.image_tokens,
                "ttft_ms": None if facts.first_token is None else round(facts.first_token * 1000, 1),
                "finish_reason": facts.finish_reason,
            }
        line["total_ms"] = round((time.monotonic() - self.arrival) * 1000, 1)
        line["error"] = self.error or (facts.error if facts is not None else None)
        line["reason"] = self.reason or (facts.reason if facts is not None else None)
        line["ended"] = self.exchange.ending
        return line


def request_id(headers: Mapping[str, str], configured: str | None) -> str:
    """Return the caller's own id if it is a harmless token, or else a new one."""
    for name in [configured.lower()] if configured else REQUEST_ID_HEADERS:
        value = headers.get(name, "")
        if _TOKEN.fullmatch(value):
            return value
    return uuid.uuid4().hex
