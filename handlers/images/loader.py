"""From the URLs in a request to decoded pictures."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL.Image import Image

from engine.machine import usable_cores
from handlers.errors import ImageError, ImageFetchTimeout, Unavailable
from handlers.images.cache import DecodedCache, digest_of
from handlers.images.connect import Resolver
from handlers.images.data_url import decode_data_url, is_data_url
from handlers.images.decode import WHITE, Color, convert, decoded_bytes, prepare_pillow
from handlers.images.decoders import DecoderPool
from handlers.images.embeddings import EncodedEmbeddings, read_embeddings
from handlers.images.encoding import without_codings
from handlers.images.fetch import Body, Fetcher
from handlers.images.header import Header, read_header
from handlers.images.memory import PictureMemory
from handlers.images.problem import PictureProblem, too_many_pixels
from handlers.request import EmbeddingsPart, LoadedEmbeddings, LoadedImage, PicturePart

T = TypeVar("T")


@dataclass(frozen=True)
class ImageLimits:
    """What one picture may cost, and where it may come from.

    fetch_timeout: seconds for one picture, from resolving its host's name to its last byte, over all
    redirects. max_bytes: of the encoded picture. max_pixels: width times height.
    allowed_domains: exact host names, also of redirects; None for any public host.
    allow_private: hosts, addresses and networks (CIDR) that may be fetched from although they are not public.
    max_concurrent_fetches: of all requests together. cache_bytes: of decoded pictures, four per pixel, that are
    kept; memory_bytes: of those that requests hold, kept or not, and once more of what decoders take beside them.
    background: shows where they are transparent.
    """

    fetch_timeout: float = 10.0
    max_bytes: int = 20 * 2**20
    max_pixels: int = 89_478_485
    max_redirects: int = 3
    allowed_domains: tuple[str, ...] | None = None
    allow_private: tuple[str, ...] = ()
    max_concurrent_fetches: int = 64
    cache_bytes: int = 256 * 2**20
    memory_bytes: int = 1024 * 2**20
    background: Color = WHITE


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A picture's file, and what it says about itself."""

    data: bytes
    digest: bytes
    header: Header

    @property
    def size(self) -> int:
        """Bytes that its pixels will take."""
        return self.header.pixels * 4


@dataclass(frozen=True, slots=True)
class _Given:
    """A picture that the caller had already. digest: of nothing, but no other picture's."""

    image: Image
    digest: bytes
    size: int


@dataclass(frozen=True, slots=True)
class _Embedded:
    """Embeddings. digest: of nothing, since each request that holds the same has numbers of its own."""

    encoded: EncodedEmbeddings
    digest: bytes

    @property
    def size(self) -> int:
        return self.encoded.size


_File = _Encoded | _Given | _Embedded


