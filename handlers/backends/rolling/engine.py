"""The embedded engine as an engine of the pipeline: it prepares images, and passes prompts on to its processes."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import EngineDead, EngineError, EngineStopped, RequestRejected
from engine.families.base import GRID, Arrays, PreparedImage, Preprocessor
from engine.machine import usable_cores
from engine.messages import EMBEDDINGS, Add, ImageInput, Output, TensorData
from handlers.backends.adapters import AdapterStore
from handlers.backends.base import (
    BackendStats,
    Capabilities,
    EngineRequest,
    Health,
    PromptModel,
    TokenOutput,
    compute_type,
)
from handlers.backends.embeddings import EmbeddingsWanted
from handlers.backends.rolling.model_facts import ModelFacts, ModelQuestion, ask_engine
from handlers.backends.rolling.model_front import ModelFront
from handlers.backends.rolling.plan import plan_engines, replicas_named, unused_devices
from handlers.backends.rolling.replicas import (
    SPARE_AFTER_SECONDS,
    STUCK_SECONDS,
    EngineGroup,
    EngineProcess,
    OutputStream,
)
from handlers.backends.unused import unused_by_text
from handlers.errors import EngineFailed, ImageError, InvalidRequest, Unavailable, short_of
from handlers.request import EmbeddingsPart, ImagePart, LoadedEmbeddings, LoadedImage, MediaPart
from processes.shortage import shortage

if TYPE_CHECKING:
    from properties.configuration import Configuration


logger = logging.getLogger(__name__)

PREFIX_KEY_TOKENS = 64
"""The length of the prompt's beginning that decides, after its images, which replica is preferred."""


