"""vLLM as an engine of the pipeline."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError
from engine.machine import this_machine
from handlers import progress
from handlers.backends.adapters import AdapterFiles
from handlers.backends.base import BackendStats, Capabilities, EngineRequest, Health, PromptModel, compute_type
from handlers.backends.vllm import compat
from handlers.backends.vllm.adapters import LoadedAdapter, VllmAdapters, adapter_slots
from handlers.backends.vllm.arguments import engine_arguments
from handlers.backends.vllm.compat import replica_count, runner_limits
from handlers.backends.vllm.devices import choose_devices, share_cores
from handlers.backends.vllm.outputs import VllmStream, failed, refusal_reason
from handlers.backends.vllm.parsers import VllmParsers, vllm_parsers
from handlers.backends.vllm.probes import Counters, accepted_embeddings, ask, stat_logger, warm
from handlers.backends.vllm.processes import engine_children
from handlers.backends.vllm.prompts import VllmPrompts, place_images, placeholders
from handlers.backends.vllm.sampling import (
    check_prompt_logprobs,
    check_runner_limits,
    choose_library,
    constraint_for_vllm,
    constraint_vocabulary,
    offer,
    to_vllm,
    usual_sampling,
)
from handlers.backends.vllm.supervisor import EngineSupervisor
from handlers.backends.weights_read import weights_told
from handlers.errors import InvalidConfiguration, InvalidRequest, ServingError, Unavailable, stopping
from handlers.prompts.tokenizer import load_tokenizer
from properties.configuration import Configuration
from properties.problem import ConfigurationError

if TYPE_CHECKING:
    from handlers.backends.adapters import AdapterStore
    from handlers.backends.vllm.compat import Vllm
    from handlers.backends.vllm.sampling import Samplers
    from handlers.request import MediaPart
    from properties.settings import Settings

logger = logging.getLogger(__name__)

_THREADS = 2

_ANY_MODEL = ("lmi", "tgi")
"""What clients of LMI and TGI write in `model` when they do not know the model's name."""


class EngineBuilder:
    """Builds engines, all with the same arguments. Everything here blocks.

    Attributes:
        vllm: The imported names.
        accelerators: This machine's.
        arguments: For `AsyncEngineArgs`.
        samplers: Those of ours that the engines have.
        adapters: Which may be loaded, the directories of those that are from the start, and how many there may be.
    """

    def __init__(self, configuration: Configuration, model_path: Path) -> None:
        """Import vLLM. Raises InvalidConfiguration if it cannot serve this model."""
        settings, machine = configuration.settings, this_machine()
        self.accelerators = machine.accelerators
        choose_devices(settings, len(self.accelerators))
        self.vllm = compat.load()
        self.arguments = engine_arguments(self.vllm, configuration, model_path, machine)
        self.samplers = offer(self.arguments)
        files = AdapterFiles(configuration.home or model_path, settings.allowed_adapter_path, configuration.secure)
        most = settings.max_cpu_loras or settings.max_loras
        at_start = files.at_start() if settings.enable_lora else {}
        self.adapters = files, at_start, most
        if settings.enable_lora:
            if len(at_start) > most:
                text = "%d adapters, but option.max_cpu_loras is %d: they will take turns in memory"
                logger.warning(text, len(at_start), most)
            cpu = not self.accelerators
            places = max(most, len(at_start)) if cpu else most
            self.arguments |= adapter_slots(self.arguments, places, cpu=cpu)

    def build(self, tokenizer: Any, counters: Counters) -> Any:
        """Return an `AsyncLLM`. Raises InvalidConfiguration with vLLM's reason if it refuses the configuration."""
        vllm, given = self.vllm, self.arguments
        if not self.accelerators:
            share_cores(given["tensor_parallel_size"] * given["pipeline_parallel_size"] * given["data_parallel_size"])
        try:
            arguments = vllm.AsyncEngineArgs(**given)
            choose_library(arguments, tokenizer)
            return vllm.AsyncLLM.from_engine_args(
                arguments, usage_context=vllm.server_context, stat_loggers=[stat_logger(vllm, counters)]
            )
        except (ConfigurationError, ServingError):
            raise
        except Exception as error:
            raise InvalidConfiguration(
                f"vLLM {vllm.version} cannot serve the model as configured: {refusal_reason(error)}"
            ) from error


