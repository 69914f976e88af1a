"""What images may cost: the operator's limits, a budget of memory for those of all requests, and a cache."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

from PIL.Image import Image

from handlers.images.decoder import WHITE, Color, decoded_bytes
from handlers.request import LoadedImage
from properties.settings import VisionSettings

_DEFAULTS = VisionSettings()


@dataclass(frozen=True)
class ImageLimits:
    """The options of `VisionSettings` about images, with sizes in bytes.

    max_concurrent_fetches: of all requests together.
    """

    fetch_timeout: float = _DEFAULTS.image_fetch_timeout
    max_bytes: int = _DEFAULTS.max_image_bytes
    max_pixels: int = _DEFAULTS.max_image_pixels
    max_redirects: int = _DEFAULTS.image_fetch_max_redirects
    allowed_domains: tuple[str, ...] | None = None
    allow_private: tuple[str, ...] = ()
    max_concurrent_fetches: int = 64
    cache_bytes: int = _DEFAULTS.image_cache_mb * 2**20
    memory_bytes: int = _DEFAULTS.image_memory_mb * 2**20
    background: Color = WHITE

    @classmethod
    def of(cls, settings: VisionSettings) -> ImageLimits:
        """Read the limits from the user's configuration."""
        domains = settings.allowed_media_domains
        background = (settings.media_io_kwargs or {}).get("image", {}).get("rgba_background_color", WHITE)
        red, green, blue = background
        return cls(
            fetch_timeout=settings.image_fetch_timeout,
            max_bytes=settings.max_image_bytes,
            max_pixels=settings.max_image_pixels,
            max_redirects=settings.image_fetch_max_redirects,
            allowed_domains=None if domains is None else tuple(domains),
            allow_private=tuple(settings.image_fetch_allow_private),
            cache_bytes=settings.image_cache_mb * 2**20,
            memory_bytes=settings.image_memory_mb * 2**20,
            background=(red, green, blue),
        )


Wanted = tuple[bytes, int]
"""An image's digest, and the bytes of its pixels."""


class ImageMemory:
    """Limits what all requests together may hold. Used on one event loop.

    A prompt asks once for all of its images, so it never holds some while it waits for others. A prompt that needs more
    than the capacity is served when no memory is in use. Images with the same content are counted once.
    """

    def __init__(self, capacity: int, most_passes: int = 0) -> None:
        """capacity: in bytes. most_passes: how many requests that fit may overtake one that waits and does not fit."""
        self.capacity = capacity
        self._most_passes = most_passes
        self.used = 0
        self._held: dict[bytes, _Held] = {}
        self._queue: deque[_Waiting] = deque()

    async def take(self, images: Sequence[Wanted]) -> list[Share]:
        """Wait for a share for each image. If cancelled, it leaves nothing behind."""
        if not self._queue and self._fits(images):
            return self._grant(images)
        waiting = _Waiting(images)
        self._queue.append(waiting)
        self._serve()
        try:
            return await waiting.turn
        except asyncio.CancelledError:
            if waiting.turn.done() and not waiting.turn.cancelled():
                for share in waiting.turn.result():
                    share.release()
            elif waiting in self._queue:
                self._queue.remove(waiting)
                self._serve()
            raise

    def _fits(self, images: Sequence[Wanted]) -> bool:
        more = sum(size for digest, size in dict(images).items() if digest not in self._held)
        return self.used == 0 or self.used + more <= self.capacity

    def _grant(self, images: Sequence[Wanted]) -> list[Share]:
        for digest, size in images:
            held = self._held.get(digest)
            if held is None:
                self._held[digest] = held = _Held(size)
                self.used += size
            held.holders += 1
        return [Share(self, digest) for digest, _ in images]

    def _serve(self) -> None:
        while self._queue and self._fits(self._queue[0].images):
            self._admit(self._queue.popleft())
        if not self._queue or self._queue[0].passes >= self._most_passes:
            return
        first = self._queue[0]
        for waiting in [*self._queue][1:]:
            if self._fits(waiting.images):
                self._queue.remove(waiting)
                self._admit(waiting)
                first.passes += 1
                if first.passes >= self._most_passes:
                    return

    def _admit(self, waiting: _Waiting) -> None:
        if not waiting.turn.cancelled():
            waiting.turn.set_result(self._grant(waiting.images))

    def _give_back(self, digest: bytes) -> None:
        held = self._held[digest]
        held.holders -= 1
        if held.holders == 0:
            del self._held[digest]
            self.used -= held.size
            self._serve()


class Share:
    """One prompt's hold on the memory of one image. Releasing it again has no effect."""

    __slots__ = ("_digest", "_memory")

    def __init__(self, memory: ImageMemory, digest: bytes) -> None:
        self._memory: ImageMemory | None = memory
        self._digest = digest

    def handed_over(self, more: int) -> Share:
        """Pass the hold on to a new share; releasing this one then has no effect.

        Args:
            more: Additional bytes that the image uses from now on, even if they exceed the capacity.
        """
        assert self._memory is not None
        memory, self._memory = self._memory, None
        memory._held[self._digest].size += more
        memory.used += more
        return Share(memory, self._digest)

    def release(self) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            memory._give_back(self._digest)


@dataclass(slots=True)
class _Held:
    size: int
    holders: int = 0


@dataclass(slots=True, eq=False)
class _Waiting:
    """A prompt that waits. passes: how many later prompts have overtaken it."""

    images: Sequence[Wanted]
    passes: int = 0
    turn: asyncio.Future[list[Share]] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(slots=True, eq=False)
class _Decoding:
    task: asyncio.Task[LoadedImage]
    waiters: int = 0


class DecodedCache:
    """An LRU cache of decoded images, limited to `capacity` bytes; 0 disables it. Used on one event loop.

    An image that the LRU has dropped can still be found while a request holds it.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.size = 0
        self._kept: OrderedDict[bytes, LoadedImage] = OrderedDict()
        self._alive: WeakValueDictionary[bytes, LoadedImage] = WeakValueDictionary()
        self._decoding: dict[bytes, _Decoding] = {}

    async def obtain(self, digest: bytes, decode: Callable[[], Coroutine[Any, Any, Image]]) -> tuple[LoadedImage, bool]:
        """Return the image of that digest, and whether this call decoded it.

        Raises what `decode` raises. Decoding is cancelled when all callers that wait for it have been cancelled.
        """
        if (loaded := self._kept.get(digest)) is not None:
            self._kept.move_to_end(digest)
            return loaded, False
        if (loaded := self._alive.get(digest)) is not None:
            return loaded, False
        running = self._decoding.get(digest)
        first = running is None
        if running is None:
            running = _Decoding(asyncio.create_task(self._decode(digest, decode), name="decode"))
            self._decoding[digest] = running
            running.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        running.waiters += 1
        try:
            return await asyncio.shield(running.task), first
        finally:
            running.waiters -= 1
            if not running.waiters:
                running.task.cancel()
                if self._decoding.get(digest) is running:
                    del self._decoding[digest]

    async def _decode(self, digest: bytes, decode: Callable[[], Coroutine[Any, Any, Image]]) -> LoadedImage:
        loaded = LoadedImage(await decode(), digest)
        self._alive[digest] = loaded
        self._keep(loaded)
        return loaded

    def _keep(self, loaded: LoadedImage) -> None:
        size = decoded_bytes(loaded.image)
        if size > self.capacity:
            return
        self._kept[loaded.digest] = loaded
        self.size += size
        while self.size > self.capacity:
            _, oldest = self._kept.popitem(last=False)
            self.size -= decoded_bytes(oldest.image)
