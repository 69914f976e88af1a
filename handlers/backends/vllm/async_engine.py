"""vLLM as an engine of the pipeline: its processes, and how prompts reach them."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError
from handlers.backends.adapters import AdapterStore
from handlers.backends.base import (
    BackendStats,
    Capabilities,
    EngineRequest,
    Health,
    PromptModel,
    compute_type,
)
from handlers.backends.vllm.adapters.store import LoadedAdapter, VllmAdapters
from handlers.backends.vllm.answers.parsers import vllm_parsers
from handlers.backends.vllm.engine.builder import EngineBuilder
from handlers.backends.vllm.engine.counters import Counters, series
from handlers.backends.vllm.engine.probes import Probes
from handlers.backends.vllm.engine.supervisor import EngineSupervisor
from handlers.backends.vllm.engine.watch import Patience
from handlers.backends.vllm.failures import failed
from handlers.backends.vllm.prompts.constraints import constraint_vocabulary, in_vllms_words
from handlers.backends.vllm.prompts.front import VllmFront
from handlers.backends.vllm.prompts.inputs import Inputs
from handlers.backends.vllm.prompts.rendered import placeholders
from handlers.backends.vllm.prompts.runner_limits import check_runner_limits
from handlers.backends.vllm.prompts.sampling import check_prompt_logprobs, to_vllm, usual_sampling
from handlers.backends.vllm.stream import VllmStream
from handlers.errors import InvalidRequest, ServingError, Unavailable
from handlers.model_names import ANYBODYS, accepted_names
from handlers.prompts.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from handlers.request import Constraint, MediaPart
    from properties.configuration import Configuration

logger = logging.getLogger(__name__)

_THREADS = 2


class VllmEngine:
    """See `handlers.backends.base.Engine`."""

    def __init__(self, configuration: Configuration, model_path: Path) -> None:
        self._configuration = configuration
        self._settings = configuration.settings
        self._path = model_path
        self._counters = Counters()
        self._supervisor: EngineSupervisor | None = None
        self._capabilities: Capabilities | None = None
        self._loaded = False
        self._open: set[VllmStream] = set()
        self._numbers = itertools.count()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="vllm-prompts")

    async def load(self) -> None:
        """See `Lifecycle`."""
        loop = asyncio.get_running_loop()
        builder = await loop.run_in_executor(self._threads, EngineBuilder, self._configuration, self._path)
        self._vllm, self._samplers = builder.vllm, builder.samplers
        self._inputs = Inputs(self._vllm)
        probes = Probes(self._vllm, self._inputs, self._numbers)
        read = partial(load_tokenizer, str(self._path), trust_remote_code=self._settings.trust_remote_code)
        self._supervisor = supervisor = EngineSupervisor(
            lambda: builder.build(tokenizer, self._counters),
            probes.ask,
            self._counters,
            warm=probes.warm,
            prepare=self._give_adapters,
            retry_threshold=self._settings.retry_threshold,
            loading_seconds=self._settings.model_loading_timeout,
            patience=Patience(
                self._settings.engine_suspect_timeout, self._settings.engine_stuck_timeout or Patience.stuck
            ),
        )
        try:
            # Checked before the engine starts, which takes long: what a model lacks is often its tokenizer.
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
                secure=self._configuration.secure,
            )
            await supervisor.start()
            config = supervisor.engine.vllm_config
            self._front = front = await loop.run_in_executor(
                self._threads,
                VllmFront,
                self._settings,
                str(self._path),
                tokenizer,
                self._vllm,
                supervisor.engine,
            )
            vocabulary = await loop.run_in_executor(
                self._threads, constraint_vocabulary, config.structured_outputs_config, front
            )
            if self._settings.enable_mm_embeds and front.images:
                await probes.try_embeddings(supervisor.engine, front)
        except EngineError as error:
            await supervisor.close()
            raise Unavailable(f"the model cannot be loaded: {error}") from error
        except BaseException:
            await supervisor.close()
            raise
        if parsers is not None:
            parsers.model_config = config.model_config
        self._model = PromptModel(
            front.tokenizer,
            front.renderer,
            front.vocab_size,
            self._threads,
            vocabulary,
            json_whitespace="" if config.structured_outputs_config.disable_any_whitespace else None,
            spells_words=True,
        )
        parallel, accelerators = config.parallel_config, builder.machine.accelerators
        self._blocks = int(config.cache_config.num_gpu_blocks or 0)  # of all replicas
        self._replicas = int(config.parallel_config.data_parallel_size)
        self._capabilities = Capabilities(
            max_model_len=int(config.model_config.max_model_len),
            images=front.images,
            embeddings=self._settings.enable_mm_embeds,
            default_sampling=usual_sampling(front.default_sampling, self._samplers),
            adapters=self._settings.enable_lora,
            structured_outputs=True,
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            device_type="cuda" if accelerators else "cpu",
            compute_type=compute_type(
                accelerators[0].name if accelerators else "cpu",
                int(parallel.tensor_parallel_size) * int(parallel.pipeline_parallel_size),
            ),
            cache_tokens=self._blocks * int(config.cache_config.block_size),
            prompt_threads=_THREADS,
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
        """See `Lifecycle`."""
        assert self._capabilities is not None, "load() has not returned"
        return self._capabilities

    @property
    def model(self) -> PromptModel:
        """See `Engine`."""
        return self._model

    @property
    def adapters(self) -> AdapterStore | None:
        """See `Engine`."""
        return self._adapters if self._settings.enable_lora else None

    async def prepare(
        self, token_ids: list[int], parts: Sequence[MediaPart], request: EngineRequest | None
    ) -> VllmPrompt:
        """See `Engine`."""
        engine = self._engine()
        theirs, adapter = None, None
        if request is not None:
            adapter = self._adapters.taken(request.adapter, request.model)
        try:
            if request is not None:
                theirs = self._parameters(request)
                await check_runner_limits(
                    self._vllm, engine, theirs, self._front.eos_token_ids, self._threads
                )
            prompt = await self._inputs.placed(engine, self._front.exchanged(token_ids, parts), parts)
        except BaseException:
            if adapter is not None:
                adapter.give_back()
            raise
        return VllmPrompt(engine, prompt, theirs, adapter)

    def _parameters(self, request: EngineRequest) -> Any:
        constraint = request.constraint
        if constraint is not None and request.grammar is not None:
            constraint = in_vllms_words(constraint, request.grammar)
        return to_vllm(self._vllm, request.params, request.n, constraint, self._samplers)

    async def generate(self, prompt: VllmPrompt, request: EngineRequest) -> VllmStream:
        """See `Engine`."""
        engine, theirs, most = prompt.engine, prompt.parameters, request.params.max_tokens
        assert self._supervisor is not None, "load() has not returned"
        try:
            check_prompt_logprobs(request.params, len(prompt.token_ids), request.n)
        except InvalidRequest:
            prompt.discard()
            raise
        if most is not None and most != theirs.max_tokens:
            theirs.max_tokens, theirs.min_tokens = most, min(theirs.min_tokens, most)
        stream = VllmStream(
            engine.generate(
                prompt.prompt,
                theirs,
                f"{request.request_id}-{next(self._numbers)}",
                lora_request=None if prompt.adapter is None else prompt.adapter.request,
                priority=request.priority,
            ),
            request.params,
            choices=request.n,
            images=bool(prompt.images),
            constrained=request.constraint is not None,
            eos_token_ids=self._front.eos_token_ids,
            failure=partial(self._failure, engine, request.constraint),
            ended=partial(self._forget, adapter=prompt.adapter),
        )
        self._open.add(stream)
        self._supervisor.in_flight = len(self._open)
        await stream.start()
        self._supervisor.answered = True
        return stream

    def health(self) -> Health:
        """See `Lifecycle`."""
        if self._supervisor is None or not self._loaded:
            return Health(False, "the model is loading")
        return self._supervisor.health()

    def stats(self) -> BackendStats:
        """See `Lifecycle`."""
        supervisor, counters = self._supervisor, self._counters
        if supervisor is None or not self._loaded:
            return BackendStats()
        # vLLM reports nothing once the last request is gone, so its last report of running requests is outdated.
        usage = list(counters.cache_usage.values()) if self._open else []
        running = sum(stream.started for stream in self._open)
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
            engine_restarts=supervisor.restarts,
            replicas=self._replicas,
            replicas_ready=self._replicas if supervisor.health().ready else 0,
            series=tuple(series(self._vllm)),
        )

    async def close(self) -> None:
        """See `Lifecycle`."""
        if self._loaded:
            self._adapters.close()
        self._loaded = False
        if self._supervisor is not None:
            await self._supervisor.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _engine(self) -> Any:
        """Return the engine that serves now. Raises Unavailable."""
        supervisor = self._supervisor
        if supervisor is None or not self._loaded:
            raise Unavailable("the model is still loading", retry_after=5)
        if supervisor.engine is None or supervisor.engine.errored:
            reason = "failed too often" if supervisor.given_up else "is being restarted; try again"
            raise Unavailable(f"the engine {reason}", retry_after=5)
        return supervisor.engine

    async def _give_adapters(self, engine: Any) -> None:
        """Load the adapters of the previous engine into a new one."""
        await self._adapters.load(engine, again=self._loaded)

    def _forget(self, stream: VllmStream, adapter: LoadedAdapter | None) -> None:
        if adapter is not None:
            adapter.give_back()
        self._open.discard(stream)
        if self._supervisor is not None:
            self._supervisor.in_flight = len(self._open)

    def _failure(
        self, engine: Any, constraint: Constraint | None, error: Exception, begun: bool
    ) -> ServingError:
        if isinstance(error, self._vllm.EngineDeadError) and not self._loaded:
            return Unavailable("the server is stopping", retry_after=5)
        param = None if constraint is None else constraint.param
        # If vLLM's output loop has failed, its exception can arrive before the first output, too.
        return failed(self._vllm, error, param, accepted=begun or engine.errored)


@dataclass(slots=True)
class VllmPrompt:
    """See `handlers.backends.base.PreparedPrompt`.

    engine: that it was rendered for. prompt: vLLM's input. parameters: vLLM's; None where only tokens are wanted.
    """

    engine: Any
    prompt: Any
    parameters: Any
    adapter: LoadedAdapter | None
    token_ids: list[int] = field(init=False)
    images: list[tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt["prompt_token_ids"])
        self.images = sorted((int(place.offset), int(place.length)) for place in placeholders(self.prompt))

    def discard(self) -> None:
        """Release the adapter."""
        if self.adapter is not None:
            self.adapter.give_back()