class RollingEngine:
    """See `handlers.backends.base.Engine`."""

    adapters: AdapterStore | None = None

    def __init__(self, configuration: Configuration, model_path: Path) -> None:
        self._settings = configuration.settings
        self._path = str(model_path)
        self._threads = max(2, min(8, usable_cores()))
        self._pool = ThreadPoolExecutor(max_workers=self._threads, thread_name_prefix="prepare")
        self._group: EngineGroup | None = None
        self._capabilities: Capabilities | None = None
        self._preparer: ImagePreparer | None = None

    async def load(self) -> None:
        """See `Lifecycle`."""
        loop = asyncio.get_running_loop()
        try:
            engine = await EngineProcess.spawn()
        except OSError as error:
            raise Unavailable(f"the model cannot be loaded: {error}") from error
        try:

            def find(question: ModelQuestion, folder: Path, seconds: float | None) -> ModelFacts:
                asked = asyncio.run_coroutine_threadsafe(ask_engine(engine, question, folder, seconds), loop)
                from transformers import PreTrainedTokenizerFast  # noqa: F401  # takes a second of this wait

                return asked.result()

            front = await loop.run_in_executor(self._pool, ModelFront.load, self._settings, self._path, find)
            vocabulary = await loop.run_in_executor(self._pool, lambda: front.vocabulary)
            plan = plan_engines(self._settings, self._path, front.accelerators, vocabulary)
            unused = [] if front.preprocessor is not None else unused_by_text(self._settings)
            for problem in unused_devices(self._settings, plan, front.accelerators) + unused:
                logger.info("%s", problem)  # info: a script that runs anywhere writes it for another machine
            self._group = await EngineGroup.start(
                plan,
                retry_threshold=self._settings.retry_threshold,
                loading_seconds=self._settings.model_loading_timeout,
                stuck_seconds=self._settings.engine_stuck_timeout or STUCK_SECONDS,
                spawned=engine,
                spare_after=SPARE_AFTER_SECONDS if self._settings.spare_engine else None,
                wait_for_all=replicas_named(self._settings) or front.accelerators > 0,
            )
        except BaseException as error:
            await engine.stop()
            if isinstance(error, EngineError | OSError):
                raise Unavailable(f"the model cannot be loaded: {error}") from error
            raise
        facts = self._group.ready
        self._front = front
        self._model = PromptModel(front.tokenizer, front.renderer, front.vocab_size, self._pool, vocabulary)
        if front.preprocessor is not None:
            wanted = EmbeddingsWanted(
                facts.row_size, facts.max_model_len - 1, facts.dtype, front.preprocessor.grid_merge
            )
            cache_bytes = self._settings.image_cache_mb << 19
            self._preparer = ImagePreparer(front.preprocessor, self._pool, cache_bytes, wanted)
        images = self._settings.limit_mm_per_prompt.get("image", 1)
        pixels = self._settings.max_image_pixels
        if (crowded := front.crowded(images, pixels, facts.max_model_len)) is not None:
            logger.warning("%s", crowded)
        logger.info(
            "embedded engine ready: %d of %d replicas, %s, attention %s, %d tokens of context, %d blocks of %d tokens",
            len(self._group.alive), len(self._group.replicas), facts.dtype, facts.attention, facts.max_model_len,
            facts.num_blocks, facts.block_size,
        )  # fmt: skip
        self._capabilities = Capabilities(
            max_model_len=facts.max_model_len,
            images=front.preprocessor is not None,
            embeddings=True,
            default_sampling=front.default_sampling,
            structured_outputs=facts.constrains,
            dtype=facts.dtype,
            device_type=plan[0].devices[0].partition(":")[0],
            compute_type=compute_type(facts.device, len(plan[0].devices)),
            cache_tokens=facts.num_blocks * facts.block_size * len(plan),
            prompt_threads=self._threads,
        )

    @property
    def capabilities(self) -> Capabilities:
        """See `Lifecycle`."""
        assert self._capabilities is not None, "load() has not returned"
        return self._capabilities

    @property
    def model(self) -> PromptModel:
        """See `Engine`."""
        return self._model

    async def prepare(
        self, token_ids: list[int], parts: Sequence[MediaPart], request: EngineRequest | None
    ) -> RollingPrompt:
        """See `Engine`."""
        if not parts or self._preparer is None:
            return RollingPrompt(token_ids, [])
        ready = await self._preparer.prepare(parts)
        return RollingPrompt(*_place_images(token_ids, ready, self._front.renderer.image_token_id))

    async def generate(self, prompt: RollingPrompt, request: EngineRequest) -> RollingStream:
        """See `Engine`."""
        group, token_ids = self._group, prompt.token_ids
        assert group is not None, "load() has not returned"
        seed = request.params.seed if request.params.seed is not None else secrets.randbits(63)
        add = Add(
            request_id=0,
            token_ids=token_ids,
            params=request.params.for_engine(),
            seeds=[(seed + index) % 2**63 for index in range(request.n)],
            eos_token_ids=self._front.eos_token_ids,
            images=prompt.placed,
            priority=request.priority,
            grammar=request.grammar,
        )
        if self._front.preprocessor is not None:
            positions, add.position_delta = self._front.preprocessor.positions(len(token_ids), prompt.placed)
            add.positions = None if positions is None else TensorData.pack(positions)
        keys = [image.digest for image in prompt.placed]
        keys.append(b"".join(token.to_bytes(4, "little") for token in token_ids[:PREFIX_KEY_TOKENS]))
        try:
            outputs = group.submit(add, keys)
        except EngineDead as error:
            reason = (
                "the engine failed too often"
                if group.given_up
                else "the engine is being restarted; try again"
            )
            raise Unavailable(reason, retry_after=5) from error
        except RequestRejected as error:
            raise InvalidRequest(str(error)) from error
        return RollingStream(outputs, self._front.eos_token_ids)

    def health(self) -> Health:
        """See `Lifecycle`."""
        group = self._group
        if group is None or self._capabilities is None:
            return Health(False, "the model is loading")
        alive, total = len(group.responsive), len(group.replicas)
        if alive == 0:
            reason = group.why_down
            if group.given_up:
                reason = "the engine failed too often"
            elif group.alive:
                reason = "the engine does not answer"
            return Health(False, reason, lost=group.given_up)
        return Health(True, "ready" if alive == total else f"ready: {alive} of {total} replicas")

    def stats(self) -> BackendStats:
        """See `Lifecycle`."""
        group = self._group
        if group is None:
            return BackendStats()
        now = group.stats()
        return BackendStats(
            running=now.running,
            waiting=now.waiting,
            kv_blocks_used=now.blocks_used,
            kv_blocks_total=now.blocks_total,
            prefix_cache_queries=now.prefix_queries,
            prefix_cache_hits=now.prefix_hits,
            encoder_cache_queries=now.encoder_queries,
            encoder_cache_hits=now.encoder_hits,
            preemptions=now.preemptions,
            draft_tokens=now.draft_tokens,
            accepted_tokens=now.accepted_tokens,
            engine_restarts=group.restarts,
            replicas=len(group.replicas),
            replicas_ready=len(group.alive),
        )

    async def close(self) -> None:
        """See `Lifecycle`."""
        if self._group is not None:
            await self._group.close()
        self._pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class RollingPrompt:
    """See `handlers.backends.base.PreparedPrompt`."""

    token_ids: list[int]
    placed: list[ImageInput]

    @property
    def images(self) -> list[tuple[int, int]]:
        """The (offset, length) of each image."""
        return [(image.offset, image.length) for image in self.placed]

    def discard(self) -> None:
        """Do nothing: this object holds no other resources."""


