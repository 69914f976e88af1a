"""Cache of decoded images by the digest of their encoded bytes; each is decoded once for all requests."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from PIL.Image import Image

from handlers.images.decode import decoded_bytes
from handlers.request import LoadedImage


def digest_of(data: bytes) -> bytes:
    """Hash the encoded bytes of an image."""
    return hashlib.sha256(data).digest()


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

    async def obtain(
        self, digest: bytes, decode: Callable[[], Coroutine[Any, Any, Image]]
    ) -> tuple[LoadedImage, bool]:
        """Return the image of that digest, and whether this call decoded it.

        Raises what `decode` raises. Decoding is cancelled when all who wait for it have been cancelled.
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
