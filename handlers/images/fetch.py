"""Pictures over HTTP from hosts that may mean harm: one deadline, a cap on bytes, every hop checked."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import httpcore

from handlers.errors import ImageFetchFailed, ImageFetchTimeout, ImageTooLarge
from handlers.images.address import AllowedPrivate
from handlers.images.connect import CheckedBackend, Resolver, resolve
from handlers.images.encoding import codings_of
from handlers.images.problem import PictureProblem
from handlers.images.target import Target, canonical_host, parse_target

logging.getLogger("httpcore").setLevel(logging.INFO)  # below, it writes redirects with their secrets

REDIRECTS = {301, 302, 303, 307, 308}
USER_AGENT = "lmi-handler"
BREATH = 64  # pieces of a body taken before other tasks get a turn
LEAST_PIECE = 64  # bytes per piece, on average, from the second breath on


@dataclass(frozen=True, slots=True)
class Body:
    """codings: that its host says it has put around the image, first to last."""

    pieces: list[bytes]
    codings: tuple[str, ...]


class Fetcher:
    """Fetches pictures, at most `max_concurrent` at a time.

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
        waiting for a turn does not count.
        """
        self._timeout = timeout
        self._max_bytes = max_bytes
        self._max_redirects = max_redirects
        self._turns = asyncio.Semaphore(max_concurrent)
        self._domains = None if allowed_domains is None else set(map(canonical_host, allowed_domains))
        self._allow_private = AllowedPrivate(allow_private)
        self._resolver = resolver or resolve
        self._given_ssl_context = ssl_context
        # Its own threads: a name server that does not answer must not hold up anything else.
        self._resolving = ThreadPoolExecutor(min(32, max_concurrent), "image-dns")

    @cached_property
    def _ssl_context(self) -> ssl.SSLContext:
        """The system's certificate authorities and certifi's."""
        return self._given_ssl_context or httpcore.default_ssl_context()

    async def fetch(self, url: str) -> Body:
        """What is behind `url`. Raises PictureProblem. Cancelled, it closes its socket."""
        target = self._checked(parse_target(url))
        async with self._turns:
            try:
                async with asyncio.timeout(self._timeout) as limit:
                    return await self._follow(target, limit.when() or 0.0)
            except TimeoutError as error:
                raise PictureProblem(
                    f"it did not arrive within {self._timeout:g} seconds (option.image_fetch_timeout)",
                    ImageFetchTimeout,
                ) from error
            except httpcore.TimeoutException as error:
                raise PictureProblem("its host cannot be reached", ImageFetchFailed) from error
            except httpcore.ConnectError as error:
                raise PictureProblem(_unreachable(error), ImageFetchFailed) from error
            except (httpcore.NetworkError, httpcore.ProtocolError, ssl.SSLError, OSError) as error:
                raise PictureProblem(
                    "its host broke off the transfer or does not speak proper HTTP", ImageFetchFailed
                ) from error

    def close(self) -> None:
        self._resolving.shutdown(wait=False, cancel_futures=True)

    def _checked(self, target: Target) -> Target:
        if self._domains is not None and target.host not in self._domains:
            raise PictureProblem("its host is not one of option.allowed_media_domains")
        return target

    async def _follow(self, target: Target, deadline: float) -> Body:
        reply = await self._hop(target, deadline)
        for _ in range(self._max_redirects):
            if isinstance(reply, Body):
                return reply
            try:
                target = self._checked(target.follow(reply))
                reply = await self._hop(target, deadline)
            except PictureProblem as problem:
                raise PictureProblem(f"after a redirect, {problem.reason}", problem.error) from problem
        if isinstance(reply, Body):
            return reply
        raise PictureProblem(
            f"its host redirects more than {self._max_redirects} times (option.image_fetch_max_redirects)",
            ImageFetchFailed,
        )

    async def _hop(self, target: Target, deadline: float) -> Body | str:
        """One request: the body, or where it redirects to."""
        network = CheckedBackend(self._resolver, self._resolving, self._allow_private, deadline)
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
        try:
            async with (
                httpcore.AsyncConnectionPool(
                    context, max_connections=1, network_backend=network
                ) as connection,
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
        finally:
            await network.close()

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


def _unreachable(error: httpcore.ConnectError) -> str:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return "its host's TLS certificate cannot be verified"
    return "its host cannot be reached" if cause is None else "its host does not speak proper TLS"