class ImageLoader:
    """Fetches and decodes pictures for all requests of a process; decoding happens in processes of its own, and
    whatever else is costly in threads.

    Embeddings of pictures are read here as well: their memory is the same memory.

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
        self.memory = PictureMemory(limits.memory_bytes)
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
        self.decoders = DecoderPool(
            max_pixels=limits.max_pixels,
            max_bytes=limits.max_bytes,
            background=limits.background,
            memory_bytes=limits.memory_bytes,
        )
        self._threads = ThreadPoolExecutor(min(8, max(2, usable_cores())), "image-read")
        self._numbers = itertools.count()
        self._reading = [threading.Lock() for _ in range(64)]
        self._closed = False

    async def load(
        self, parts: Sequence[PicturePart], deadline: float | None = None, first_index: int = 0
    ) -> None:
        """Sets `loaded` of every part of one prompt, all at the same time; whoever called must `release` each.

        Nothing is decoded before the memory budget has room for all of them (see `PictureMemory`).
        deadline: `time.monotonic()` seconds. first_index: of the first part, in error messages. Raises the
        ImageError of the lowest index that fails (those before it are waited for) and abandons the others.
        Cancelled or failed, it leaves no socket open and no part loaded that was not before.
        """
        for part in parts:
            if isinstance(part, EmbeddingsPart) and part.given is not None:
                part.loaded = part.given
        wanted = [(first_index + i, part) for i, part in enumerate(parts) if part.loaded is None]
        request = object()  # whose images share their part of the fetch places
        try:
            files, failed = await _until_one_fails(
                [self._in_time(index, deadline, self._obtain, part, request) for index, part in wanted]
            )
            if files:
                wanted = wanted[: len(files)]
                await self._decode_all(wanted, files, deadline)
            if failed is not None:
                raise failed
        except BaseException:
            for _, part in wanted:
                part.release()
            raise

    async def aclose(self) -> None:
        """Accepts no more pictures; threads finish what they are at. Cancel the loads under way first."""
        self._closed = True
        self._fetcher.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self.decoders.aclose()

    async def _decode_all(
        self,
        wanted: Sequence[tuple[int, PicturePart]],
        files: Sequence[_File],
        deadline: float | None,
    ) -> None:
        sizes = [(file.digest, file.size) for file in files]
        shares = await self._in_time(wanted[0][0], deadline, self.memory.take, sizes)
        for (_, part), share in zip(wanted, shares, strict=True):
            part.share = share
        loaded, failed = await _until_one_fails(
            [
                self._in_time(index, deadline, self._decoded, file)
                for (index, _), file in zip(wanted, files, strict=True)
            ]
        )
        if failed is not None:
            raise failed
        for (_, part), picture in zip(wanted, loaded, strict=True):
            _give(part, picture)

    async def _in_time(
        self, index: int, deadline: float | None, work: Callable[..., Awaitable[T]], *given: Any
    ) -> T:
        limit = asyncio.timeout(None if deadline is None else max(0.0, deadline - time.monotonic()))
        try:
            async with limit:
                return await work(*given)
        except PictureProblem as problem:
            raise problem.error(index, problem.reason) from problem
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise ImageFetchTimeout(
                index, "it was not ready when the request's time was up (predict_timeout)"
            ) from error

    async def _obtain(self, part: PicturePart, request: object) -> _File:
        if isinstance(part, EmbeddingsPart):
            embedded = await self._in_thread(read_embeddings, part, self.limits.max_bytes)
            return _Embedded(embedded, b"embeddings %d" % next(self._numbers))
        url = part.url
        if part.given is not None:
            return _Given(part.given, b"given %d" % next(self._numbers), decoded_bytes(part.given))
        if url[:1].isspace() or url[-1:].isspace():
            url = url.strip()
        if is_data_url(url):
            return await self._encoded(url)
        body = await self._fetcher.fetch(url, request)
        self.fetched += 1
        self.bytes += sum(map(len, body.pieces))
        return await self._encoded(body)

    async def _encoded(self, source: str | Body) -> _Encoded:
        data, digest, header = await self._in_thread(self._read, source)
        if header is None:
            header = await self.decoders.measure(data)
        if header.pixels > self.limits.max_pixels:
            raise too_many_pixels(self.limits.max_pixels)
        return _Encoded(data, digest, header)

    def _read(self, source: str | Body) -> tuple[bytes, bytes, Header | None]:
        most = self.limits.max_bytes
        data = (
            decode_data_url(source, most)
            if isinstance(source, str)
            else without_codings(b"".join(source.pieces), source.codings, most)
        )
        return data, digest_of(data), read_header(data)

    def _convert(self, image: Image) -> LoadedImage:
        # A picture that prompts share is read from its file by the first of them: Pillow has no lock for that.
        with self._reading[id(image) % len(self._reading)]:
            flat = convert(image, self.limits.max_pixels, self.limits.background)
        digest = hashlib.sha256(b"RGB %d %d " % flat.size)
        digest.update(flat.tobytes())
        return LoadedImage(flat, digest.digest())

    async def _decoded(self, file: _File) -> LoadedImage | LoadedEmbeddings:
        if isinstance(file, _Embedded):
            return await self._in_thread(file.encoded.decode)
        if isinstance(file, _Given):
            return await self._in_thread(self._convert, file.image)
        picture, decoded = await self._cache.obtain(
            file.digest, lambda: self.decoders.decode(file.data, file.header)
        )
        self.decoded += decoded
        self.cache_hits += not decoded
        return picture

    async def _in_thread(self, work: Callable[..., T], *given: Any) -> T:
        if self._closed:
            raise Unavailable("the server is stopping", retry_after=5)
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *given)


def _give(part: PicturePart, loaded: LoadedImage | LoadedEmbeddings) -> None:
    if isinstance(part, EmbeddingsPart):
        assert isinstance(loaded, LoadedEmbeddings)
        part.loaded = loaded
    else:
        assert isinstance(loaded, LoadedImage)
        part.loaded = loaded


async def _until_one_fails(work: Sequence[Coroutine[Any, Any, T]]) -> tuple[list[T], ImageError | None]:
    """All at the same time: the results before the first that fails, and its error; the others are cancelled."""
    tasks = [asyncio.create_task(one) for one in work]
    done: list[T] = []
    try:
        for task in tasks:
            done.append(await task)
    except ImageError as error:
        return done, error
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return done, None
