"""HTTP/1.1: uvicorn's protocol with the limits that it lacks, and the set of connections.

`Protocol` is one connection; `Connections` limits how many may be open, and chooses which one is closed.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections.abc import Callable
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

logger = logging.getLogger(__name__)

HEAD_SECONDS = 30.0
"""How long a head may take to arrive."""

_HEAD_BYTES = 64 * 1024
_MOST_HEADERS = 256

_MOST_PIPELINED = 16
"""Requests of one connection that may wait for an earlier reply."""

_MOST_IN_ONE_READ = 64
"""The most requests parsed from one read, since parsing blocks the event loop."""

_PIPELINED_BYTES = 64 * 1024
"""The most body bytes of a request that waits for an earlier reply: they are neither read nor counted yet."""

_FEW_CHUNKS = 4096
_CHUNK_BYTES = 32
"""The smallest average size of chunks after the first `_FEW_CHUNKS`, because each one costs a call."""

_FRAMING_BYTES = 64 * 1024
"""Chunk sizes, extensions and trailers, in addition to a quarter of the body."""

_LINGER_SECONDS = 2.0
_LINGER_BYTES = 64 * 2**20
"""The most bytes discarded of all bodies that are arriving when their connections are closed. Closing a socket with
unread input resets the connection, and a client that is reset while it sends may never see the reply."""

_UNREAD_SECONDS = 120.0
"""How long a client may leave more than a full buffer of a reply unread."""


class Protocol(HttpToolsProtocol):
    """Limits a connection's heads (time, bytes, headers), simultaneous requests, body framing and unread replies."""

    def __init__(
        self,
        *,
        connections: Connections,
        on_malformed: Callable[[int], None],
        head_seconds: float = HEAD_SECONDS,
        **given: Any,
    ) -> None:
        """Begin a connection of uvicorn's.

        Args:
            connections: All connections of the server.
            on_malformed: Called with the status of the reply to input that is not a request.
            head_seconds: See `HEAD_SECONDS`.
            given: What uvicorn's protocol takes.
        """
        super().__init__(**given)
        self._head_seconds = head_seconds
        self._on_malformed = on_malformed
        self._connections = connections
        self._timer: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._running: RequestResponseCycle | None = None
        self._left: int | None = None  # bytes to throw away before the connection is closed
        self._lost = self._ignores_input = False
        self._in_head = self._in_body = self._upgrades = False
        self._head_bytes = self._head_read = self._fields = self._hosts = self._parsed = 0
        self._chunked = self._began = False
        self._chunks = self._body_bytes = self._body_read = self._declared = 0
        self._problem = (400, "Invalid HTTP request received.")

    @property
    def lingers(self) -> bool:
        return self._left is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._socket = cast(asyncio.Transport, transport)
        super().connection_made(ClosingTransport(self._socket, self))  # type: ignore[arg-type]
        self._connections.add(self)
        self._start_keep_alive()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._stop_timer()
        self.resume_writing()
        self._connections.remove(self)
        if self._running is not None:  # uvicorn notifies only the newest of pipelined requests.
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def close_now(self) -> None:
        if self.lingers:
            self._socket.abort()
        else:
            self._socket.close()

    def finish(self) -> None:
        """Close the connection, but first discard the rest of a body that the client is still sending.

        This is limited to `_LINGER_BYTES` for all such connections and to `_LINGER_SECONDS`; if there are too many, the
        oldest one is closed.
        """
        if self.lingers:
            return
        if self._lost or not self._in_body or self._socket.is_closing():
            self._socket.close()
            return
        share = _LINGER_BYTES // (len(self._connections.lingering) + 1)
        rest = max(1, self._declared - self._body_bytes) if self._declared else share
        self._left = min(share, rest)
        self._start_timer(_LINGER_SECONDS, self.close_now)
        self.flow.resume_reading()
        if self._socket.can_write_eof():
            self._socket.write_eof()
        self._connections.linger(self)

    def data_received(self, data: bytes) -> None:
        if self._left is not None:
            self._left -= len(data)
            if self._left <= 0:
                self.close_now()
            return
        if self._ignores_input:
            return
        self._unset_keepalive_if_required()
        self._parsed, self._began = 0, False
        in_body = self._in_body
        if self._timer is None and self._is_free():
            self._start_timer(self._head_seconds, self._socket.abort)
        try:
            self._feed(data)
        except httptools.HttpParserUpgrade:
            self._ignores_input = True  # What follows is not in a protocol that this server speaks.
            self.cycle.keep_alive = False
            return
        except httptools.HttpParserError:
            self._refuse()
            return
        if self._in_head and not self._began:
            self._head_read += len(data)  # The parser does not expose an unfinished header.
            if self._head_read > _HEAD_BYTES:
                self._problem = (431, "The request's head is too large.")
                self._refuse()
        elif in_body and self._in_body and self._chunked:
            self._body_read += len(data)
            if self._body_read - self._body_bytes > _FRAMING_BYTES + self._body_bytes // 4:
                self._refuse()

    def _feed(self, data: bytes) -> None:
        """Parse input, and answer requests for an upgrade in HTTP/1.1. Java's HttpClient sends them to get HTTP/2.

        The parser skips the body of such a request, so its head is parsed once more without the header.
        Raises HttpParserUpgrade for CONNECT, and HttpParserError.
        """
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                if not self._upgrades:
                    raise
                self._upgrades = False
                lines = [b"%s %s HTTP/1.1" % (self.parser.get_method(), self.url)]
                lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
                data = b"\r\n".join((*lines, b"", data[upgrade.args[0] :]))
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def on_message_begin(self) -> None:
        self._parsed += 1
        if self._parsed > _MOST_IN_ONE_READ or len(self.pipeline) >= _MOST_PIPELINED or self.transport.is_closing():
            raise ValueError("too many requests at once")
        self._in_head = self._began = True
        self._head_bytes = self._head_read = self._fields = self._hosts = 0
        self._chunked = False
        if self._is_free():  # or else once the earlier reply has ended: it must not be cut off
            self._start_timer(self._head_seconds, self._socket.abort)
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        self._fields += 1
        if self._fields > _MOST_HEADERS:
            self._problem = (431, "The request has too many headers.")
            raise ValueError("too many headers")
        if self._in_head:  # and no trailer, which may not say what a proxy has not checked
            if name.lower() == b"transfer-encoding":
                self._chunked = True
            elif name.lower() == b"host":
                self._hosts += 1
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stop_timer()
        if self._hosts > 1 or (self._hosts == 0 and self.parser.get_http_version() == "1.1"):
            self._problem = (400, "The request must have exactly one Host header (RFC 9112, 3.2).")
            raise ValueError("no Host header, or several")
        self._upgrades = self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"
        if self._upgrades:
            return
        self._in_body = True
        self._chunks = self._body_bytes = self._body_read = self._declared = 0
        declared = next((value for name, value in self.headers if name == b"content-length"), b"")
        self._declared = int(declared) if declared.isdigit() else 0
        self._connections.busy(self)
        self.scope["state"]["crowded"] = self._connections.crowded
        super().on_headers_complete()
        self._in_head = False

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._chunked:
            self._chunks += 1
            if self._chunks > _FEW_CHUNKS + self._body_bytes // _CHUNK_BYTES:
                raise ValueError("too many small chunks")
        if self.pipeline and len(self.cycle.body) + len(body) > _PIPELINED_BYTES:
            raise ValueError("a long body behind an unfinished reply")
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._upgrades:
            return
        self._in_body = False
        super().on_message_complete()
        if self._is_free():  # The reply was complete before the body.
            self._stop_timer()
            self._start_keep_alive()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.pipeline and not self.transport.is_closing():
            if (self._in_head or self._in_body) and self._timer is None:
                self._start_timer(self._head_seconds, self._socket.abort)
            self._connections.rest(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(_UNREAD_SECONDS, self._socket.abort)

    def resume_writing(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
        super().resume_writing()

    def _is_free(self) -> bool:
        """Whether no earlier request of this connection is waiting for its reply."""
        return (self.cycle is None or self.cycle.response_complete) and not self.pipeline

    def _refuse(self) -> None:
        """Answer input that is not HTTP or exceeds a limit, and close. Never writes into another request's reply."""
        status, message = self._problem
        if self.transport.is_closing():
            return
        logger.debug("refused what a client sent: %s", message)
        in_body = self._in_body and not self._in_head
        if in_body and not self.pipeline:  # The application counts the request.
            own = not self.cycle.response_started
            if own:
                self.cycle.scope["state"]["refused"] = status
        else:
            self._on_malformed(status)
            own = self._is_free()
            if not own and not in_body:  # The requests before it get their replies first.
                self._ignores_input, self.cycle.keep_alive = True, False
                return
        if own:
            lines = [
                (b"content-type", b"text/plain; charset=utf-8"),
                (b"connection", b"close"),
                (b"content-length", b"%d" % len(message)),
            ]
            head = [b"%s: %s\r\n" % line for line in (*self.server_state.default_headers, *lines)]
            self._socket.write(b"".join((STATUS_LINE[status], *head, b"\r\n", message.encode())))
        self._socket.close()

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > _HEAD_BYTES:
            self._problem = (431, "The request's head is too large.")
            raise ValueError("the request's head is too large")

    def _start_keep_alive(self) -> None:
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _start_timer(self, seconds: float, action: Any) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, action)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


_MOST = 16_384
_MOST_DESCRIPTORS = 65_536
_OWN_DESCRIPTORS = 256
"""File descriptors reserved for the engine's pipes, fetches and files; half of all if the process has few."""

_MOST_LINGERING = 64


class ClosingTransport:
    """A transport whose `close` lets the client read the reply first (see `Protocol.finish`)."""

    __slots__ = ("_connection", "_transport", "get_extra_info", "pause_reading", "resume_reading", "write")

    def __init__(self, transport: asyncio.Transport, connection: Protocol) -> None:
        self._transport = transport
        self._connection = connection
        self.write = transport.write
        self.pause_reading = transport.pause_reading
        self.resume_reading = transport.resume_reading
        self.get_extra_info = transport.get_extra_info

    def close(self) -> None:
        self._connection.finish()

    def is_closing(self) -> bool:
        return self._connection.lingers or self._transport.is_closing()


class Connections:
    """The open connections of one server.

    Beyond `limit`, the connection that has been idle longest is closed. While none is idle, only probes are answered.
    Beyond `hard_limit`, new connections are closed at once.

    Attributes:
        open: How many are open and not asked to close.
        idle: Those without a request, longest idle first; a head that arrives byte by byte does not make one busy.
        lingering: Those whose reply was sent and whose remaining input is discarded.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.hard_limit = limit + max(8, limit // 8)
        self.open = 0
        self.idle: dict[Protocol, None] = {}
        self.lingering: dict[Protocol, None] = {}
        self._known: set[Protocol] = set()

    @property
    def crowded(self) -> bool:
        return self.open > self.limit

    def add(self, connection: Protocol) -> None:
        self._known.add(connection)
        self.open += 1
        self.idle[connection] = None
        while self.open > self.limit and connection in self._known:
            oldest = next(iter(self.lingering), None) or next(iter(self.idle))
            if oldest is connection and self.open <= self.hard_limit:
                return
            self._close(oldest)

    def rest(self, connection: Protocol) -> None:
        """Note that the connection is waiting for its next request."""
        if connection in self._known:
            self.idle.pop(connection, None)
            self.idle[connection] = None
            if self.open > self.limit:
                self._close(next(iter(self.idle)))

    def busy(self, connection: Protocol) -> None:
        self.idle.pop(connection, None)

    def linger(self, connection: Protocol) -> None:
        self.idle.pop(connection, None)
        self.lingering[connection] = None
        if len(self.lingering) > _MOST_LINGERING:
            self._close(next(iter(self.lingering)))

    def remove(self, connection: Protocol) -> None:
        """Forget the connection. Safe to call twice."""
        self.idle.pop(connection, None)
        self.lingering.pop(connection, None)
        if connection in self._known:
            self._known.discard(connection)
            self.open -= 1

    def _close(self, connection: Protocol) -> None:
        self.remove(connection)
        connection.close_now()


def raise_descriptor_limit() -> int:
    """Raise the limit of open files as far as allowed, also for children; return how many connections it allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (ValueError, OSError):
            pass  # Some sandboxes refuse it; the limit below is derived from the limit that remains.
    if soft == resource.RLIM_INFINITY:
        return _MOST
    return min(_MOST, soft - min(_OWN_DESCRIPTORS, soft // 2))
