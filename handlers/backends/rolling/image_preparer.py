"""Prepares images for the embedded engine, each once, and gives them their places in a prompt."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.errors import RequestRejected
from engine.families.preprocessor import GRID, Arrays, PreparedImage, Preprocessor
from engine.messages import EMBEDDINGS, ImageInput, TensorData
from handlers.backends.embeddings import EmbeddingsWanted
from handlers.errors import ImageError, short_of
from handlers.request import EmbeddingsPart, ImagePart, LoadedEmbeddings, LoadedImage, MediaPart
from processes.shortage import shortage


@dataclass(frozen=True, slots=True)
class ReadyImage:
    """A prepared image in the form that goes to the engine, and the digest that identifies it everywhere."""

    prepared: PreparedImage
    tensors: dict[str, TensorData]
    digest: bytes

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.prepared.tensors.values())


class ImagePreparer:
    """An LRU cache of prepared images with a memory limit in bytes, filled by a pool of threads.

    An image that several requests show at the same time is prepared once.
    """

    def __init__(
        self, preprocessor: Preprocessor[Any], pool: ThreadPoolExecutor, cache_bytes: int, embeddings: EmbeddingsWanted
    ) -> None:
        """Prepare with threads of a pool. embeddings: what the engine takes in place of images."""
        self._embeddings = embeddings
        self._preprocessor = preprocessor
        self._pool = pool
        self._budget = cache_bytes
        self._used = 0
        self._cache: OrderedDict[tuple[bytes, int], ReadyImage] = OrderedDict()
        self._under_way: dict[tuple[bytes, int], asyncio.Task[ReadyImage]] = {}

    async def prepare(self, parts: Sequence[MediaPart]) -> list[ReadyImage]:
        """Return the prepared images in the parts' order. All must be loaded, and all are released afterwards.

        Raises:
            ImageError: The model does not accept an image, or the embeddings of one.
        """
        embeddings = [part for part in parts if isinstance(part, EmbeddingsPart)]
        if embeddings and not self._preprocessor.takes_embeddings:
            raise ImageError(0, "this model takes no image_embeds; send the image itself")
        embedded = self._embeddings.checked(embeddings) if embeddings else []
        ready = [self._as_they_are(loaded) for loaded in embedded]
        variant = self._preprocessor.variant(len(parts))
        for index, part in enumerate(parts):
            if isinstance(part, ImagePart):
                ready.append(await self._one(index, part, variant))
        assert len(embedded) in (0, len(parts)), "a request holds images or embeddings"
        for part in parts:
            part.release()
        return ready

    def _as_they_are(self, loaded: LoadedEmbeddings) -> ReadyImage:
        tensors: Arrays = {EMBEDDINGS: loaded.rows}
        if loaded.grid is not None:
            tensors[GRID] = np.array(loaded.grid)
        prepared = PreparedImage([self._preprocessor.image_token_id] * len(loaded.rows), tensors)
        return ReadyImage(prepared, _packed(tensors), loaded.digest[:16])

    async def _one(self, index: int, part: ImagePart, variant: int) -> ReadyImage:
        assert part.loaded is not None, "images are loaded before the backend sees them"
        key = part.loaded.digest, variant
        known = self._cache.get(key)
        if known is not None:
            self._cache.move_to_end(key)
            return known
        task = self._under_way.get(key)
        if task is None:
            task = asyncio.create_task(self._prepare(part.loaded, variant))
            self._under_way[key] = task
            task.add_done_callback(lambda _: self._under_way.pop(key, None))
        try:
            return await asyncio.shield(task)
        except RequestRejected as error:
            raise ImageError(index, str(error)) from error
        except Exception as error:
            if (what := shortage(error)) is not None:
                raise short_of(what) from error
            raise ImageError(index, "the model's processor cannot prepare this image") from error

    async def _prepare(self, loaded: LoadedImage, variant: int) -> ReadyImage:
        prepared = await asyncio.get_running_loop().run_in_executor(
            self._pool, self._preprocessor.prepare, loaded.image, variant
        )
        known = loaded.digest + self._preprocessor.fingerprint + bytes([variant])
        ready = ReadyImage(prepared, _packed(prepared.tensors), hashlib.blake2b(known, digest_size=16).digest())
        self._remember((loaded.digest, variant), ready)
        return ready

    def _remember(self, key: tuple[bytes, int], ready: ReadyImage) -> None:
        if key in self._cache or ready.nbytes > self._budget:
            return
        self._cache[key] = ready
        self._used += ready.nbytes
        while self._used > self._budget:
            _, old = self._cache.popitem(last=False)
            self._used -= old.nbytes


def place_images(
    token_ids: Sequence[int], ready: Sequence[ReadyImage], image_token_id: int | None
) -> tuple[list[int], list[ImageInput]]:
    """Return the prompt with each image token replaced by its image's own tokens, and where the images are."""
    made: list[int] = []
    placed: list[ImageInput] = []
    waiting = iter(ready)
    for token in token_ids:
        if token != image_token_id:
            made.append(token)
            continue
        image = next(waiting)
        own = image.prepared.token_ids
        placed.append(ImageInput(image.digest, len(made), len(own), image.tensors, image.prepared.is_embed))
        made += own
    return made, placed


def _packed(tensors: Arrays) -> dict[str, TensorData]:
    return {name: TensorData.pack(array) for name, array in tensors.items()}
