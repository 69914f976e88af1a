"""Connects httpcore to addresses that were resolved once and checked."""

# ruff: noqa: ASYNC109 (the timeouts are httpcore's interface)

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

import anyio
import httpcore

from handlers.errors import ImageFetchFailed
from handlers.images.problem import ImageProblem, too_many_bytes
from handlers.images.target import canonical_host

Resolver = Callable[[str, int], Sequence[str]]

MAX_ADDRESSES = 4
HEAD_BYTES = 32 * 1024
HEAD_READ = 2 * 1024
BODY_READ = 64 * 1024

IPAddress = IPv4Address | IPv6Address

GLOBAL_UNICAST = IPv6Network("2000::/3")  # all that IANA has assigned; RFC 4291, section 2.4
NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address
DOCUMENTATION = IPv6Network("3fff::/20")  # RFC 9637, newer than this Python's tables
V4_NOT_PUBLIC = (
    IPv4Network("192.0.0.0/24"),  # protocol assignments, RFC 6890; Python knows only parts of it
    IPv4Network("192.88.99.0/24"),  # 6to4 relays, RFC 7526
    IPv4Network("168.63.129.16/32"),  # Azure's host agent: metadata behind a global address
)


def is_public(address: IPAddress) -> bool:
    """Tell whether an address is globally reachable unicast; an IPv4 address inside an IPv6 address is what counts."""
    if isinstance(address, IPv4Address):
        return (
            address.is_global
            and not address.is_multicast
            and not address.is_reserved
            and not any(address in network for network in V4_NOT_PUBLIC)
        )
    if address.scope_id is not None:
        return False
    carried = _carried(address)
    if carried is not None:
        return is_public(carried)
    return address in GLOBAL_UNICAST and address.is_global and address not in DOCUMENTATION


def _carried(address: IPv6Address) -> IPv4Address | None:
    """Return the IPv4 address that packets end up at. Teredo is missing because `is_global` denies all of it."""
    if address in NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


class AllowedPrivate:
    """The operator's exceptions: host names, addresses and networks (`option.image_fetch_allow_private`)."""

    def __init__(self, entries: Iterable[str]) -> None:
        """Parse the entries. Raises ValueError for one that is neither a host name nor an address or a network."""
        self.hosts: set[str] = set()
        self.networks: list[IPv4Network | IPv6Network] = []
        for entry in entries:
            try:
                self.networks.append(ipaddress.ip_network(entry.strip("[]"), strict=False))
            except ValueError:
                self.hosts.add(canonical_host(entry))

    def admits(self, host: str, address: IPAddress) -> bool:
        """Tell whether `host`, as the URL spells it, may be fetched from `address` although it is not public."""
        if host in self.hosts:
            return True
        candidates = [address]
        if isinstance(address, IPv6Address) and (carried := _carried(address)) is not None:
            candidates.append(carried)
        return any(candidate in network for candidate in candidates for network in self.networks)


def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a host in the order in which the system would try them. Blocks; raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def checked(host: str, found: Sequence[str], allowed: AllowedPrivate) -> list[str]:
    """Return the addresses of a host that may be connected to.

    Raises:
        ImageProblem: An address is not public, or there is none.
    """
    for text in found:
        address = ipaddress.ip_address(text)
        if not is_public(address) and not allowed.admits(host, address):
            raise ImageProblem(
                "its host's address is not public; send the image as a data: URL, or have the operator "
                "allow the host with option.image_fetch_allow_private"
            )
    if not found:
        raise ImageProblem("its host name cannot be resolved", ImageFetchFailed)
    return list(found[:MAX_ADDRESSES])


class CheckedBackend(httpcore.AsyncNetworkBackend):
    """The network for one request of an image. TLS still verifies the host's name: only the connection is pinned.

    It has no timeouts of its own, because one deadline covers the fetch. `close` leaves no socket open, even
    if the fetch is cancelled during a handshake.
    """

    def __init__(self, addresses: Sequence[str], deadline: float) -> None:
        """Create a backend without connections.

        Args:
            addresses: Checked addresses, tried in order.
            deadline: In seconds of the event loop's clock; the time is divided among the addresses.
        """
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
    """Number of bytes that may still be read.

    Until the reply's header is complete, they are read in small portions: a flood of interim replies is
    parsed without a pause, and so must not arrive in one piece.
    """

    def __init__(self) -> None:
        self.left = HEAD_BYTES
        self.portion = HEAD_READ
        self.problem = ImageProblem("its host sent too large a reply header", ImageFetchFailed)

    def begin_body(self, max_bytes: int) -> None:
        """Allow the body; chunk framing may add a quarter to it."""
        self.left = max_bytes + max_bytes // 4 + HEAD_BYTES
        self.portion = BODY_READ
        self.problem = too_many_bytes(max_bytes)

    def spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise self.problem


class BudgetedStream(httpcore.AsyncNetworkStream):
    """A stream whose reads are charged to a `ReadBudget`."""

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
