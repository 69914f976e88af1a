"""vLLM as an engine of the pipeline."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from engine.errors import EngineError
from engine.machine import this_machine
from handlers import progress
from handlers.backends.adapters import AdapterFiles
from handlers.backends.base import (
    BackendStats,
    Capabilities,
    EngineRequest,
    Health,
    PromptModel,
    compute_type,
)
from handlers.backends.vllm import compat
from handlers.backends.vllm.adapters import LoadedAdapter, VllmAdapters, adapter_slots
from handlers.backends.vllm.arguments import engine_arguments
from handlers.backends.vllm.compat import replica_count
from handlers.backends.vllm.devices import choose_devices, share_cores
from handlers.backends.vllm.outputs import VllmStream, failed, refusal_reason
from handlers.backends.vllm.parsers import VllmParsers, vllm_parsers
from handlers.backends.vllm.probes import Counters, Probes, series, stat_logger
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
from handlers.errors import InvalidConfiguration, InvalidRequest, ServingError, Unavailable
from handlers.model_names import ANYBODYS, accepted_names
from handlers.prompts.tokenizer import load_tokenizer
from properties.configuration import Configuration
from properties.problem import ConfigurationError

if TYPE_CHECKING:
    from handlers.backends.adapters import AdapterStore
    from handlers.parsers.base import AnswerFormats
    from handlers.request import Constraint, MediaPart

logger = logging.getLogger(__name__)

_THREADS = 2

T = TypeVar("T")


class EngineBuilder:
    """Builds engines. Everything here blocks.

    Attributes:
        vllm: The imported names.
        machine: This one.
        arguments: For `AsyncEngineArgs`.
        samplers: Those of ours that the engines have.
        adapter_directories: The adapters to load at the start, by their names.
        most_adapters: How many adapters there may be.
        adapter_files: Which others may be loaded.
    """

    def __init__(self, configuration: Configuration, model_path: Path) -> None:
        """Import vLLM. Raises InvalidConfiguration if it cannot serve this model."""
        settings = configuration.settings
        self.machine = this_machine()
        choose_devices(settings, len(self.machine.accelerators))
        self.vllm = compat.load()
        self.arguments = engine_arguments(self.vllm, configuration, model_path, self.machine)
        self.samplers = offer(self.arguments)
        self.adapter_files = AdapterFiles(
            configuration.home or model_path, settings.allowed_adapter_path, configuration.secure
        )
        self.most_adapters = settings.max_cpu_loras or settings.max_loras
        self.adapter_directories: dict[str, Path] = {}
        if settings.enable_lora:
            self.adapter_directories = self.adapter_files.at_start()
            count, cpu = len(self.adapter_directories), not self.machine.accelerators
            if count > self.most_adapters:
                text = "%d adapters, but option.max_cpu_loras is %d: they will take turns in memory"
                logger.warning(text, count, self.most_adapters)
            most = max(self.most_adapters, count if cpu else 0)
            self.arguments |= adapter_slots(self.arguments, most, cpu=cpu)

    def build(self, tokenizer: Any, counters: Counters) -> Any:
        """Return an `AsyncLLM`. Raises InvalidConfiguration with vLLM's reason if it refuses the configuration."""
        vllm, given = self.vllm, self.arguments
        if not self.machine.accelerators:
            share_cores(
                given["tensor_parallel_size"] * given["pipeline_parallel_size"] * given["data_parallel_size"]
            )
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
        settings = self._settings
        progress.current().begin("starting vLLM")
        builder = await self._in_thread(EngineBuilder, self._configuration, self._path)
        self._vllm, self._samplers = builder.vllm, builder.samplers
        try:
            # Read before the engine starts, which takes long: what a model lacks is often its tokenizer.
            tokenizer, parsers, formats = await self._in_thread(self._read_answers)
            names = {*accepted_names(self._configuration), *ANYBODYS} if settings.enable_lora else None
            self._adapters = VllmAdapters(
                self._vllm,
                builder.adapter_files,
                builder.adapter_directories,
                builder.most_adapters,
                self._engine,
                names,
            )
            self._probes = Probes(self._vllm, self._numbers)
            self._supervisor = EngineSupervisor(
                lambda: builder.build(tokenizer, self._counters),
                self._probes.ask,
                self._counters,
                prepare=self._prepare,
                retry_threshold=settings.retry_threshold,
                loading_seconds=settings.model_loading_timeout,
                suspect_seconds=settings.engine_suspect_timeout,
                stuck_seconds=settings.engine_stuck_timeout or 300.0,
            )
            others = engine_children()
            async with weights_told(self._path, lambda: engine_children() - others):
                await self._supervisor.start()
            engine = self._supervisor.engine
            config = engine.vllm_config
            self._prompts = prompts = await self._in_thread(
                VllmPrompts, settings, self._path, tokenizer, self._vllm, engine
            )
            structured = config.structured_outputs_config
            vocabulary = await self._in_thread(constraint_vocabulary, structured, prompts)
            if settings.enable_mm_embeds and prompts.images:
                prompts.embeddings = await self._probes.embeddings(engine, prompts)
        except EngineError as error:
            await self.close()
            raise Unavailable(f"the model cannot be loaded: {error}") from error
        except BaseException:
            await self.close()
            raise
        if parsers is not None:
            parsers.model_config = config.model_config
        self._model = PromptModel(
            prompts.tokenizer,
            prompts.renderer,
            prompts.vocab_size,
            self._threads,
            vocabulary,
            json_whitespace="" if structured.disable_any_whitespace else None,
            spells_words=True,
        )
        parallel, accelerators = config.parallel_config, builder.machine.accelerators
        self._blocks = int(config.cache_config.num_gpu_blocks or 0)  # of all replicas
        self._replicas = replica_count(engine)
        self._capabilities = Capabilities(
            max_model_len=int(config.model_config.max_model_len),
            images=prompts.images,
            embeddings=settings.enable_mm_embeds,
            default_sampling=usual_sampling(prompts.default_sampling, self._samplers),
            adapters=settings.enable_lora,
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

    def _read_answers(self) -> tuple[Any, VllmParsers | None, AnswerFormats | None]:
        """Return the tokenizer, and vLLM's parsers and formats if the options name its parsers. Blocks."""
        settings = self._settings
        tokenizer = load_tokenizer(str(self._path), trust_remote_code=settings.trust_remote_code)
        parsers = vllm_parsers(settings, tokenizer)
        return tokenizer, parsers, None if parsers is None else parsers.formats(settings)

    async def _prepare(self, engine: Any) -> None:
        """Make a new engine ready to serve."""
        await engine.reset_mm_cache()  # vLLM's profiling leaves dummy images there
        await asyncio.gather(
            *(self._probes.warm(engine, replica) for replica in range(replica_count(engine)))
        )
        await self._adapters.load(engine, again=self._loaded)

    async def _in_thread(self, call: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *args)

    @property
    def capabilities(self) -> Capabilities:
        assert self._capabilities is not None, "load() has not returned"
        return self._capabilities

    @property
    def model(self) -> PromptModel:
        return self._model

    @property
    def adapters(self) -> AdapterStore | None:
        return self._adapters if self._settings.enable_lora else None

    async def prepare(
        self, token_ids: list[int], parts: Sequence[MediaPart], request: EngineRequest | None
    ) -> VllmPrompt:
        engine = self._engine()
        adapter = None if request is None else self._adapters.taken(request.adapter, request.model)
        try:
            theirs = None if request is None else await self._parameters(engine, request)
            written = self._prompts.with_placeholders(token_ids, parts)
            prompt = await place_images(self._vllm, engine, written, parts, self._prompts.embeddings)
        except BaseException:
            if adapter is not None:
                adapter.give_back()
            raise
        return VllmPrompt(engine, prompt, theirs, adapter)

    async def _parameters(self, engine: Any, request: EngineRequest) -> Any:
        constraint = request.constraint
        if constraint is not None and request.grammar is not None:
            constraint = constraint_for_vllm(constraint, request.grammar)
        theirs = to_vllm(self._vllm, request.params, request.n, constraint, self._samplers)
        check = partial(check_runner_limits, self._vllm, engine, theirs, self._prompts.eos_token_ids)
        if theirs.bad_words:
            await self._in_thread(check)  # which makes tokens of them
        else:
            check()
        return theirs

    async def generate(self, prompt: VllmPrompt, request: EngineRequest) -> VllmStream:
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
            eos_token_ids=self._prompts.eos_token_ids,
            failure=partial(self._failure, engine, request.constraint),
            ended=partial(self._forget, prompt=prompt),
        )
        self._open.add(stream)
        self._supervisor.in_flight = len(self._open)
        await stream.start()
        self._supervisor.answered = True
        return stream

    def health(self) -> Health:
        if self._supervisor is None or not self._loaded:
            return Health(False, "the model is loading")
        return self._supervisor.health()

    def stats(self) -> BackendStats:
        supervisor, counters = self._supervisor, self._counters
        if supervisor is None or not self._loaded:
            return BackendStats()
        # vLLM reports nothing after the last request has ended, so its last report is outdated then.
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

    def _forget(self, stream: VllmStream, prompt: VllmPrompt) -> None:
        prompt.discard()
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
