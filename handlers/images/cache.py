"""Decoded pictures by the digest of their encoded bytes, each decoded once however many ask."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from weakref import WeakValueDictionary

from PIL.Image import Image

from handlers.images.decode import decoded_bytes
from handlers.request import LoadedImage


def digest_of(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


class DecodedCache:
    """An LRU under `capacity` bytes of decoded pictures; 0 keeps none. Called from decoding threads.

    What the LRU has dropped is still found while a request holds it.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.size = 0
        self._pictures: OrderedDict[bytes, LoadedImage] = OrderedDict()
        self._alive: WeakValueDictionary[bytes, LoadedImage] = WeakValueDictionary()
        self._decoding: dict[bytes, Future[LoadedImage]] = {}
        self._lock = threading.Lock()

    def obtain(
        self, data: bytes, decode: Callable[[bytes], Image], digest: bytes | None = None
    ) -> tuple[Future[LoadedImage], bool]:
        """digest: of the data, where it is known already. The picture and whether this call decoded it.

        The future is done, unless another thread is decoding the same bytes: then it is that thread's, to be
        awaited where waiting holds up nobody.
        """
        if digest is None:
            digest = digest_of(data)
        future: Future[LoadedImage] = Future()
        with self._lock:
            if (picture := self._pictures.get(digest)) is not None:
                self._pictures.move_to_end(digest)
                future.set_result(picture)
                return future, False
            if (picture := self._alive.get(digest)) is not None:
                future.set_result(picture)
                return future, False
            if (running := self._decoding.get(digest)) is not None:
                return running, False
            self._decoding[digest] = future
        try:
            picture = LoadedImage(decode(data), digest)
        except BaseException as error:
            with self._lock:
                del self._decoding[digest]
            future.set_exception(error)
        else:
            with self._lock:
                del self._decoding[digest]
                self._alive[digest] = picture
                self._keep(picture)
            future.set_result(picture)
        return future, True

    def _keep(self, picture: LoadedImage) -> None:
        size = decoded_bytes(picture.image)
        if size > self.capacity:
            return
        self._pictures[picture.digest] = picture
        self.size += size
        while self.size > self.capacity:
            _, oldest = self._pictures.popitem(last=False)
            self.size -= decoded_bytes(oldest.image)
