"""The clients' connections: how many may be open, and which one is closed when there are too many."""

from __future__ import annotations

import asyncio
import resource
from typing import Protocol

_MOST = 16_384
_MOST_DESCRIPTORS = 65_536
_OWN_DESCRIPTORS = 256
"""File descriptors reserved for the engine's pipes, fetches and files; half of all if the process has few."""

_MOST_LINGERING = 64


class Connection(Protocol):
    """What the limits must know of a connection.

    Attributes:
        lingers: The reply was sent, and further input from the client is discarded.
    """

    @property
    def lingers(self) -> bool: ...

    def hang_up(self) -> None:
        """Close at once."""

    def finish(self) -> None:
        """Close after the client has had time to read the reply."""


class Wire:
    """A transport whose `close` lets the client read the reply first (see `Protocol.finish`)."""

    __slots__ = ("_connection", "_transport", "get_extra_info", "pause_reading", "resume_reading", "write")

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
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
        self.idle: dict[Connection, None] = {}
        self.lingering: dict[Connection, None] = {}
        self._known: set[Connection] = set()

    @property
    def crowded(self) -> bool:
        return self.open > self.limit

    def add(self, connection: Connection) -> None:
        self._known.add(connection)
        self.open += 1
        self.idle[connection] = None
        while self.open > self.limit and connection in self._known:
            oldest = next(iter(self.lingering), None) or next(iter(self.idle))
            if oldest is connection and self.open <= self.hard_limit:
                return
            self._close(oldest)

    def rest(self, connection: Connection) -> None:
        """Note that the connection is waiting for its next request."""
        if connection in self._known:
            self.idle.pop(connection, None)
            self.idle[connection] = None
            if self.open > self.limit:
                self._close(next(iter(self.idle)))

    def busy(self, connection: Connection) -> None:
        self.idle.pop(connection, None)

    def linger(self, connection: Connection) -> None:
        self.idle.pop(connection, None)
        self.lingering[connection] = None
        if len(self.lingering) > _MOST_LINGERING:
            self._close(next(iter(self.lingering)))

    def remove(self, connection: Connection) -> None:
        """Forget the connection. Safe to call twice."""
        self.idle.pop(connection, None)
        self.lingering.pop(connection, None)
        if connection in self._known:
            self._known.discard(connection)
            self.open -= 1

    def _close(self, connection: Connection) -> None:
        self.remove(connection)
        connection.hang_up()


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
