"""Pictures over HTTP from hosts that may mean harm: one deadline, a cap on bytes, every hop checked."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import ssl
from collections.abc import AsyncIterator, Collection, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import cached_property

import httpcore

from handlers.errors import ImageFetchFailed, ImageFetchTimeout, ImageTooLarge, short_of
from handlers.images.address import AllowedPrivate
from handlers.images.connect import CheckedBackend, Resolver, checked, resolve
from handlers.images.encoding import codings_of
from handlers.images.places import Place, Places, claim_for
from handlers.images.problem import PictureProblem
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
    """codings: that its host says it has put around the image, first to last."""

    pieces: list[bytes]
    codings: tuple[str, ...]


@dataclass(slots=True)
class _Fetch:
    """One image under way. left: seconds that it may still take, while it does not wait for a place."""

    request: Hashable
    left: float


class Fetcher:
    """Fetches pictures, at most `max_concurrent` at a time, shared among their hosts as `Places` says.

    Names are looked up in threads, which cannot be stopped: they are places of their own, shared in the same way, and
    held until the thread is done, so that name servers that do not answer hold up nobody else's look-ups.
    Each hop has a connection of its own: nothing that one picture's host sent can reach another's request.
    There are no cookies, credentials or proxies, and no compression is asked for.
    """

    def __init__(
        self,
        *,
        timeout: float,
        max_bytes: int,
        max_redirects: int,
        max_concurrent: int,
        allowed_domains: Collection[str] | None,
        allow_private: Collection[str],
        resolver: Resolver | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """timeout: seconds for one picture from the name's resolution to the last byte, over all redirects;
        waiting for a place does not count.
        """
        self._timeout = timeout
        self._max_bytes = max_bytes
        self._max_redirects = max_redirects
        self.transfers = Places(max_concurrent)
        self.look_ups = Places(min(MOST_LOOK_UPS, max_concurrent))
        self._domains = None if allowed_domains is None else set(map(canonical_host, allowed_domains))
        self._allow_private = AllowedPrivate(allow_private)
        self._resolver = resolver or resolve
        self._given_ssl_context = ssl_context
        self._threads = ThreadPoolExecutor(self.look_ups.total, "image-dns")

    @cached_property
    def _ssl_context(self) -> ssl.SSLContext:
        """The system's certificate authorities and certifi's."""
        return self._given_ssl_context or httpcore.default_ssl_context()

    async def fetch(self, url: str, request: Hashable | None = None) -> Body:
        """What is behind `url`. Raises PictureProblem, and Unavailable where this process is short of descriptors or
        threads. Cancelled, it closes its socket.

        request: whose images share a part of the places; None for a request of its own.
        """
        target = self._checked(parse_target(url))
        fetch = _Fetch(object() if request is None else request, self._timeout)
        try:
            return await self._follow(target, fetch)
        except (httpcore.NetworkError, httpcore.ProtocolError, OSError, RuntimeError) as error:
            if (what := shortage(error)) is not None:
                raise short_of(what) from error
            if isinstance(error, RuntimeError):
                raise
            if isinstance(error, httpcore.ConnectError):
                raise PictureProblem(_unreachable(error), ImageFetchFailed) from error
            raise PictureProblem(
                "its host broke off the transfer or does not speak proper HTTP", ImageFetchFailed
            ) from error

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _checked(self, target: Target) -> Target:
        if self._domains is not None and target.host not in self._domains:
            raise PictureProblem("its host is not one of option.allowed_media_domains")
        return target

    async def _follow(self, target: Target, fetch: _Fetch) -> Body:
        reply = await self._hop(target, fetch)
        for _ in range(self._max_redirects):
            if isinstance(reply, Body):
                return reply
            try:
                target = self._checked(target.follow(reply))
                reply = await self._hop(target, fetch)
            except PictureProblem as problem:
                if problem.error is ImageFetchTimeout:
                    raise  # of all hops together
                raise PictureProblem(f"after a redirect, {problem.reason}", problem.error) from problem
        if isinstance(reply, Body):
            return reply
        raise PictureProblem(
            f"its host redirects more than {self._max_redirects} times (option.image_fetch_max_redirects)",
            ImageFetchFailed,
        )

    async def _hop(self, target: Target, fetch: _Fetch) -> Body | str:
        """One request: the body, or where it redirects to."""
        found = await self._look_up(target, fetch)
        addresses = checked(target.host, found, self._allow_private)
        claim = claim_for(fetch.request, target.host, target.port, addresses[0])
        with await self.transfers.take(claim):
            network = CheckedBackend(addresses, asyncio.get_running_loop().time() + fetch.left)
            try:
                async with self._in_time(fetch):
                    reply = await self._ask(target, network)
            except (PictureProblem, httpcore.TimeoutException) as error:
                if isinstance(error, PictureProblem) and error.error is not ImageFetchTimeout:
                    raise
                self.transfers.timed_out(claim, connected=network.connected)
                if isinstance(error, PictureProblem):
                    raise
                raise PictureProblem("its host cannot be reached", ImageFetchFailed) from error
            finally:
                await network.close()
            self.transfers.delivered(claim)
            return reply

    async def _look_up(self, target: Target, fetch: _Fetch) -> Sequence[str]:
        with suppress(ValueError):
            return [str(ipaddress.ip_address(target.host))]
        claim = claim_for(fetch.request, target.host, target.port)
        place = await self.look_ups.take(claim)
        try:
            looking = self._threads.submit(self._resolver, target.host, target.port)
        except BaseException:
            place.release()
            raise
        _release_after(looking, place)
        try:
            async with self._in_time(fetch):
                found = await asyncio.wrap_future(looking)
        except PictureProblem:
            self.look_ups.timed_out(claim, connected=False)
            raise
        except (OSError, UnicodeError) as error:
            if shortage(error) is not None:
                raise
            raise PictureProblem("its host name cannot be resolved", ImageFetchFailed) from error
        self.look_ups.delivered(claim)
        return found

    @asynccontextmanager
    async def _in_time(self, fetch: _Fetch) -> AsyncIterator[None]:
        """Spend the fetch's time. Raises PictureProblem when none is left."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        limit = asyncio.timeout(fetch.left)
        try:
            async with limit:
                yield
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise PictureProblem(
                f"it did not arrive within {self._timeout:g} seconds (option.image_fetch_timeout)",
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
                raise PictureProblem(
                    f"its host answered with HTTP status {response.status}", ImageFetchFailed
                )
            network.budget.begin_body(self._max_bytes)
            pieces = await self._pieces(response, fields.get(b"content-length", b"0"))
            encoding = b",".join(
                value for name, value in response.headers if name.lower() == b"content-encoding"
            )
            return Body(pieces, codings_of(encoding))

    async def _pieces(self, response: httpcore.Response, length: bytes) -> list[bytes]:
        left = self._max_bytes
        if not length.isdigit() or len(length) > 18 or int(length) > left:
            raise self._too_large()
        pieces: list[bytes] = []
        async for piece in response.aiter_stream():
            left -= len(piece)
            if left < 0:
                raise self._too_large()
            pieces.append(piece)
            if len(pieces) % BREATH == 0:
                if self._max_bytes - left < (len(pieces) - BREATH) * LEAST_PIECE:
                    raise PictureProblem("its host sends it in absurdly small pieces", ImageFetchFailed)
                await asyncio.sleep(0)
        return pieces

    def _too_large(self) -> PictureProblem:
        return PictureProblem(
            f"it has more than {self._max_bytes} bytes (option.max_image_bytes)", ImageTooLarge
        )


def _release_after(looking: Future[Sequence[str]], place: Place) -> None:
    """Give the place back when the thread has ended, which may be long after its caller was cancelled."""
    loop = asyncio.get_running_loop()

    def release(_: Future[Sequence[str]]) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(place.release)

    looking.add_done_callback(release)


def _unreachable(error: httpcore.ConnectError) -> str:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return "its host's TLS certificate cannot be verified"
    return "its host cannot be reached" if cause is None else "its host does not speak proper TLS"
