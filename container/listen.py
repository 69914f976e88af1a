"""The listening socket and the HTTP server on it: uvicorn."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import uvicorn

from container.app import App
from container.connections import Connections, raise_descriptor_limit
from container.protocol import Protocol

_BACKLOG = 2048
_KEEP_ALIVE_SECONDS = 620
"""Longer than any load balancer keeps an idle connection (AWS 60 s, Google 600 s): it must close first."""

_UNACKNOWLEDGED_SECONDS = 120

_ACCEPTS = 32
"""Connections taken in by one turn of the event loop: libuv takes one for each listening descriptor, and then those
who come in numbers, probes among them, wait as many turns as there are connections before theirs."""


class HttpServer(uvicorn.Server):
    """Serves until `should_exit`; signals are its owner's business."""

    def __init__(self, app: App) -> None:
        self.room = Connections(raise_descriptor_limit())
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(Protocol, application=app, room=self.room),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=_BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=2,
            )
        )

    async def listen(self, listener: socket.socket) -> None:
        accepts = min(_ACCEPTS, max(1, self.room.limit // 8))  # Each takes a descriptor itself.
        await self.serve([listener, *(listener.dup() for _ in range(accepts - 1))])

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int) -> socket.socket:
    """A listening TCP socket; a port of 0 takes any free one. Raises OSError."""
    infos = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = infos[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            milliseconds = _UNACKNOWLEDGED_SECONDS * 1000
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def address_of(listener: socket.socket) -> str:
    """`host:port`, for people."""
    name: tuple[Any, ...] = listener.getsockname()
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