class RollingStream:
    """See `handlers.backends.base.TokenStream`."""

    def __init__(self, outputs: OutputStream, eos_token_ids: Sequence[int]) -> None:
        self._outputs = outputs
        self._eos_token_ids = eos_token_ids
        self._open = set(outputs.ids)

    async def __aiter__(self) -> AsyncIterator[TokenOutput]:
        try:
            while self._open:
                for output in await self._outputs.get():
                    if output.request_id in self._open:
                        yield self._read(output)
        except EngineStopped as error:
            raise Unavailable("the server is stopping", retry_after=5) from error
        except EngineDead as error:
            raise EngineFailed(
                "the engine process died while it worked on this request; try again"
            ) from error

    def abort(self, index: int) -> None:
        """See `TokenStream`."""
        request_id = self._outputs.ids[index]
        self._open.discard(request_id)
        self._outputs.abort([request_id])

    async def aclose(self) -> None:
        """See `TokenStream`."""
        self._open.clear()
        self._outputs.abort()

    def _read(self, output: Output) -> TokenOutput:
        finish = output.finish
        if finish == "error":
            if output.invalid:
                raise InvalidRequest(output.error or "the engine refused this request")
            raise EngineFailed(output.error or "the engine failed on this request")
        if finish is not None:
            self._open.discard(output.request_id)
        entries = output.prompt_logprobs
        return TokenOutput(
            output.request_id - self._outputs.ids.start,
            output.token_ids,
            finish,
            output.logprobs,
            output.stop_token,
            finish == "stop"
            and (output.stop_token is not None or output.token_ids[-1] in self._eos_token_ids),
            output.cached_tokens,
            output.queued,
            None if entries is None else [None, *entries],
        )


def _place_images(
    token_ids: Sequence[int], ready: Sequence[ReadyImage], image_token_id: int | None
) -> tuple[list[int], list[ImageInput]]:
    """Replace each image token by its image's own tokens."""
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
        self,
        preprocessor: Preprocessor[Any],
        pool: ThreadPoolExecutor,
        cache_bytes: int,
        embeddings: EmbeddingsWanted,
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
        ready = ReadyImage(
            prepared,
            _packed(prepared.tensors),
            hashlib.blake2b(known, digest_size=16).digest(),
        )
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


def _packed(tensors: Arrays) -> dict[str, TensorData]:
    return {name: TensorData.pack(array) for name, array in tensors.items()}
