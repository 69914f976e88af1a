"""A host of images on this machine, which answers as well or as badly as a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import io
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from PIL import Image

from handlers.images.limits import ImageLimits
from handlers.images.loader import ImageLoader

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


_buffer = io.BytesIO()
Image.new("RGB", (40, 30), "red").save(_buffer, "PNG")
IMAGE = _buffer.getvalue()
OK = b"HTTP/1.1 200 OK\r\n"
LOOPBACK = ("127.0.0.0/8",)


class Host:
    """An HTTP server that answers every request by `serve`; `requests` holds the heads it was sent."""

    def __init__(self, serve: Serve) -> None:
        self.serve = serve
        self.requests: list[str] = []
        self.port = 0
        self.tasks: set[asyncio.Task[None]] = set()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.tasks.add(asyncio.current_task())  # type: ignore[arg-type]
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            self.requests.append((await reader.readuntil(b"\r\n\r\n")).decode())
            await self.serve(reader, writer)
        writer.close()
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await writer.wait_closed()

    async def idle(self) -> None:
        """Returns when every connection has ended at this side too."""
        async with asyncio.timeout(30):
            await asyncio.gather(*self.tasks)

    @contextlib.asynccontextmanager
    async def open(self, context: ssl.SSLContext | None = None) -> AsyncIterator[Host]:
        server = await asyncio.start_server(self.handle, "127.0.0.1", 0, ssl=context)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in self.tasks:
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"


def replying(*pieces: bytes) -> Serve:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()

    return serve


def serve_image(data: bytes = IMAGE) -> Serve:
    return replying(OK + b"Content-Length: %d\r\n\r\n" % len(data), data)


def redirect(location: str, status: int = 302) -> Serve:
    return replying(f"HTTP/1.1 {status} Moved\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode())


def opened(**limits: Any) -> ImageLoader:
    given = {name: limits.pop(name) for name in ("resolver", "ssl_context") if name in limits}
    defaults: dict[str, Any] = {"allow_private": LOOPBACK, "fetch_timeout": 5.0}
    return ImageLoader(ImageLimits(**defaults | limits), **given)


async def silence(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read()
