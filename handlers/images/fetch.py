"""Fetches images over HTTP from hosts that may be hostile: one deadline, a limit on bytes, every redirect checked."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import ssl
from collections.abc import AsyncIterator, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import cached_property

import httpcore

from handlers.errors import ImageFetchFailed, ImageFetchTimeout, short_of
from handlers.images.connect import AllowedPrivate, CheckedBackend, Resolver, checked, resolve
from handlers.images.encoding import codings_of
from handlers.images.fetch_slots import FetchSlot, FetchSlots, claim_for
from handlers.images.limits import ImageLimits
from handlers.images.problem import ImageProblem, too_many_bytes
from handlers.images.target import Target, canonical_host, parse_target
from processes.shortage import shortage

logging.getLogger("httpcore").setLevel(logging.INFO)  # below, it writes redirects with their secrets

REDIRECTS = {301, 302, 303, 307, 308}
USER_AGENT = "lmi-handler"
BREATH = 64  # pieces of a body taken before other tasks get a turn
LEAST_PIECE = 64  # bytes per piece, on average, from the second breath on
MOST_LOOK_UPS = 32  # of host names at a time, each in a thread


@dataclass(frozen=True, slots=True)
class Body:
    """A reply's body.

    Attributes:
        pieces: The bytes, in the pieces that were received.
        codings: Codings that the host claims to have applied to the image, first to last.
    """

    pieces: list[bytes]
    codings: tuple[str, ...]


@dataclass(slots=True)
class _Fetch:
    """An image being fetched.

    Attributes:
        request: The request that it belongs to.
        left: Remaining seconds, while it does not wait for a slot.
    """

    request: Hashable
    left: float


class Fetcher:
    """Fetches images, at most `max_concurrent_fetches` at a time, shared among their hosts by `FetchSlots`.

    Names are looked up in threads, which cannot be stopped: they have slots of their own, shared in the same
    way and held until the thread is done, so that name servers that do not answer do not block look-ups of
    other names. Each request has its own connection: nothing that one image's host sent can reach another's
    request. There are no cookies, credentials or proxies, and compression is not requested.
    """

    def __init__(
        self,
        limits: ImageLimits,
        *,
        resolver: Resolver | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """Create a fetcher.

        Args:
            limits: Limits of each image; waiting for a slot does not count as time.
            resolver: Replaces the system's name resolution.
            ssl_context: Replaces the system's certificate authorities.
        """
        self._limits = limits
        self.transfers = FetchSlots(limits.max_concurrent_fetches)
        self.look_ups = FetchSlots(min(MOST_LOOK_UPS, limits.max_concurrent_fetches))
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
        """Fetch an image. Cancelled, it closes its socket.

        Args:
            url: The image's URL.
            request: The request that the image belongs to, whose images share its slots; None for a request
                of its own.

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
                    raise  # the time is that of all hops together
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
            except (ImageProblem, httpcore.TimeoutException) as error:
                if isinstance(error, ImageProblem) and error.error is not ImageFetchTimeout:
                    raise
                self.transfers.timed_out(claim, connected=network.connected)
                if isinstance(error, ImageProblem):
                    raise
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
            slot.release()
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
            network.budget.begin_body(self._limits.max_bytes)
            pieces = await self._pieces(response, fields.get(b"content-length", b"0"))
            encoding = b",".join(
                value for name, value in response.headers if name.lower() == b"content-encoding"
            )
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
            if len(pieces) % BREATH == 0:
                if self._limits.max_bytes - left < (len(pieces) - BREATH) * LEAST_PIECE:
                    raise ImageProblem("its host sends it in absurdly small pieces", ImageFetchFailed)
                await asyncio.sleep(0)
        return pieces


def _release_after(looking: Future[Sequence[str]], slot: FetchSlot) -> None:
    """Release the slot when the thread has ended, which may be long after its caller was cancelled."""
    loop = asyncio.get_running_loop()

    def release(_: Future[Sequence[str]]) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(slot.release)

    looking.add_done_callback(release)


def _unreachable(error: httpcore.ConnectError) -> str:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return "its host's TLS certificate cannot be verified"
    return "its host cannot be reached" if cause is None else "its host does not speak proper TLS"
