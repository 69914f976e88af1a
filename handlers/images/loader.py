"""Loads the images of requests: has them fetched, checked, decoded and cached."""

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
from functools import partial
from typing import Any, TypeVar

from PIL.Image import Image

from engine.machine import usable_cores
from handlers.errors import ImageError, ImageFetchTimeout, stopping
from handlers.images import ImageProblem, too_many_pixels
from handlers.images.codings import without_codings
from handlers.images.data_url import decode_data_url, is_data_url
from handlers.images.decoder import convert, decoded_bytes, prepare_pillow
from handlers.images.decoder_pool import DecoderPool
from handlers.images.embeddings import read_embeddings
from handlers.images.fetch import Body, Fetcher
from handlers.images.formats import Header, read_header
from handlers.images.limits import DecodedCache, ImageLimits, ImageMemory
from handlers.images.target import Resolver
from handlers.request import EmbeddingsPart, LoadedEmbeddings, LoadedImage, MediaPart

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Source:
    """An image, or embeddings, that have been read but not decoded.

    Attributes:
        digest: Of the file; a unique placeholder for an image object and for embeddings, of which each request has
            its own copy.
        size: Bytes of the decoded pixels or numbers.
        decode: Decodes them.
    """

    digest: bytes
    size: int
    decode: Callable[[], Awaitable[LoadedImage | LoadedEmbeddings]]


