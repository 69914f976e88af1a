"""The statistics that vLLM reports after each step, and its own metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from handlers.backends.vllm.compat import Vllm


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


def stat_logger(vllm: Vllm, counters: Counters) -> Any:
    """Return a factory for `AsyncLLM`'s `stat_loggers` that updates the counters.

    vLLM does not promise that this interface is stable, so a missing field counts as 0.
    """

    class Recorder(vllm.StatLoggerBase):  # type: ignore[misc, name-defined]
        def __init__(self, *_: Any) -> None:
            pass

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
                counters.cache_usage[engine_idx] = float(_number(scheduler_stats, "kv_cache_usage"))
                prefix = getattr(scheduler_stats, "prefix_cache_stats", None)
                counters.prefix_queries += int(_number(prefix, "queries"))
                counters.prefix_hits += int(_number(prefix, "hits"))
            counters.preemptions += int(_number(iteration_stats, "num_preempted_reqs"))
            counters.mm_queries += int(_number(mm_cache_stats, "queries"))
            counters.mm_hits += int(_number(mm_cache_stats, "hits"))

        def log_engine_initialized(self) -> None:
            pass

    return Recorder


def _number(source: Any, name: str) -> float:
    value = getattr(source, name, 0)
    return value if isinstance(value, int | float) else 0


def series(vllm: Vllm) -> Iterator[Any]:
    """Yield vLLM's own metric families."""
    for family in vllm.get_prometheus_registry().collect():
        if family.name.startswith("vllm:"):
            yield family
