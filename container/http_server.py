"""The listening socket, and uvicorn on it with our protocol."""

from __future__ import annotations

import socket
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import uvicorn

from container.app import App
from container.protocol import HEAD_SECONDS, Connections, Protocol, raise_descriptor_limit

_BACKLOG = 2048
_KEEP_ALIVE_SECONDS = 620
"""Longer than load balancers keep an idle connection (AWS 60 s, Google 600 s), because they must close it first."""

_UNACKNOWLEDGED_SECONDS = 120

_ACCEPTS = 32
"""Connections accepted in one turn of the event loop. libuv accepts one for each listening descriptor, so with a single
descriptor a probe behind many new connections would wait for as many turns."""


class HttpServer(uvicorn.Server):
    """Uvicorn with our protocol. It serves until `should_exit`; its owner handles signals."""

    def __init__(self, app: App, head_seconds: float = HEAD_SECONDS) -> None:
        self.connections = Connections(raise_descriptor_limit())
        protocol = partial(
            Protocol, connections=self.connections, on_malformed=app.on_malformed, head_seconds=head_seconds
        )
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,  # type: ignore[arg-type]
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

    def listen(self, listener: socket.socket) -> Coroutine[Any, Any, None]:
        """Return what serves until `should_exit`."""
        # Each accept needs a descriptor of its own.
        accepts = min(_ACCEPTS, max(1, self.connections.limit // 8))
        return self.serve([listener, *(listener.dup() for _ in range(accepts - 1))])

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int) -> socket.socket:
    """Return a listening TCP socket; port 0 takes any free one. Raises OSError."""
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
    """Return the listener's address as `host:port`, or that of a Unix socket, for the log."""
    name: tuple[Any, ...] | str = listener.getsockname()
    if isinstance(name, str):
        return name
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
