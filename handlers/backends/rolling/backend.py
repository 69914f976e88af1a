"""The embedded engine as a backend: prompts become token ids here, token ids become text here."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import EngineDead, EngineError, EngineStopped, RequestRejected
from engine.machine import usable_cores
from engine.messages import Add, Logprobs, Output, Picture, TensorData
from engine.sampling_params import SamplingParams
from handlers.backends.adapters import AdapterStore
from handlers.backends.base import (
    BackendStats,
    Capabilities,
    Delta,
    Health,
    PositionLogprobs,
    PromptStats,
    TokenizedPrompt,
    TokenLogprob,
    compute_type,
)
from handlers.backends.embeddings import EmbeddingsWanted
from handlers.backends.rolling.client import STUCK_SECONDS, EngineProcess
from handlers.backends.rolling.group import EngineGroup, Ticket
from handlers.backends.rolling.images import PicturePreparer, ReadyPicture
from handlers.backends.rolling.model_facts import ModelFacts, ModelQuestion, ask_engine
from handlers.backends.rolling.model_front import ModelFront
from handlers.backends.rolling.plan import plan_engines, unused_devices
from handlers.backends.tokens import TokenTexts, detokenized, rendered_prompt, skipped_tokens, tokenized
from handlers.backends.unused import unused_by_text
from handlers.errors import EngineFailed, InvalidRequest, Unavailable
from handlers.grammars.compiler import GrammarCompiler
from handlers.prompts.detokenizer import Detokenizer
from handlers.prompts.limits import (
    MANY_CHARACTERS,
    checked_sampling,
    checked_tokens,
    count_characters,
    longest_prompt,
    require_known,
    spelled,
)
from handlers.prompts.renderer import RenderedPrompt
from handlers.request import GenerationRequest, Prompt, pictures

if TYPE_CHECKING:
    from properties.configuration import Configuration
    from properties.settings import Settings

logger = logging.getLogger(__name__)

LOWEST_LOGPROB = -9999.0
"""Stands for a probability of zero, which JSON has no logarithm for; vLLM's value."""

PREFIX_KEY_TOKENS = 64
"""The beginning of a prompt that decides, after its pictures, which replica it would like."""


