"""Fetches images over HTTP from hosts that may be hostile: one deadline, a limit on bytes, every redirect checked."""

# ruff: noqa: ASYNC109 (the timeouts are httpcore's interface)

from __future__ import annotations

import asyncio
import ipaddress
import logging
import ssl
from collections.abc import AsyncIterator, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import anyio
import httpcore

from handlers.errors import ImageFetchFailed, ImageFetchTimeout, short_of
from handlers.images import ImageProblem, too_many_bytes
from handlers.images.codings import codings_of
from handlers.images.fetch_slots import FetchSlots, claim_for
from handlers.images.limits import ImageLimits
from handlers.images.target import AllowedPrivate, Resolver, Target, checked, parse_target, resolve
from processes.shortage import shortage
from properties.hosts import canonical_host

logging.getLogger("httpcore").setLevel(logging.INFO)  # below, it writes redirects with their secrets

REDIRECTS = {301, 302, 303, 307, 308}
USER_AGENT = "lmi-handler"
PIECES_PER_TURN = 64  # pieces of a body after which other tasks get a turn
MIN_PIECE_BYTES = 64  # average size of a piece, after the first PIECES_PER_TURN pieces
HEAD_BYTES = 32 * 1024
HEAD_READ = 2 * 1024
BODY_READ = 64 * 1024
MAX_LOOK_UPS = 32  # host names looked up at a time, each in a thread


@dataclass(frozen=True, slots=True)
class Body:
    """A reply's body.

    Attributes:
        pieces: The bytes, in the pieces that were received.
        codings: The codings that the host says it has applied to the image, first to last.
    """

    pieces: list[bytes]
    codings: tuple[str, ...]


@dataclass(slots=True)
class _Fetch:
    """An image being fetched: its request, and the seconds left. Waiting for a slot uses up none of them."""

    request: Hashable
    left: float


