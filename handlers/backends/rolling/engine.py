"""The embedded engine as an engine of the pipeline: it prepares images, and passes prompts on to its processes."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import EngineDead, EngineError, EngineStopped, ModelLoadError, RequestRejected
from engine.machine import usable_cores
from engine.messages import Add, ImageInput, Output, TensorData
from handlers.backends.adapters import AdapterStore
from handlers.backends.base import (
    BackendStats,
    Capabilities,
    EngineRequest,
    Health,
    PromptModel,
    TokenOutput,
    compute_type,
    engine_died,
    no_engine,
)
from handlers.backends.embeddings import EmbeddingsWanted
from handlers.backends.image_options import crowded, unused_by_text
from handlers.backends.rolling.engine_client import STUCK_SECONDS, EngineProcess, OutputStream
from handlers.backends.rolling.image_preparer import ImagePreparer, place_images
from handlers.backends.rolling.model_facts import ModelFacts, ModelQuestion, ask_engine
from handlers.backends.rolling.model_front import ModelFront
from handlers.backends.rolling.plan import plan_engines, replicas_named, unused_devices
from handlers.backends.rolling.replicas import SPARE_AFTER_SECONDS, EngineGroup
from handlers.errors import EngineFailed, InvalidRequest, Unavailable, stopping
from handlers.request import MediaPart

if TYPE_CHECKING:
    from properties.configuration import Configuration
    from properties.settings import Settings

logger = logging.getLogger(__name__)

PREFIX_KEY_TOKENS = 64
"""The length of the prompt's beginning that decides, after its images, which replica is preferred."""


class RollingEngine:
    """See `handlers.backends.base.Engine`."""

    adapters: AdapterStore | None = None

    def __init__(
        self, settings: Settings, front: ModelFront, model: PromptModel, group: EngineGroup, pool: ThreadPoolExecutor
    ) -> None:
        """Put replicas that have started, and the model as the front end knows it, together; use `start`.

        Args:
            settings: The options.
            front: What the model's files say.
            model: The same for the pipeline.
            group: The replicas.
            pool: Where prompts and images are prepared.
        """
        facts, devices = group.ready, group.configs[0].devices
        self.model = model
        self._front = front
        self._group = group
        self._pool = pool
        self._preparer: ImagePreparer | None = None
        if front.preprocessor is not None:
            wanted = EmbeddingsWanted(
                facts.row_size, facts.max_model_len - 1, facts.dtype, front.preprocessor.grid_merge
            )
            self._preparer = ImagePreparer(front.preprocessor, pool, settings.image_cache_mb << 19, wanted)
            if (full := crowded(settings, front.preprocessor, facts.max_model_len)) is not None:
                logger.warning("%s", full)
        logger.info(
            "embedded engine ready: %d of %d replicas, %s, attention %s, %d tokens of context, %d blocks of %d tokens",
            len(group.alive), len(group.replicas), facts.dtype, facts.attention, facts.max_model_len,
            facts.num_blocks, facts.block_size,
        )  # fmt: skip
        self.capabilities = Capabilities(
            max_model_len=facts.max_model_len,
            images=front.preprocessor is not None,
            embeddings=True,
            default_sampling=front.text.default_sampling,
            structured_outputs=facts.constrains,
            dtype=facts.dtype,
            device_type=devices[0].partition(":")[0],
            compute_type=compute_type(facts.device, len(devices)),
            cache_tokens=facts.num_blocks * facts.block_size * len(group.replicas),
            prompt_threads=_threads(),
        )

    @classmethod
    async def start(cls, configuration: Configuration, model_path: Path) -> RollingEngine:
        """Return a loaded engine; see `Backend.build`."""
        async with AsyncExitStack() as undo:
            try:
                engine = await cls._started(configuration.settings, str(model_path), undo)
            except (EngineError, OSError) as error:
                raise Unavailable(f"the model cannot be loaded: {error}") from error
            undo.pop_all()
            return engine

    @classmethod
    async def _started(cls, settings: Settings, path: str, undo: AsyncExitStack) -> RollingEngine:
        loop = asyncio.get_running_loop()
        pool = ThreadPoolExecutor(_threads(), thread_name_prefix="prepare")
        undo.callback(pool.shutdown, wait=False, cancel_futures=True)
        engine = await EngineProcess.spawn()
        undo.push_async_callback(engine.stop)

        def ask(question: ModelQuestion, folder: Path, seconds: float | None) -> ModelFacts:
            asked = asyncio.run_coroutine_threadsafe(ask_engine(engine, question, folder, seconds), loop)
            from transformers import PreTrainedTokenizerFast  # noqa: F401  # takes a second of this wait

            return asked.result()

        front = await loop.run_in_executor(pool, ModelFront.load, settings, path, ask)
        if front.contradictions:
            raise ModelLoadError("; ".join(front.contradictions))
        vocabulary = await loop.run_in_executor(pool, lambda: front.vocabulary)
        plan = plan_engines(settings, path, front.accelerators, vocabulary)
        unused = [] if front.preprocessor is not None else unused_by_text(settings)
        for problem in unused_devices(settings, plan, front.accelerators) + unused:
            logger.info("%s", problem)  # info: a script that runs anywhere writes it for another machine
        group = EngineGroup(
            plan,
            retry_threshold=settings.retry_threshold,
            loading_seconds=settings.model_loading_timeout,
            stuck_seconds=settings.engine_stuck_timeout or STUCK_SECONDS,
            spawned=engine,
            spare_after=SPARE_AFTER_SECONDS if settings.spare_engine else None,
        )
        undo.push_async_callback(group.close)
        await group.start(wait_for_all=replicas_named(settings) or front.accelerators > 0)
        text = front.text
        model = PromptModel(text.tokenizer, text.renderer, text.vocab_size, pool, vocabulary)
        return cls(settings, front, model, group, pool)

    async def prepare(
        self, token_ids: list[int], parts: Sequence[MediaPart], request: EngineRequest | None
    ) -> RollingPrompt:
        if not parts or self._preparer is None:
            return RollingPrompt(token_ids, [])
        ready = await self._preparer.prepare(parts)
        return RollingPrompt(*place_images(token_ids, ready, self._front.text.renderer.image_token_id))

    async def generate(self, prompt: RollingPrompt, request: EngineRequest) -> RollingStream:
        group, token_ids = self._group, prompt.token_ids
        seed = request.params.seed if request.params.seed is not None else secrets.randbits(63)
        add = Add(
            request_id=0,
            token_ids=token_ids,
            params=request.params.for_engine(),
            seeds=[(seed + index) % 2**63 for index in range(request.n)],
            eos_token_ids=self._front.text.eos_token_ids,
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
            raise no_engine(given_up=group.given_up) from error
        except RequestRejected as error:
            raise InvalidRequest(str(error)) from error
        return RollingStream(outputs, self._front.text.eos_token_ids)

    def health(self) -> Health:
        group = self._group
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
        group = self._group
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
        await self._group.close()
        self._pool.shutdown(wait=False, cancel_futures=True)


def _threads() -> int:
    return max(2, min(8, usable_cores()))


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
            raise stopping(error) from error
        except EngineDead as error:
            raise engine_died() from error

    def abort(self, index: int) -> None:
        request_id = self._outputs.ids[index]
        self._open.discard(request_id)
        self._outputs.abort([request_id])

    async def aclose(self) -> None:
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
            finish == "stop" and (output.stop_token is not None or output.token_ids[-1] in self._eos_token_ids),
            output.cached_tokens,
            output.queued,
            None if entries is None else [None, *entries],
        )
