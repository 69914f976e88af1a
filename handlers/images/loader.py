"""From the URLs in a request to decoded images."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import ssl
import string
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from urllib.parse import unquote

import numpy as np
import pybase64
from PIL.Image import Image

from engine.machine import usable_cores
from handlers.errors import ImageError, ImageFetchTimeout, stopping
from handlers.images import NO_SVG, ImageProblem, too_many_bytes, too_many_pixels
from handlers.images.decoder import convert, decoded_bytes, prepare_pillow
from handlers.images.decoder_pool import DecoderPool
from handlers.images.embeddings import read_embeddings
from handlers.images.fetch import Body, Fetcher, without_codings
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
        cache_hits: Number of images that did not have to be decoded, because one with the same content was
            cached or being decoded.
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

        Nothing is decoded before the memory budget allows all of them (see `ImageMemory`). If one fails, the
        images before it are waited for and the others are abandoned. Cancelled or failed, it leaves no socket
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
        """Accept no more images; threads finish what they have begun. Cancel the loads under way first."""
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
            convert_it = partial(self._in_thread, self._convert, part.given)
            return _Source(digest, decoded_bytes(part.given), convert_it)
        url = part.url
        if url[:1].isspace() or url[-1:].isspace():
            url = url.strip()
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
        # An image that several prompts share is read from its file by the first: Pillow has no lock for that.
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


MAX_HEADER = 1024
ACCEPTED_TYPES = {"", "image", "application/octet-stream", "binary/octet-stream"}
SLICE = 2**18
"""Number of characters of a URL that are decoded in one step."""

_DISCARDED = b" \t\r\n\f\v="
_STANDARD = bytes.maketrans(b"-_", b"+/")
"""Translates the URL-safe alphabet to the standard one."""

_PERCENT = ord("%")
_HEX = np.array([int(chr(code), 16) if chr(code) in string.hexdigits else 255 for code in range(256)], np.uint8)


def is_data_url(url: str) -> bool:
    """Tell whether a URL is a `data:` URL."""
    return url[:5].lower() == "data:"


def decode_data_url(url: str, max_bytes: int, slice_characters: int = SLICE) -> bytes:
    """Decode a `data:` URL. Run it in a thread: it costs a few milliseconds per megabyte.

    The declared type is not trusted (the content decides), but a type that is not an image's is refused.
    Base64 may be wrapped, percent-encoded, URL-safe or without padding. It is decoded in slices, between
    which other threads run, and no further than `max_bytes`: in addition to the URL at most twice the decoded
    bytes are held.

    Raises:
        ImageProblem: The URL cannot be decoded, or holds too much.
    """
    comma = url.find(",", 5, 5 + MAX_HEADER)
    if comma < 0:
        raise ImageProblem("its data URL has no comma; write data:image/jpeg;base64,...")
    media_type, *parameters = (field.strip().lower() for field in unquote(url[5:comma]).split(";"))
    _check_type(media_type)
    if len(url) - comma > 4 * max_bytes + MAX_HEADER:  # 4: base64 and percent-encoding both, at their worst
        raise too_many_bytes(max_bytes)
    decoded = _base64 if "base64" in parameters else _percent
    pieces: list[bytes] = []
    size = 0
    for piece in decoded(_slices(url, comma + 1, slice_characters)):
        size += len(piece)
        if size > max_bytes:
            raise too_many_bytes(max_bytes)
        pieces.append(piece)
    if not size:
        raise ImageProblem("its data URL is empty")
    return b"".join(pieces)


def _check_type(media_type: str) -> None:
    if media_type.startswith("image/svg"):
        raise ImageProblem(NO_SVG)
    if not media_type.startswith("image/") and media_type not in ACCEPTED_TYPES:
        raise ImageProblem("its data URL does not declare an image; write data:image/jpeg;base64,...")


def _base64(slices: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for coded in slices:
        letters = rest + _unquoted(coded).translate(_STANDARD, _DISCARDED)
        whole = len(letters) - len(letters) % 4
        letters, rest = letters[:whole], letters[whole:]
        yield _decoded(letters)
    yield _decoded(rest + b"=" * (-len(rest) % 4))


def _decoded(letters: bytes) -> bytes:
    try:
        return pybase64.b64decode(letters, validate=True)
    except ValueError as error:
        raise ImageProblem("its data URL is not valid base64") from error


def _percent(slices: Iterator[bytes]) -> Iterator[bytes]:
    return map(_unquoted, slices)


def _slices(url: str, start: int, size: int) -> Iterator[bytes]:
    """Yield the text from `start` on; no slice ends within a `%41`."""
    while start < len(url):
        end = start + size
        if end < len(url) and (cut := url.find("%", end - 2, end)) >= 0:
            end = cut
        yield url[start:end].encode("utf-8", "replace")
        start = end


def _unquoted(coded: bytes) -> bytes:
    """Unquote like urllib.parse.unquote_to_bytes, but without an object for each escape."""
    if b"%" not in coded:
        return coded
    letters = np.frombuffer(coded, np.uint8)
    at = np.flatnonzero(letters[:-2] == _PERCENT)
    high, low = _HEX[letters[at + 1]], _HEX[letters[at + 2]]
    escapes = (high | low) < 16
    at = at[escapes]
    out = letters.copy()
    out[at] = (high[escapes] << 4) | low[escapes]
    kept = np.ones(len(out), bool)
    kept[at + 1] = kept[at + 2] = False
    return out[kept].tobytes()