class Fetcher:
    """Fetches images, at most `max_concurrent_fetches` at a time, shared among their hosts by `FetchSlots`.

    Names are looked up in threads, which cannot be stopped. Look-ups therefore have slots of their own, shared in the
    same way and held until the thread is done, so that name servers that do not answer do not block look-ups of other
    names. Each request has its own connection, so that nothing that one image's host sent can reach another's request.
    There are no cookies, credentials or proxies, and compression is not requested.
    """

    def __init__(
        self,
        limits: ImageLimits,
        *,
        resolver: Resolver | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """resolver, ssl_context: replace the system's name resolution and its certificate authorities."""
        self._limits = limits
        self.transfers = FetchSlots(limits.max_concurrent_fetches)
        self.look_ups = FetchSlots(min(MAX_LOOK_UPS, limits.max_concurrent_fetches))
        domains = limits.allowed_domains
        self._domains = None if domains is None else set(map(canonical_host, domains))
        self._allow_private = AllowedPrivate(limits.allow_private)
        self._resolver = resolver or resolve
        self._given_ssl_context = ssl_context
        self._threads = ThreadPoolExecutor(self.look_ups.total, "image-dns")

    @cached_property
    def _ssl_context(self) -> ssl.SSLContext:
        """The system's certificate authorities and certifi's."""
        return self._given_ssl_context or httpcore.default_ssl_context()

    async def fetch(self, url: str, request: Hashable | None = None) -> Body:
        """Fetch an image for a request, whose images share its slots. Cancelled, it closes its socket.

        Raises:
            ImageProblem: The image cannot be fetched.
            Unavailable: This process is short of descriptors or threads.
        """
        target = self._checked(parse_target(url))
        fetch = _Fetch(object() if request is None else request, self._limits.fetch_timeout)
        try:
            return await self._follow(target, fetch)
        except (httpcore.NetworkError, httpcore.ProtocolError, OSError, RuntimeError) as error:
            if (what := shortage(error)) is not None:
                raise short_of(what) from error
            if isinstance(error, RuntimeError):
                raise
            if isinstance(error, httpcore.ConnectError):
                raise ImageProblem(_unreachable(error), ImageFetchFailed) from error
            raise ImageProblem(
                "its host broke off the transfer or does not speak proper HTTP", ImageFetchFailed
            ) from error

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _checked(self, target: Target) -> Target:
        if self._domains is not None and target.host not in self._domains:
            raise ImageProblem("its host is not one of option.allowed_media_domains")
        return target

    async def _follow(self, target: Target, fetch: _Fetch) -> Body:
        reply = await self._hop(target, fetch)
        for _ in range(self._limits.max_redirects):
            if isinstance(reply, Body):
                return reply
            try:
                target = self._checked(target.follow(reply))
                reply = await self._hop(target, fetch)
            except ImageProblem as problem:
                if problem.error is ImageFetchTimeout:
                    raise  # all hops share the time
                raise ImageProblem(f"after a redirect, {problem.reason}", problem.error) from problem
        if isinstance(reply, Body):
            return reply
        raise ImageProblem(
            f"its host redirects more than {self._limits.max_redirects} times (option.image_fetch_max_redirects)",
            ImageFetchFailed,
        )

    async def _hop(self, target: Target, fetch: _Fetch) -> Body | str:
        """Send one request; return the body, or the location that it redirects to."""
        found = await self._look_up(target, fetch)
        addresses = checked(target.host, found, self._allow_private)
        claim = claim_for(fetch.request, target.host, target.port, addresses[0])
        with await self.transfers.take(claim):
            network = CheckedBackend(addresses, asyncio.get_running_loop().time() + fetch.left)
            try:
                async with self._in_time(fetch):
                    reply = await self._ask(target, network)
            except ImageProblem as problem:
                if problem.error is ImageFetchTimeout:
                    self.transfers.timed_out(claim, connected=network.connected)
                raise
            except httpcore.TimeoutException as error:
                self.transfers.timed_out(claim, connected=network.connected)
                raise ImageProblem("its host cannot be reached", ImageFetchFailed) from error
            finally:
                await network.close()
            self.transfers.delivered(claim)
            return reply

    async def _look_up(self, target: Target, fetch: _Fetch) -> Sequence[str]:
        with suppress(ValueError):
            return [str(ipaddress.ip_address(target.host))]
        claim = claim_for(fetch.request, target.host, target.port)
        slot = await self.look_ups.take(claim)
        try:
            looking = self._threads.submit(self._resolver, target.host, target.port)
        except BaseException:
            slot.close()
            raise
        _release_after(looking, slot)
        try:
            async with self._in_time(fetch):
                found = await asyncio.wrap_future(looking)
        except ImageProblem:
            self.look_ups.timed_out(claim, connected=False)
            raise
        except (OSError, UnicodeError) as error:
            if shortage(error) is not None:
                raise
            raise ImageProblem("its host name cannot be resolved", ImageFetchFailed) from error
        self.look_ups.delivered(claim)
        return found

    @asynccontextmanager
    async def _in_time(self, fetch: _Fetch) -> AsyncIterator[None]:
        """Spend the fetch's time. Raises ImageProblem when none is left."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        limit = asyncio.timeout(fetch.left)
        try:
            async with limit:
                yield
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise ImageProblem(
                f"it did not arrive within {self._limits.fetch_timeout:g} seconds (option.image_fetch_timeout)",
                ImageFetchTimeout,
            ) from error
        finally:
            fetch.left -= loop.time() - began

    async def _ask(self, target: Target, network: CheckedBackend) -> Body | str:
        context = self._ssl_context if target.scheme == "https" else None
        url = httpcore.URL(
            scheme=target.scheme.encode(),
            host=target.host.encode(),
            port=target.port,
            target=target.path.encode(),
        )
        headers: dict[str | bytes, str | bytes] = {
            "Host": target.authority,
            "User-Agent": USER_AGENT,
            "Accept": "image/*, */*;q=0.5",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        async with (
            httpcore.AsyncConnectionPool(context, max_connections=1, network_backend=network) as connection,
            connection.stream("GET", url, headers=headers) as response,
        ):
            fields = {name.lower(): value for name, value in response.headers}
            if response.status in REDIRECTS and b"location" in fields:
                return fields[b"location"].decode("utf-8", "replace")
            if response.status != 200:
                raise ImageProblem(f"its host answered with HTTP status {response.status}", ImageFetchFailed)
            network.begin_body(self._limits.max_bytes)
            pieces = await self._pieces(response, fields.get(b"content-length", b"0"))
            encoding = b",".join(value for name, value in response.headers if name.lower() == b"content-encoding")
            return Body(pieces, codings_of(encoding))

    async def _pieces(self, response: httpcore.Response, length: bytes) -> list[bytes]:
        left = self._limits.max_bytes
        if not length.isdigit() or len(length) > 18 or int(length) > left:
            raise too_many_bytes(self._limits.max_bytes)
        pieces: list[bytes] = []
        async for piece in response.aiter_stream():
            left -= len(piece)
            if left < 0:
                raise too_many_bytes(self._limits.max_bytes)
            pieces.append(piece)
            if len(pieces) % PIECES_PER_TURN == 0:
                if self._limits.max_bytes - left < (len(pieces) - PIECES_PER_TURN) * MIN_PIECE_BYTES:
                    raise ImageProblem("its host sends it in absurdly small pieces", ImageFetchFailed)
                await asyncio.sleep(0)
        return pieces


def _release_after(looking: Future[Sequence[str]], slot: ExitStack) -> None:
    """Release the slot when the thread has ended, which may be long after its caller was cancelled."""
    loop = asyncio.get_running_loop()

    def release(_: Future[Sequence[str]]) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(slot.close)

    looking.add_done_callback(release)


def _unreachable(error: httpcore.ConnectError) -> str:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return "its host's TLS certificate cannot be verified"
    return "its host cannot be reached" if cause is None else "its host does not speak proper TLS"


class CheckedBackend(httpcore.AsyncNetworkBackend):
    """The network for one request of an image. TLS still verifies the host's name: only the connection is pinned.

    It has no timeouts of its own, because one deadline covers the fetch. `close` leaves no socket open, even
    if the fetch is cancelled during a handshake.

    What may be read is counted. Until the reply's header is complete, it is read in small portions: a flood of interim
    replies is parsed without a pause, and so must not arrive in one piece.
    """

    def __init__(self, addresses: Sequence[str], deadline: float) -> None:
        """addresses: tried in order. deadline: by the event loop's clock; the time is divided among the addresses."""
        self._addresses = addresses
        self._deadline = deadline
        self._network = httpcore.AnyIOBackend()
        self._opened: list[httpcore.AsyncNetworkStream] = []
        self._left = HEAD_BYTES
        self._problem = ImageProblem("its host sent too large a reply header", ImageFetchFailed)
        self.portion = HEAD_READ

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
                return CountedStream(stream, self)
        raise failure

    def begin_body(self, max_bytes: int) -> None:
        """Allow the body; chunk framing may add a quarter to it."""
        self._left = max_bytes + max_bytes // 4 + HEAD_BYTES
        self._problem = too_many_bytes(max_bytes)
        self.portion = BODY_READ

    def count(self, read: int) -> None:
        self._left -= read
        if self._left < 0:
            raise self._problem

    async def close(self) -> None:
        with anyio.CancelScope(shield=True):
            for stream in self._opened:
                await stream.aclose()


class CountedStream(httpcore.AsyncNetworkStream):
    """A stream of a `CheckedBackend`, which counts what is read."""

    def __init__(self, stream: httpcore.AsyncNetworkStream, network: CheckedBackend) -> None:
        self._stream = stream
        self._network = network

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data = await self._stream.read(min(max_bytes, self._network.portion))
        self._network.count(len(data))
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._stream.write(buffer)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        return CountedStream(await self._stream.start_tls(ssl_context, server_hostname), self._network)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
