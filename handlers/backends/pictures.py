"""Pictures as the model wants them, prepared once per content, in threads."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from engine.families.base import PreparedPicture, Preprocessor
from engine.messages import TensorData
from handlers.errors import ImageError
from handlers.request import ImagePart


@dataclass(frozen=True, slots=True)
class ReadyPicture:
    """A prepared picture in the form that goes to the engine, and the digest that stands for it everywhere."""

    prepared: PreparedPicture
    tensors: dict[str, TensorData]
    digest: bytes

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.prepared.tensors.values())


class PicturePreparer:
    """An LRU of prepared pictures under a memory budget in bytes, filled by a pool of threads."""

    def __init__(self, preprocessor: Preprocessor, pool: ThreadPoolExecutor, cache_bytes: int) -> None:
        self._preprocessor = preprocessor
        self._pool = pool
        self._budget = cache_bytes
        self._used = 0
        self._cache: OrderedDict[bytes, ReadyPicture] = OrderedDict()

    async def prepare(self, parts: Sequence[ImagePart]) -> list[ReadyPicture]:
        """In the parts' order; all must be loaded. Raises ImageError for a picture the model cannot take."""
        return list(await asyncio.gather(*(self._one(index, part) for index, part in enumerate(parts))))

    async def _one(self, index: int, part: ImagePart) -> ReadyPicture:
        assert part.loaded is not None, "pictures are loaded before the backend sees them"
        digest = part.loaded.digest
        known = self._cache.get(digest)
        if known is not None:
            self._cache.move_to_end(digest)
            return known
        image = part.loaded.image
        try:
            prepared = await asyncio.get_running_loop().run_in_executor(
                self._pool, self._preprocessor.prepare, image
            )
        except ValueError as error:
            raise ImageError(index, "the model's processor cannot prepare this picture") from error
        ready = ReadyPicture(
            prepared,
            {name: TensorData.pack(array) for name, array in prepared.tensors.items()},
            hashlib.blake2b(digest + self._preprocessor.fingerprint, digest_size=16).digest(),
        )
        self._remember(digest, ready)
        return ready

    def _remember(self, digest: bytes, ready: ReadyPicture) -> None:
        if digest in self._cache or ready.nbytes > self._budget:
            return
        self._cache[digest] = ready
        self._used += ready.nbytes
        while self._used > self._budget:
            _, old = self._cache.popitem(last=False)
            self._used -= old.nbytes
