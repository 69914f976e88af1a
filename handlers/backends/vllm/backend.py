"""vLLM as a backend: prompts become its inputs here, its outputs become deltas in `generation`."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from engine.errors import EngineError
from handlers.backends.adapters import AdapterStore
from handlers.backends.base import (
    BackendStats,
    Capabilities,
    Health,
    PromptStats,
    TokenizedPrompt,
    compute_type,
)
from handlers.backends.rolling.model_facts import load_tokenizer
from handlers.backends.tokens import detokenized, rendered_prompt, skipped_tokens, tokenized
from handlers.backends.vllm.adapters.store import LoadedAdapter, VllmAdapters
from handlers.backends.vllm.answers.generation import VllmGeneration
from handlers.backends.vllm.answers.parsers import vllm_parsers
from handlers.backends.vllm.engine.builder import EngineBuilder
from handlers.backends.vllm.engine.counters import Counters, series
from handlers.backends.vllm.engine.probes import Probes
from handlers.backends.vllm.engine.supervisor import EngineSupervisor
from handlers.backends.vllm.engine.watch import Patience
from handlers.backends.vllm.failures import failed
from handlers.backends.vllm.prompts.constraints import Constraints
from handlers.backends.vllm.prompts.front import VllmFront
from handlers.backends.vllm.prompts.inputs import Inputs
from handlers.backends.vllm.prompts.rendered import placeholders
from handlers.backends.vllm.prompts.runner_limits import check_runner_limits
from handlers.backends.vllm.prompts.sampling import check_prompt_logprobs, to_vllm, usual_sampling
from handlers.backends.vllm.samplers.extra_args import with_breakers
from handlers.errors import ServingError, Unavailable
from handlers.model_names import ANYBODYS, accepted_names
from handlers.prompts.limits import checked_sampling, checked_tokens, longest_prompt
from handlers.request import pictures

if TYPE_CHECKING:
    from engine.sampling_params import SamplingParams
    from handlers.request import Constraint, GenerationRequest, Prompt
    from properties.configuration import Configuration

logger = logging.getLogger(__name__)

_THREADS = 2


class VllmBackend:
    """See `handlers.backends.base.Backend`."""

    def __init__(self, configuration: Configuration, model_path: Path) -> None:
        self._configuration = configuration
        self._settings = configuration.settings
        self._path = model_path
        self._counters = Counters()
        self._keeper: EngineSupervisor | None = None
        self._constraints: Constraints | None = None
        self._capabilities: Capabilities | None = None
        self._loaded = False
        self._open: set[VllmGeneration] = set()
        self._numbers = itertools.count()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="vllm-prompts")

    @classmethod
    def from_configuration(cls, configuration: Configuration, model_path: Path) -> VllmBackend:
        return cls(configuration, model_path)

    async def load(self) -> None:
        loop = asyncio.get_running_loop()
        builder = await loop.run_in_executor(self._threads, EngineBuilder, self._configuration, self._path)
        self._vllm, self._samplers = builder.vllm, builder.samplers
        self._inputs = Inputs(self._vllm)
        probes = Probes(self._vllm, self._inputs, self._numbers)
        read = partial(load_tokenizer, str(self._path), trust_remote_code=self._settings.trust_remote_code)
        self._keeper = keeper = EngineSupervisor(
            lambda: builder.build(tokenizer, self._counters),
            probes.ask,
            self._counters,
            warm=probes.warm,
            prepare=self._prepare,
            retry_threshold=self._settings.retry_threshold,
            loading_seconds=self._settings.model_loading_timeout,
            patience=Patience(
                self._settings.engine_suspect_timeout, self._settings.engine_stuck_timeout or Patience.stuck
            ),
        )
        try:
            # Before the engine, which takes long to start: what is missing from a model is often its tokenizer.
            tokenizer = await loop.run_in_executor(self._threads, read)
            parsers = await loop.run_in_executor(self._threads, vllm_parsers, self._settings, tokenizer)
            formats = None
            if parsers is not None:
                formats = await loop.run_in_executor(self._threads, parsers.formats, self._settings)
            self._adapters = VllmAdapters(
                self._vllm,
                builder.adapter_directories,
                builder.most_adapters,
                self._engine,
                home=builder.home,
                allowed=self._settings.allowed_adapter_path,
                model_names={*accepted_names(self._configuration), *ANYBODYS}
                if self._settings.enable_lora
                else None,
            )
            await keeper.start()
            self._front = await loop.run_in_executor(
                self._threads,
                VllmFront,
                self._settings,
                str(self._path),
                tokenizer,
                self._vllm,
                keeper.engine,
            )
            self._constraints = await loop.run_in_executor(
                self._threads,
                Constraints,
                keeper.engine.vllm_config.structured_outputs_config,
                tokenizer,
                self._front.eos_token_ids,
                self._front.vocab_size,
                self._settings.guided_decoding_timeout,
            )
            if self._settings.enable_mm_embeds and self._front.images:
                await probes.try_embeddings(keeper.engine, self._front)
        except EngineError as error:
            await keeper.close()
            raise Unavailable(f"the model cannot be loaded: {error}") from error
        except BaseException:
            await keeper.close()
            raise
        config = keeper.engine.vllm_config
        if parsers is not None:
            parsers.model_config = config.model_config
        self._front.renderer.longest = longest_prompt(int(config.model_config.max_model_len))
        parallel, accelerators = config.parallel_config, builder.machine.accelerators
        self._blocks = int(config.cache_config.num_gpu_blocks or 0)  # of all copies
        self._replicas = int(config.parallel_config.data_parallel_size)
        self._capabilities = Capabilities(
            max_model_len=int(config.model_config.max_model_len),
            images=self._front.images,
            default_sampling=usual_sampling(self._front.default_sampling, self._samplers),
            adapters=self._settings.enable_lora,
            structured_outputs=True,
            image_placeholder=self._front.renderer.placeholder,
            special_token_ids=frozenset(self._front.tokenizer.all_special_ids),
            special_tokens=skipped_tokens(self._front.tokenizer),
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            device_type="cuda" if accelerators else "cpu",
            compute_type=compute_type(
                accelerators[0].name if accelerators else "cpu",
                int(parallel.tensor_parallel_size) * int(parallel.pipeline_parallel_size),
            ),
            cache_tokens=self._blocks * int(config.cache_config.block_size),
            prompt_threads=_THREADS,
            chat_templates=self._front.renderer.variables,
            formats=formats,
        )
        self._loaded = True
        logger.info(
            "vLLM %s ready: %s, %d x %d x %d devices, %d tokens of context, %d blocks of %d tokens, "
            "steps of at most %d requests and %d tokens",
            self._vllm.version, config.model_config.dtype, self._replicas, parallel.pipeline_parallel_size,
            parallel.tensor_parallel_size, self._capabilities.max_model_len, self._blocks,
            config.cache_config.block_size, config.scheduler_config.max_num_seqs,
            config.scheduler_config.max_num_batched_tokens,
        )  # fmt: skip

    @property
    def capabilities(self) -> Capabilities:
        assert self._capabilities is not None, "load() has not returned"
        return self._capabilities

    @property
    def adapters(self) -> AdapterStore | None:
        return self._adapters if self._settings.enable_lora else None

    async def generate(self, request: GenerationRequest) -> VllmGeneration:
        engine = self._engine()
        adapter = self._adapters.taken(request.adapter, request.model)
        try:
            generation = await self._admitted(engine, request, adapter)
        except BaseException:
            if adapter is not None:
                adapter.give_back()
            raise
        self._open.add(generation)
        assert self._keeper is not None
        self._keeper.in_flight = len(self._open)
        await generation.start()
        self._keeper.answered = True
        return generation

    async def _admitted(
        self, engine: Any, request: GenerationRequest, adapter: LoadedAdapter | None
    ) -> VllmGeneration:
        """Not started yet."""
        longest, vocab_size = self.capabilities.max_model_len, self._front.vocab_size
        assert self._constraints is not None, "load() has not returned"
        constraint = await self._constraints.checked(request.constraint)
        parts = list(request.images())
        rendered = await rendered_prompt(self._front.renderer, request, self._threads)
        token_ids = rendered.token_ids
        if not parts:
            token_ids = checked_tokens(request, token_ids, longest, vocab_size)
        # What is refused in any case is refused before its pictures cost anything; that it is too long with them is
        # said when it is known how long.
        early = dataclasses.replace(request, max_tokens_is_default=True) if parts else request
        params = await self._spelled(checked_sampling(early, len(token_ids), longest, vocab_size))
        copies = request.n if params.greedy else 1
        answers = request.n // copies
        theirs = to_vllm(self._vllm, params, answers, constraint, request.names, self._samplers)
        await check_runner_limits(self._vllm, engine, theirs, self._front.eos_token_ids, self._threads)
        prompt = await self._inputs.placed(engine, self._front.exchanged(token_ids, parts), parts)
        ids: list[int] = list(prompt["prompt_token_ids"])
        most = params.max_tokens
        if parts:
            most = checked_sampling(request, len(ids), longest, vocab_size).max_tokens
        check_prompt_logprobs(params, len(ids), answers)
        if most != params.max_tokens:
            params = msgspec.structs.replace(params, max_tokens=most)
            theirs.max_tokens, theirs.min_tokens = most, min(theirs.min_tokens, most)
        stats = PromptStats(
            prompt_tokens=len(ids),
            image_tokens=sum(int(place.length) for place in placeholders(prompt)),
            prompt_token_ids=ids,
            prompt_text=rendered.text,
        )
        outputs = engine.generate(
            prompt,
            theirs,
            f"{request.request_id}-{next(self._numbers)}",
            lora_request=None if adapter is None else adapter.request,
            priority=request.priority,
        )
        generation = VllmGeneration(
            outputs,
            stats,
            params,
            texts=self._front.token_texts.answers(request, params, ids, answers),
            copies=copies,
            eos_token_ids=self._front.eos_token_ids,
            token_text=self._front.token_texts,
            constrained=constraint is not None,
            failure=partial(self._failure, engine, request.constraint),
            ended=partial(self._forget, adapter=adapter),
        )
        return generation

    async def _spelled(self, params: SamplingParams) -> SamplingParams:
        """With DRY's breakers as token ids. In a thread: there may be a thousand long ones."""
        if params.dry_multiplier <= 0.0:
            return params
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, with_breakers, params, self._front.tokenizer
        )

    async def tokenize(self, prompt: Prompt) -> TokenizedPrompt:
        front, loop = self._front, asyncio.get_running_loop()
        rendered = await loop.run_in_executor(
            self._threads, partial(front.renderer.render, prompt, spans=True)
        )
        expanded: list[list[int]] = []
        parts = list(pictures(prompt))
        if parts:
            keeper = self._keeper
            engine = None if keeper is None else keeper.engine
            if engine is None:
                raise Unavailable("the engine is being restarted; try again", retry_after=5)
            token_ids = front.exchanged(rendered.token_ids, parts)
            placed = await self._inputs.placed(engine, token_ids, parts)
            ids = list(placed["prompt_token_ids"])
            places = sorted(placeholders(placed), key=lambda place: int(place.offset))
            expanded = [ids[place.offset : place.offset + place.length] for place in places]
        return await loop.run_in_executor(
            self._threads, tokenized, rendered, front.tokenizer, front.renderer.image_token_id, expanded
        )

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, detokenized, token_ids, self._front.tokenizer
        )

    def health(self) -> Health:
        if self._keeper is None or not self._loaded:
            return Health(False, "the model is loading")
        return self._keeper.health()

    def stats(self) -> BackendStats:
        keeper, counters = self._keeper, self._counters
        if keeper is None or not self._loaded:
            return BackendStats()
        # vLLM is silent once the last request is gone, so its last word on what runs is not the latest.
        usage = list(counters.cache_usage.values()) if self._open else []
        running = sum(generation.started for generation in self._open)
        return BackendStats(
            running=running,
            waiting=len(self._open) - running,
            kv_blocks_used=round(self._blocks * sum(usage) / self._replicas),
            kv_blocks_total=self._blocks,
            prefix_cache_queries=counters.prefix_queries,
            prefix_cache_hits=counters.prefix_hits,
            encoder_cache_queries=counters.mm_queries,
            encoder_cache_hits=counters.mm_hits,
            preemptions=counters.preemptions,
            engine_restarts=keeper.restarts,
            replicas=self._replicas,
            replicas_ready=self._replicas if keeper.health().ready else 0,
            series=tuple(series(self._vllm)),
        )

    async def close(self) -> None:
        if self._loaded:
            self._adapters.close()
        self._loaded = False
        if self._constraints is not None:
            await self._constraints.close()
        if self._keeper is not None:
            await self._keeper.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _engine(self) -> Any:
        """The one that serves now. Raises Unavailable."""
        keeper = self._keeper
        if keeper is None or not self._loaded:
            raise Unavailable("the model is still loading", retry_after=5)
        if keeper.engine is None or keeper.engine.errored:
            reason = "failed too often" if keeper.given_up else "is being restarted; try again"
            raise Unavailable(f"the engine {reason}", retry_after=5)
        return keeper.engine

    async def _prepare(self, engine: Any) -> None:
        """Give a new engine what the one before it had."""
        await self._adapters.load(engine, again=self._loaded)

    def _forget(self, generation: VllmGeneration, adapter: LoadedAdapter | None) -> None:
        if adapter is not None:
            adapter.give_back()
        self._open.discard(generation)
        if self._keeper is not None:
            self._keeper.in_flight = len(self._open)

    def _failure(
        self, engine: Any, constraint: Constraint | None, error: Exception, begun: bool
    ) -> ServingError:
        if isinstance(error, self._vllm.EngineDeadError) and not self._loaded:
            return Unavailable("the server is stopping", retry_after=5)
        param = None if constraint is None else constraint.param
        # Where vLLM's output loop has failed, what it failed with is told before an output, too.
        return failed(self._vllm, error, param, accepted=begun or engine.errored)