class ImageLoader:
    """Fetches and decodes images for all requests of a process.

    Decoding runs in separate processes, and other costly work in threads. Embeddings of images are read here
    as well, because they share the memory budget.

    Attributes:
        fetched: Number of images fetched over HTTP.
        bytes: Sum of their sizes.
        decoded: Number of images decoded, whatever their source.
        cache_hits: Number of images that did not have to be decoded, because one with the same content was cached or
            being decoded.
    """

    def __init__(
        self,
        limits: ImageLimits,
        *,
        resolver: Resolver | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """resolver, ssl_context: replace the system's name resolution and its certificate authorities."""
        prepare_pillow(limits.max_pixels)
        self.limits = limits
        self.fetched = 0
        self.bytes = 0
        self.decoded = 0
        self.cache_hits = 0
        self.memory = ImageMemory(limits.memory_bytes)
        self._cache = DecodedCache(limits.cache_bytes)
        self._fetcher = Fetcher(limits, resolver=resolver, ssl_context=ssl_context)
        self.decoders = DecoderPool(limits)
        self._threads = ThreadPoolExecutor(min(8, max(2, usable_cores())), "image-read")
        self._numbers = itertools.count()
        self._reading = [threading.Lock() for _ in range(64)]
        self._closed = False

    async def load(self, parts: Sequence[MediaPart], deadline: float | None = None, first_index: int = 0) -> None:
        """Set `loaded` of every part of one prompt, all at the same time; the caller must `release` each part.

        Nothing is decoded before the memory budget allows all of them (see `ImageMemory`). If one fails, the images
        before it are still loaded and the others are abandoned. If this fails or is cancelled, it leaves no socket
        open, and no part loaded that was not loaded before.

        Args:
            parts: Images of the prompt.
            deadline: In seconds of `time.monotonic()`.
            first_index: Number of the first part in error messages.

        Raises:
            ImageError: Of the first image that fails.
        """
        for part in parts:
            if isinstance(part, EmbeddingsPart) and part.given is not None:
                part.loaded = part.given
        wanted = [(first_index + i, part) for i, part in enumerate(parts) if part.loaded is None]
        request = object()  # its images share the fetch slots of one request
        try:
            sources, failed = await _until_one_fails(
                [self._in_time(index, deadline, self._obtain, part, request) for index, part in wanted]
            )
            if sources:
                wanted = wanted[: len(sources)]
                await self._decode_all(wanted, sources, deadline)
            if failed is not None:
                raise failed
        except BaseException:
            for _, part in wanted:
                part.release()
            raise

    async def aclose(self) -> None:
        """Accept no more images. Threads finish what they have begun. Cancel the loads in progress first."""
        self._closed = True
        self._fetcher.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self.decoders.aclose()

    async def _decode_all(
        self,
        wanted: Sequence[tuple[int, MediaPart]],
        sources: Sequence[_Source],
        deadline: float | None,
    ) -> None:
        sizes = [(source.digest, source.size) for source in sources]
        shares = await self._in_time(wanted[0][0], deadline, self.memory.take, sizes)
        for (_, part), share in zip(wanted, shares, strict=True):
            part.share = share
        loaded, failed = await _until_one_fails(
            [self._in_time(index, deadline, source.decode) for (index, _), source in zip(wanted, sources, strict=True)]
        )
        if failed is not None:
            raise failed
        for (_, part), result in zip(wanted, loaded, strict=True):
            part.loaded = result

    async def _in_time(self, index: int, deadline: float | None, work: Callable[..., Awaitable[T]], *given: Any) -> T:
        limit = asyncio.timeout(None if deadline is None else max(0.0, deadline - time.monotonic()))
        try:
            async with limit:
                return await work(*given)
        except ImageProblem as problem:
            raise problem.error(index, problem.reason) from problem
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise ImageFetchTimeout(
                index, "it was not ready when the request's time was up (predict_timeout)"
            ) from error

    async def _obtain(self, part: MediaPart, request: object) -> _Source:
        if isinstance(part, EmbeddingsPart):
            embedded = await self._in_thread(read_embeddings, part, self.limits.max_bytes)
            digest = b"embeddings %d" % next(self._numbers)
            return _Source(digest, embedded.size, partial(self._in_thread, embedded.decode))
        if part.given is not None:
            digest = b"given %d" % next(self._numbers)
            return _Source(digest, decoded_bytes(part.given), partial(self._in_thread, self._convert, part.given))
        url = part.url.strip()
        if is_data_url(url):
            return await self._encoded(url)
        body = await self._fetcher.fetch(url, request)
        self.fetched += 1
        self.bytes += sum(map(len, body.pieces))
        return await self._encoded(body)

    async def _encoded(self, source: str | Body) -> _Source:
        data, digest, header = await self._in_thread(self._read, source)
        if header is None:
            header = await self.decoders.measure(data)
        if header.pixels > self.limits.max_pixels:
            raise too_many_pixels(self.limits.max_pixels)
        return _Source(digest, header.pixels * 4, partial(self._decoded, digest, data, header))

    def _read(self, source: str | Body) -> tuple[bytes, bytes, Header | None]:
        most = self.limits.max_bytes
        data = (
            decode_data_url(source, most)
            if isinstance(source, str)
            else without_codings(b"".join(source.pieces), source.codings, most)
        )
        return data, hashlib.sha256(data).digest(), read_header(data)

    def _convert(self, image: Image) -> LoadedImage:
        # Several prompts may share an image, and the first reads it from its file: Pillow has no lock for that.
        with self._reading[id(image) % len(self._reading)]:
            flat = convert(image, self.limits.max_pixels, self.limits.background)
        digest = hashlib.sha256(b"RGB %d %d " % flat.size)
        digest.update(flat.tobytes())
        return LoadedImage(flat, digest.digest())

    async def _decoded(self, digest: bytes, data: bytes, header: Header) -> LoadedImage:
        image, decoded = await self._cache.obtain(digest, lambda: self.decoders.decode(data, header))
        self.decoded += decoded
        self.cache_hits += not decoded
        return image

    async def _in_thread(self, work: Callable[..., T], *given: Any) -> T:
        if self._closed:
            raise stopping()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *given)


async def _until_one_fails(work: Sequence[Coroutine[Any, Any, T]]) -> tuple[list[T], ImageError | None]:
    """Run all at the same time.

    Returns:
        The results before the first that fails, and its error; the others are cancelled.
    """
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