class RollingBackend:
    """See `handlers.backends.base.Backend`."""

    adapters: AdapterStore | None = None

    def __init__(self, settings: Settings, model_path: Path) -> None:
        self._settings = settings
        self._path = str(model_path)
        self._threads = max(2, min(8, usable_cores()))
        self._pool = ThreadPoolExecutor(max_workers=self._threads, thread_name_prefix="prepare")
        self._group: EngineGroup | None = None
        self._capabilities: Capabilities | None = None
        self._compiler: GrammarCompiler | None = None
        self._loaded = False

    @classmethod
    def from_settings(cls, settings: Settings, model_path: Path) -> RollingBackend:
        return cls(settings, model_path)

    @classmethod
    def from_configuration(cls, configuration: Configuration, model_path: Path) -> RollingBackend:
        return cls(configuration.settings, model_path)

    async def load(self) -> None:
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
            )
        except BaseException as error:
            await engine.stop()
            if isinstance(error, EngineError | OSError):
                raise Unavailable(f"the model cannot be loaded: {error}") from error
            raise
        facts = self._group.ready
        front.renderer.longest = longest_prompt(facts.max_model_len)
        self._front = front
        self._token_texts = TokenTexts(front.tokenizer)
        self._preparer = (
            PicturePreparer(
                front.preprocessor,
                self._pool,
                self._settings.image_cache_mb << 19,
                EmbeddingsWanted(
                    facts.row_size, facts.max_model_len - 1, facts.dtype, front.preprocessor.grid_merge
                ),
            )
            if front.preprocessor is not None
            else None
        )
        self._compiler = GrammarCompiler(vocabulary, self._settings.guided_decoding_timeout)
        self._capabilities = Capabilities(
            max_model_len=facts.max_model_len,
            images=front.preprocessor is not None,
            default_sampling=front.default_sampling,
            structured_outputs=facts.constrains,
            special_token_ids=frozenset(front.tokenizer.all_special_ids),
            special_tokens=skipped_tokens(front.tokenizer),
            dtype=facts.dtype,
            device_type=plan[0].devices[0].partition(":")[0],
            compute_type=compute_type(facts.device, len(plan[0].devices)),
            cache_tokens=facts.num_blocks * facts.block_size * len(plan),
            prompt_threads=self._threads,
            image_placeholder=front.renderer.placeholder or None,
            chat_templates=front.renderer.variables,
        )
        self._loaded = True
        images = self._settings.limit_mm_per_prompt.get("image", 1)
        pixels = self._settings.max_image_pixels
        if (crowded := front.crowded(images, pixels, facts.max_model_len)) is not None:
            logger.warning("%s", crowded)
        logger.info(
            "embedded engine ready: %d replicas, %s, attention %s, %d tokens of context, %d blocks of %d tokens",
            len(self._group.replicas), facts.dtype, facts.attention, facts.max_model_len, facts.num_blocks,
            facts.block_size,
        )  # fmt: skip

    @property
    def capabilities(self) -> Capabilities:
        assert self._capabilities is not None, "load() has not returned"
        return self._capabilities

    async def generate(self, request: GenerationRequest) -> RollingGeneration:
        group = self._group
        if group is None or not self._loaded:
            raise Unavailable("the model is still loading", retry_after=5)
        grammar = None
        if request.constraint is not None:
            assert self._compiler is not None
            grammar = await self._compiler.compile(request.constraint)
        ready: list[ReadyPicture] = []
        parts = list(request.images())
        if parts and self._preparer is not None:
            ready = await self._preparer.prepare(parts)
        rendered = await rendered_prompt(self._front.renderer, request, self._pool)
        token_ids, placed = _place_pictures(rendered, ready, self._front.renderer.image_token_id)
        longest, vocab_size = self.capabilities.max_model_len, self._front.vocab_size
        if placed:
            require_known(request, vocab_size, self._front.renderer.image_token_id)
        else:
            token_ids = checked_tokens(request, token_ids, longest, vocab_size)
        params = await self._spelled(checked_sampling(request, len(token_ids), longest, vocab_size))
        seed = request.sampling.seed if request.sampling.seed is not None else secrets.randbits(63)
        add = Add(
            request_id=0,
            token_ids=token_ids,
            params=params,
            seeds=[(seed + index) % 2**63 for index in range(request.n)],
            eos_token_ids=self._front.eos_token_ids,
            pictures=placed,
            priority=request.priority,
            grammar=grammar,
        )
        if self._front.preprocessor is not None:
            positions, add.position_delta = self._front.preprocessor.positions(len(token_ids), placed)
            add.positions = None if positions is None else TensorData.pack(positions)
        keys = [picture.digest for picture in placed]
        keys.append(b"".join(t.to_bytes(4, "little") for t in token_ids[:PREFIX_KEY_TOKENS]))
        try:
            ticket = group.submit(add, keys)
        except EngineDead as error:
            reason = (
                "the engine failed too often"
                if group.given_up
                else "the engine is being restarted; try again"
            )
            raise Unavailable(reason, retry_after=5) from error
        except RequestRejected as error:
            raise InvalidRequest(str(error)) from error
        stats = PromptStats(
            prompt_tokens=len(token_ids),
            image_tokens=sum(picture.length for picture in placed),
            prompt_token_ids=token_ids,
            prompt_text=rendered.text,
        )
        texts = self._token_texts.answers(request, params, token_ids, request.n)
        return RollingGeneration(ticket, add, stats, texts, self._token_texts)

    async def tokenize(self, prompt: Prompt) -> TokenizedPrompt:
        front = self._front
        parts = list(pictures(prompt))
        ready = await self._preparer.prepare(parts) if parts and self._preparer is not None else []
        expanded = [picture.prepared.token_ids for picture in ready]

        def work() -> TokenizedPrompt:
            rendered = front.renderer.render(prompt, spans=True)
            return tokenized(rendered, front.tokenizer, front.renderer.image_token_id, expanded)

        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return await asyncio.get_running_loop().run_in_executor(
            self._pool, detokenized, token_ids, self._front.tokenizer
        )

    def health(self) -> Health:
        group = self._group
        if group is None or not self._loaded:
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
            engine_restarts=group.restarts,
            replicas=len(group.replicas),
            replicas_ready=len(group.alive),
        )

    async def close(self) -> None:
        self._loaded = False
        if self._compiler is not None:
            await self._compiler.close()
        if self._group is not None:
            await self._group.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _spelled(self, params: SamplingParams) -> SamplingParams:
        if count_characters(params) <= MANY_CHARACTERS:
            return spelled(params, self._front.tokenizer)
        return await asyncio.get_running_loop().run_in_executor(
            self._pool, spelled, params, self._front.tokenizer
        )


