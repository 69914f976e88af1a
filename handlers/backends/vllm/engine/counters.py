"""What vLLM says of itself after each step, and its own series for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from handlers.backends.vllm.compat import Vllm

PREFIX = "vllm:"


@dataclass(slots=True)
class Counters:
    """Counters since the process began, over all engines; gauges of the last step.

    By number of the replica (of data parallelism): signs, the `time.monotonic()` seconds of its last word; running, its
    requests; cache_usage, from 0 to 1.
    """

    prefix_queries: int = 0
    prefix_hits: int = 0
    mm_queries: int = 0
    mm_hits: int = 0
    preemptions: int = 0
    running: dict[int, int] = field(default_factory=dict)
    cache_usage: dict[int, float] = field(default_factory=dict)
    signs: dict[int, float] = field(default_factory=dict)


def stat_logger(vllm: Vllm, counters: Counters) -> Any:
    """A factory as `AsyncLLM` takes them in `stat_loggers`: it makes what fills `counters`.

    vLLM calls this interface not stable: a field that is missing counts as nothing.
    """

    class Recorder(vllm.StatLoggerBase):  # type: ignore[misc, name-defined]
        def __init__(self, vllm_config: Any = None, engine_index: int = 0) -> None:
            self._engine = engine_index

        def record(
            self,
            scheduler_stats: Any = None,
            iteration_stats: Any = None,
            mm_cache_stats: Any = None,
            engine_idx: int = 0,
            **more: Any,
        ) -> None:
            counters.signs[engine_idx] = time.monotonic()
            if scheduler_stats is not None:
                counters.running[engine_idx] = _number(scheduler_stats, "num_running_reqs")
                counters.cache_usage[engine_idx] = float(getattr(scheduler_stats, "kv_cache_usage", 0.0))
                prefix = getattr(scheduler_stats, "prefix_cache_stats", None)
                counters.prefix_queries += _number(prefix, "queries")
                counters.prefix_hits += _number(prefix, "hits")
            counters.preemptions += _number(iteration_stats, "num_preempted_reqs")
            counters.mm_queries += _number(mm_cache_stats, "queries")
            counters.mm_hits += _number(mm_cache_stats, "hits")

        def log_engine_initialized(self) -> None:
            pass

    return lambda config, index=0: Recorder(config, index)


def _number(source: Any, name: str) -> int:
    value = getattr(source, name, 0)
    return value if isinstance(value, int) else 0


def series(vllm: Vllm) -> Iterator[Any]:
    """vLLM's own metric families, as its registry holds them now."""
    for family in vllm.get_prometheus_registry().collect():
        if family.name.startswith(PREFIX):
            yield family
