"""From the URLs in a request to decoded pictures."""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from handlers.errors import ImageFetchTimeout
from handlers.images.cache import DecodedCache
from handlers.images.connect import Resolver
from handlers.images.data_url import decode_data_url, is_data_url
from handlers.images.decode import decode, prepare_pillow
from handlers.images.fetch import Fetcher
from handlers.images.problem import PictureProblem
from handlers.request import ImagePart, LoadedImage


@dataclass(frozen=True)
class ImageLimits:
    """What one picture may cost, and where it may come from.

    fetch_timeout: seconds for one picture, from resolving its host's name to its last byte, over all
    redirects. max_bytes: of the encoded picture. max_pixels: width times height.
    allowed_domains: exact host names, also of redirects; None for any public host.
    allow_private: hosts, addresses and networks (CIDR) that may be fetched from although they are not public.
    max_concurrent_fetches: of all requests together. cache_bytes: of decoded pictures, four per pixel.
    """

    fetch_timeout: float = 10.0
    max_bytes: int = 20 * 2**20
    max_pixels: int = 89_478_485
    max_redirects: int = 3
    allowed_domains: tuple[str, ...] | None = None
    allow_private: tuple[str, ...] = ()
    max_concurrent_fetches: int = 64
    cache_bytes: int = 256 * 2**20


class ImageLoader:
    """Fetches and decodes pictures for all requests of a process; everything costly happens in threads.

    fetched, bytes: pictures that came over HTTP and their sizes together. decoded: pictures decoded,
    wherever they came from. cache_hits: pictures that did not have to be, because one with the same content
    was there or under way.
    """

    def __init__(
        self,
        limits: ImageLimits,
        *,
        resolver: Resolver | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """resolver and ssl_context replace the system's name resolution and certificate authorities."""
        prepare_pillow(limits.max_pixels)
        self.limits = limits
        self.fetched = 0
        self.bytes = 0
        self.decoded = 0
        self.cache_hits = 0
        self._cache = DecodedCache(limits.cache_bytes)
        self._fetcher = Fetcher(
            timeout=limits.fetch_timeout,
            max_bytes=limits.max_bytes,
            max_redirects=limits.max_redirects,
            max_concurrent=limits.max_concurrent_fetches,
            allowed_domains=limits.allowed_domains,
            allow_private=limits.allow_private,
            resolver=resolver,
            ssl_context=ssl_context,
        )
        self._threads = ThreadPoolExecutor(min(8, max(2, os.cpu_count() or 1)), "image-decode")
        self._decode = partial(decode, max_pixels=limits.max_pixels)

    async def load(self, parts: Sequence[ImagePart], deadline: float | None = None) -> None:
        """Sets `loaded` of every part, all at the same time.

        deadline: `time.monotonic()` seconds. Raises the ImageError of the lowest index that fails (those
        before it are waited for) and abandons the others. Cancelled, it abandons all and leaves no socket
        open.
        """
        tasks = [
            asyncio.create_task(self._load_one(index, part, deadline))
            for index, part in enumerate(parts)
            if part.loaded is None
        ]
        try:
            for task in tasks:
                await task
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def aclose(self) -> None:
        """Accepts no more pictures; threads finish what they are at. Cancel the loads under way first."""
        self._fetcher.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _load_one(self, index: int, part: ImagePart, deadline: float | None) -> None:
        limit = asyncio.timeout(None if deadline is None else max(0.0, deadline - time.monotonic()))
        try:
            async with limit:
                part.loaded = await self._obtain(part.url)
        except PictureProblem as problem:
            raise problem.error(index, problem.reason) from problem
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise ImageFetchTimeout(index, "it was not ready when the request's time was up") from error

    async def _obtain(self, url: str) -> LoadedImage:
        if url[:1].isspace() or url[-1:].isspace():
            url = url.strip()
        if is_data_url(url):
            return await self._in_thread(url)
        pieces = await self._fetcher.fetch(url)
        self.fetched += 1
        self.bytes += sum(map(len, pieces))
        return await self._in_thread(pieces)

    async def _in_thread(self, source: str | list[bytes]) -> LoadedImage:
        loop = asyncio.get_running_loop()
        future, decoded = await loop.run_in_executor(self._threads, self._decode_source, source)
        picture = future.result() if future.done() else await asyncio.shield(asyncio.wrap_future(future))
        self.decoded += decoded
        self.cache_hits += not decoded
        return picture

    def _decode_source(self, source: str | list[bytes]) -> tuple[Future[LoadedImage], bool]:
        data = decode_data_url(source, self.limits.max_bytes) if isinstance(source, str) else b"".join(source)
        return self._cache.obtain(data, self._decode)
