"""An engine's statistics, and small requests of our own to it.

The requests find out whether the engine answers and whether it accepts embeddings, and have it compile its kernels.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from handlers.backends.vllm.compat import replica_count
from handlers.backends.vllm.outputs import failed
from handlers.backends.vllm.prompts import embeddings_wanted, place_images, smallest_embeddings
from handlers.errors import InvalidConfiguration, InvalidRequest, ServingError

if TYPE_CHECKING:
    from handlers.backends.embeddings import EmbeddingsWanted
    from handlers.backends.vllm.compat import Vllm
    from handlers.backends.vllm.prompts import VllmPrompts

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Counters:
    """Counts since the process began, over all engines.

    Attributes:
        cache_usage: By replica, the share of the KV cache that was used at the latest step.
        signs: By replica, the time of its latest report (`time.monotonic()`).
    """

    prefix_queries: int = 0
    prefix_hits: int = 0
    mm_queries: int = 0
    mm_hits: int = 0
    preemptions: int = 0
    cache_usage: dict[int, float] = field(default_factory=dict)
    signs: dict[int, float] = field(default_factory=dict)

    def add(self, scheduler: Any, iteration: Any, mm_cache: Any, replica: int) -> None:
        """Add vLLM's statistics of one step, each of which may be None."""
        if scheduler is not None:
            self.cache_usage[replica] = scheduler.kv_cache_usage
            self.prefix_queries += scheduler.prefix_cache_stats.queries
            self.prefix_hits += scheduler.prefix_cache_stats.hits
        if iteration is not None:
            self.preemptions += iteration.num_preempted_reqs
        if mm_cache is not None:
            self.mm_queries += mm_cache.queries
            self.mm_hits += mm_cache.hits


def stat_logger(vllm: Vllm, counters: Counters) -> Any:
    """Return a factory for `AsyncLLM`'s `stat_loggers` that updates the counters.

    vLLM does not promise that this interface is stable, and an exception here would end all of its requests.
    """

    class Recorder(vllm.StatLoggerBase):  # type: ignore[misc, name-defined]
        def __init__(self, *_: Any) -> None:
            self._failed = False

        def record(
            self,
            scheduler_stats: Any = None,
            iteration_stats: Any = None,
            mm_cache_stats: Any = None,
            engine_idx: int = 0,
            **_: Any,
        ) -> None:
            counters.signs[engine_idx] = time.monotonic()
            try:
                counters.add(scheduler_stats, iteration_stats, mm_cache_stats, engine_idx)
            except Exception as error:
                if not self._failed:
                    logger.warning("some of vLLM's counts are missing from /metrics: %s", error)
                self._failed = True

        def log_engine_initialized(self) -> None:
            pass

    return Recorder


async def ask(vllm: Vllm, engine: Any, replica: int, prompt: Any = None, **params: Any) -> None:
    """Have one replica answer a request, by default with a single token to any prompt."""
    fields = {"temperature": 0.0, "max_tokens": 1, "detokenize": False, **params}
    if engine.model_config.return_sampling_mask:
        # Requests must sample then, and from a bounded number of tokens.
        fields |= {"temperature": 1.0, "top_k": 1}
    outputs = engine.generate(
        prompt or _tokens(1),
        vllm.SamplingParams(**fields),
        f"probe-{uuid4()}",
        data_parallel_rank=replica if replica_count(engine) > 1 else None,
    )
    async for _ in outputs:
        pass


async def warm(vllm: Vllm, engine: Any, replica: int) -> None:
    """Have one replica compile what the first requests would otherwise wait for.

    The first request with log probabilities waits seconds for a compiler, and again for several rows, as with a prompt
    of three tokens. Features that the options forbid are skipped.
    """
    count = min(1, engine.model_config.max_logprobs % 2**31)  # -1: no limit
    fields: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "max_tokens": 2, "logprobs": count}
    if not engine.vllm_config.cache_config.kv_sharing_fast_prefill:
        fields["prompt_logprobs"] = count
    try:
        await ask(vllm, engine, replica, _tokens(3), **fields)
    except Exception as error:
        known = failed(vllm, engine, error)
        if not isinstance(known, InvalidRequest):
            raise
        logger.warning("first requests may wait for a compiler: %s", known.message)
        await ask(vllm, engine, replica)


async def accepted_embeddings(vllm: Vllm, engine: Any, prompts: VllmPrompts) -> EmbeddingsWanted | None:
    """Return the embeddings that the model accepts; None if it accepts none.

    Raises InvalidConfiguration if the engine fails on them.
    """
    wanted, token = embeddings_wanted(engine), prompts.text.renderer.image_token_id
    if wanted is None or token is None:
        return None
    parts = [smallest_embeddings(wanted)]
    try:
        written = prompts.with_placeholders([token], parts)
        await ask(vllm, engine, 0, await place_images(vllm, engine, written, parts, wanted))
    except ServingError as error:
        logger.warning("embeddings of images are refused: %s", error.message)
        return None
    except Exception as error:
        raise InvalidConfiguration(
            "option.enable_mm_embeds: the engine fails on embeddings of this model's images; leave it out"
        ) from error
    return wanted


def _tokens(count: int) -> dict[str, Any]:
    """Return a prompt as vLLM's renderer makes it: any tokens will do."""
    return {"type": "token", "prompt_token_ids": [0] * count}
