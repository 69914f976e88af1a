"""httpcore's way to the network: connections to addresses that were resolved once and checked."""

# ruff: noqa: ASYNC109 (the timeouts are httpcore's interface)

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import anyio
import httpcore

from handlers.errors import ImageFetchFailed, ImageTooLarge
from handlers.images.address import AllowedPrivate, is_public
from handlers.images.problem import PictureProblem

Resolver = Callable[[str, int], Sequence[str]]

MAX_ADDRESSES = 4
HEAD_BYTES = 32 * 1024
HEAD_READ = 2 * 1024
BODY_READ = 64 * 1024


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host, in the order in which the system would try them. Blocks; raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def checked(host: str, found: Sequence[str], allowed: AllowedPrivate) -> list[str]:
    """The addresses of a host that may be connected to. Raises PictureProblem."""
    for text in found:
        address = ipaddress.ip_address(text)
        if not is_public(address) and not allowed.admits(host, address):
            raise PictureProblem(
                "its host's address is not public; send the picture as a data: URL, or have the operator "
                "allow the host with option.image_fetch_allow_private"
            )
    if not found:
        raise PictureProblem("its host name cannot be resolved", ImageFetchFailed)
    return list(found[:MAX_ADDRESSES])


class CheckedBackend(httpcore.AsyncNetworkBackend):
    """The network for one hop of one picture. TLS still verifies the host's name: only the connection is
    pinned.

    Timeouts are not its business (one deadline covers the fetch), sockets are: `close` leaves none behind,
    also when the fetch is cancelled halfway through a handshake.
    """

    def __init__(self, addresses: Sequence[str], deadline: float) -> None:
        """addresses: the ones to try, checked. deadline: on the event loop's clock; shared out among them."""
        self._addresses = addresses
        self._deadline = deadline
        self._network = httpcore.AnyIOBackend()
        self._opened: list[httpcore.AsyncNetworkStream] = []
        self.budget = ReadBudget()

    @property
    def connected(self) -> bool:
        """Whether an address has accepted the connection."""
        return bool(self._opened)

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        addresses = self._addresses
        failure: Exception = httpcore.ConnectError()
        loop = asyncio.get_running_loop()
        for left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
            share = (self._deadline - loop.time()) / left if left > 1 else None
            try:
                stream = await self._network.connect_tcp(address, port, timeout=share)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
            else:
                self._opened.append(stream)
                return BudgetedStream(stream, self.budget)
        raise failure

    async def close(self) -> None:
        with anyio.CancelScope(shield=True):
            for stream in self._opened:
                await stream.aclose()


class ReadBudget:
    """Bytes that may still be read. Until the reply's head is complete, in small portions: a flood of interim
    replies is parsed without a pause, and so must not come in one piece.
    """

    def __init__(self) -> None:
        self.left = HEAD_BYTES
        self.portion = HEAD_READ
        self.problem = PictureProblem("its host sent too large a reply header", ImageFetchFailed)

    def begin_body(self, max_bytes: int) -> None:
        """Chunk framing may cost a quarter on top of the body."""
        self.left = max_bytes + max_bytes // 4 + HEAD_BYTES
        self.portion = BODY_READ
        self.problem = PictureProblem(
            f"it has more than {max_bytes} bytes (option.max_image_bytes)", ImageTooLarge
        )

    def spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise self.problem


class BudgetedStream(httpcore.AsyncNetworkStream):
    def __init__(self, stream: httpcore.AsyncNetworkStream, budget: ReadBudget) -> None:
        self._stream = stream
        self._budget = budget

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data = await self._stream.read(min(max_bytes, self._budget.portion))
        self._budget.spend(len(data))
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._stream.write(buffer)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        return BudgetedStream(await self._stream.start_tls(ssl_context, server_hostname), self._budget)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