class RollingGeneration:
    """See `handlers.backends.base.Generation`."""

    def __init__(
        self,
        ticket: Ticket,
        add: Add,
        stats: PromptStats,
        texts: list[Detokenizer],
        token_text: TokenTexts,
    ) -> None:
        self._token_text = token_text
        self.stats = stats
        self._ticket = ticket
        self._params = add.params
        self._eos_token_ids = add.eos_token_ids
        self._index = {request_id: index for index, request_id in enumerate(ticket.ids)}
        self._open = set(ticket.ids)
        self._texts = texts

    async def __aiter__(self) -> AsyncIterator[Delta]:
        try:
            while self._open:
                for output in await self._ticket.stream.get():
                    if output.request_id not in self._open:
                        continue
                    if output.prompt_logprobs is not None:
                        await asyncio.to_thread(self._note_prompt_logprobs, output.prompt_logprobs)
                    yield self._delta(output)
        except EngineStopped as error:
            raise Unavailable("the server is stopping", retry_after=5) from error
        except EngineDead as error:
            raise EngineFailed(
                "the engine process died while it worked on this request; try again"
            ) from error
        finally:
            self._ticket.abort()

    async def aclose(self) -> None:
        self._open.clear()
        self._ticket.abort()

    def _delta(self, output: Output) -> Delta:
        if output.finish == "error":
            if output.invalid:
                raise InvalidRequest(output.error or "the engine refused this request")
            raise EngineFailed(output.error or "the engine failed on this request")
        index = self._index[output.request_id]
        text = self._texts[index]
        self.stats.queued = self.stats.queued or output.queued
        if output.cached_tokens > 0:
            self.stats.cached_tokens = max(self.stats.cached_tokens, output.cached_tokens)
        by_token = output.finish == "stop" and (
            output.stop_token is not None or output.token_ids[-1] in self._eos_token_ids
        )
        pieces = text.pieces(
            output.token_ids,
            silent=by_token and not self._params.include_stop_str_in_output,
            finished=output.finish is not None,
        )
        delta = Delta(
            index=index,
            token_ids=output.token_ids,
            text="".join(pieces),
            pieces=pieces,
            logprobs=None
            if output.logprobs is None
            else [self._position(entry) for entry in output.logprobs],
        )
        if text.stopped_by is not None:
            delta.finish_reason, delta.stop_reason = "stop", text.stopped_by
            self._ticket.abort([output.request_id])
        elif output.finish is not None:
            delta.finish_reason = "length" if output.finish == "length" else "stop"
            delta.stop_reason = output.stop_token
            delta.eos = by_token and output.stop_token is None
        if delta.finish_reason is not None:
            self._open.discard(output.request_id)
        return delta

    def _note_prompt_logprobs(self, entries: Sequence[Logprobs]) -> None:
        self.stats.prompt_logprobs = [None, *(self._position(entry) for entry in entries)]
        self.stats.first_token_text = self._token_text(self.stats.prompt_token_ids[0])

    def _position(self, entry: Logprobs) -> PositionLogprobs:
        chosen, *top = (
            TokenLogprob(token, self._token_text(token), max(logprob, LOWEST_LOGPROB), rank)
            for token, logprob, rank in zip(entry.token_ids, entry.logprobs, entry.ranks, strict=True)
        )
        return PositionLogprobs(chosen, tuple(top))


def _place_pictures(
    rendered: RenderedPrompt, ready: Sequence[ReadyPicture], image_token_id: int | None
) -> tuple[list[int], list[Picture]]:
    """Replace each image token by its picture's own tokens."""
    if not ready:
        return rendered.token_ids, []
    token_ids: list[int] = []
    placed: list[Picture] = []
    waiting = iter(ready)
    for token in rendered.token_ids:
        if token != image_token_id:
            token_ids.append(token)
            continue
        picture = next(waiting)
        own = picture.prepared.token_ids
        placed.append(
            Picture(picture.digest, len(token_ids), len(own), picture.tensors, picture.prepared.is_embed)
        )
        token_ids += own
    return token_ids, placed