@dataclass(eq=False)
class VllmEngine:
    """See `handlers.backends.base.Engine`; `start` makes one.

    Attributes:
        vllm: The imported names.
        samplers: Those of ours that the engine has.
        loras: What loads adapters; without any if option.enable_lora is not set.
        supervisor: Holds vLLM's engine, and replaces it.
        counters: What the engine has reported.
        prompts: What prompts of its model need.
        blocks: The blocks of the caches of all replicas.
        replicas: Replicas of the model.
        threads: Where slow work on prompts is done.
    """

    vllm: Vllm
    samplers: Samplers
    loras: VllmAdapters
    supervisor: EngineSupervisor
    counters: Counters
    prompts: VllmPrompts
    model: PromptModel
    capabilities: Capabilities
    blocks: int
    replicas: int
    threads: ThreadPoolExecutor
    _open: set[VllmStream] = field(default_factory=set)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @classmethod
    async def start(cls, configuration: Configuration, model_path: Path) -> VllmEngine:
        """Return a loaded engine; see `Backend.build`."""
        progress.current().begin("starting vLLM")
        async with AsyncExitStack() as undo:
            threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="vllm-prompts")
            undo.callback(threads.shutdown, wait=False, cancel_futures=True)
            try:
                engine = await cls._started(configuration, model_path, threads, undo)
            except EngineError as error:
                raise Unavailable(f"the model cannot be loaded: {error}") from error
            undo.pop_all()
            return engine

    @classmethod
    async def _started(
        cls, configuration: Configuration, path: Path, threads: ThreadPoolExecutor, undo: AsyncExitStack
    ) -> VllmEngine:
        loop, settings = asyncio.get_running_loop(), configuration.settings
        in_thread = partial(loop.run_in_executor, threads)
        builder = await in_thread(EngineBuilder, configuration, path)
        vllm, counters = builder.vllm, Counters()
        # Read before the engine starts, which takes long: what a model lacks is often its tokenizer.
        tokenizer, parsers = await in_thread(_read_answers, settings, path)
        names = {*configuration.accepted_names, *_ANY_MODEL} if settings.enable_lora else None
        adapters = VllmAdapters(vllm, *builder.adapters, lambda: supervisor.serving, names)
        undo.callback(adapters.close)

        async def prepare(engine: Any) -> None:
            await engine.reset_mm_cache()  # vLLM's profiling leaves dummy images there
            await asyncio.gather(*(warm(vllm, engine, replica) for replica in range(replica_count(engine))))
            await adapters.load(engine, again=supervisor.restarts > 0)

        supervisor = EngineSupervisor(
            lambda: builder.build(tokenizer, counters),
            partial(ask, vllm),
            counters,
            prepare=prepare,
            retry_threshold=settings.retry_threshold,
            loading_seconds=settings.model_loading_timeout,
            suspect_seconds=settings.engine_suspect_timeout,
            stuck_seconds=settings.engine_stuck_timeout or 300.0,
        )
        undo.push_async_callback(supervisor.close)
        others = engine_children()
        async with weights_told(path, lambda: engine_children() - others):
            await supervisor.start()
        engine = supervisor.engine
        config = engine.vllm_config
        prompts = await in_thread(VllmPrompts, settings, path, tokenizer, vllm, engine)
        structured = config.structured_outputs_config
        vocabulary = await in_thread(constraint_vocabulary, structured, prompts.text)
        if settings.enable_mm_embeds and prompts.images:
            prompts.embeddings = await accepted_embeddings(vllm, engine, prompts)
        if parsers is not None:
            parsers.model_config = config.model_config
        parallel, accelerators, replicas = config.parallel_config, builder.accelerators, replica_count(engine)
        blocks, block_size = int(config.cache_config.num_gpu_blocks or 0), int(config.cache_config.block_size)
        ranks = int(parallel.tensor_parallel_size) * int(parallel.pipeline_parallel_size)
        capabilities = Capabilities(
            max_model_len=int(config.model_config.max_model_len),
            images=prompts.images,
            embeddings=settings.enable_mm_embeds,
            default_sampling=usual_sampling(prompts.text.default_sampling, builder.samplers),
            adapters=settings.enable_lora,
            structured_outputs=True,
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            device_type="cuda" if accelerators else "cpu",
            compute_type=compute_type(accelerators[0].name if accelerators else "cpu", ranks),
            cache_tokens=blocks * block_size,
            prompt_threads=_THREADS,
            formats=None if parsers is None else parsers.formats,
        )
        logger.info(
            "vLLM %s ready: %s, %d x %d x %d devices, %d tokens of context, %d blocks of %d tokens, "
            "steps of at most %d requests and %d tokens",
            vllm.version, config.model_config.dtype, replicas, parallel.pipeline_parallel_size,
            parallel.tensor_parallel_size, capabilities.max_model_len, blocks, block_size,
            config.scheduler_config.max_num_seqs, config.scheduler_config.max_num_batched_tokens,
        )  # fmt: skip
        model = PromptModel(
            prompts.text.tokenizer,
            prompts.text.renderer,
            prompts.text.vocab_size,
            threads,
            vocabulary,
            json_whitespace="" if structured.disable_any_whitespace else None,
            spells_words=True,
        )
        samplers = builder.samplers
        return cls(
            vllm, samplers, adapters, supervisor, counters, prompts, model, capabilities, blocks, replicas, threads
        )

    @property
    def adapters(self) -> AdapterStore | None:
        return self.loras if self.capabilities.adapters else None

    async def prepare(
        self, token_ids: list[int], parts: Sequence[MediaPart], request: EngineRequest | None
    ) -> VllmPrompt:
        engine = self.supervisor.serving
        adapter = None if request is None else self.loras.taken(request.adapter, request.model)
        try:
            theirs = None if request is None else await self._parameters(engine, request)
            written = self.prompts.with_placeholders(token_ids, parts)
            prompt = await place_images(self.vllm, engine, written, parts, self.prompts.embeddings)
        except BaseException:
            if adapter is not None:
                adapter.give_back()
            raise
        return VllmPrompt(engine, prompt, theirs, adapter)

    async def _parameters(self, engine: Any, request: EngineRequest) -> Any:
        """Return vLLM's parameters of a request. Raises InvalidRequest."""
        constraint = request.constraint
        if constraint is not None and request.grammar is not None:
            constraint = constraint_for_vllm(constraint, request.grammar)
        theirs = to_vllm(self.vllm, request.params, request.n, constraint, self.samplers)
        if (limits := runner_limits(engine.vllm_config)) is not None:
            ends, tokenizer = self.prompts.text.eos_token_ids, engine.get_tokenizer()
            check = partial(check_runner_limits, self.vllm, limits, theirs, ends, tokenizer)
            if theirs.bad_words:  # they become tokens
                await asyncio.get_running_loop().run_in_executor(self.threads, check)
            else:
                check()
        return theirs

    async def generate(self, prompt: VllmPrompt, request: EngineRequest) -> VllmStream:
        engine, theirs, most = prompt.engine, prompt.parameters, request.params.max_tokens
        try:
            check_prompt_logprobs(request.params, len(prompt.token_ids), request.n)
        except InvalidRequest:
            prompt.discard()
            raise
        if most is not None and most != theirs.max_tokens:
            theirs.max_tokens, theirs.min_tokens = most, min(theirs.min_tokens, most)
        outputs = engine.generate(
            prompt.prompt,
            theirs,
            f"{request.request_id}-{next(self._numbers)}",
            lora_request=None if prompt.adapter is None else prompt.adapter.request,
            priority=request.priority,
        )
        param = None if request.constraint is None else request.constraint.param

        def failure(error: Exception, begun: bool) -> ServingError:
            if isinstance(error, self.vllm.EngineDeadError) and self.supervisor.closed:
                return stopping()
            return failed(self.vllm, engine, error, param, begun=begun)

        def ended(stream: VllmStream) -> None:
            prompt.discard()
            self._open.discard(stream)
            self.supervisor.in_flight = len(self._open)

        stream = VllmStream(
            outputs,
            request,
            images=bool(prompt.images),
            eos_token_ids=self.prompts.text.eos_token_ids,
            failure=failure,
            ended=ended,
        )
        self._open.add(stream)
        self.supervisor.in_flight = len(self._open)
        await stream.start()
        self.supervisor.answered = True
        return stream

    def health(self) -> Health:
        return self.supervisor.health()

    def stats(self) -> BackendStats:
        if self.supervisor.closed:
            return BackendStats()
        counters = self.counters
        # vLLM reports nothing after the last request has ended, so its last report is outdated then.
        usage = list(counters.cache_usage.values()) if self._open else []
        running = sum(stream.started for stream in self._open)
        families = self.vllm.get_prometheus_registry().collect()
        return BackendStats(
            running=running,
            waiting=len(self._open) - running,
            kv_blocks_used=round(self.blocks * sum(usage) / self.replicas),
            kv_blocks_total=self.blocks,
            prefix_cache_queries=counters.prefix_queries,
            prefix_cache_hits=counters.prefix_hits,
            encoder_cache_queries=counters.mm_queries,
            encoder_cache_hits=counters.mm_hits,
            preemptions=counters.preemptions,
            engine_restarts=self.supervisor.restarts,
            replicas=self.replicas,
            replicas_ready=self.replicas if self.supervisor.health().ready else 0,
            series=[family for family in families if family.name.startswith("vllm:")],
        )

    async def close(self) -> None:
        self.loras.close()
        await self.supervisor.close()
        self.threads.shutdown(wait=False, cancel_futures=True)


def _read_answers(settings: Settings, path: Path) -> tuple[Any, VllmParsers | None]:
    """Return the tokenizer, and vLLM's parsers if the options name any. Blocks."""
    tokenizer = load_tokenizer(str(path), trust_remote_code=settings.trust_remote_code)
    return tokenizer, vllm_parsers(settings, tokenizer)


@dataclass(slots=True)
class VllmPrompt:
    """See `handlers.backends.base.PreparedPrompt`. parameters are vLLM's; None if only tokens are wanted."""

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
