"""Results of a run: what is printed, saved and compared."""

from __future__ import annotations

import collections
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import psutil

from bench.load import Run
from bench.servers import MB, Sample

PERCENTILES = (50, 90, 99)
HIGHER_IS_BETTER = ("requests_per_s", "tokens_per_s")
LOWER_IS_BETTER = ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms")
MOST_FAILED = 0.01  # of the requests, at a knee


def summary(run: Run, samples: list[Sample]) -> dict[str, Any]:
    """Return a run's numbers as plain JSON values; latencies in milliseconds, or None if none was measured.

    Rates count whole replies over the time from the first request to the last reply. The time to the first
    token ends at the first chunk that carries content; the inter-token latency is the time between two such
    chunks, and the time per output token a reply's time after its first chunk over its tokens after the first.
    Memory is in megabytes.
    """
    seconds = run.end - run.begin
    whole = [reply for reply in run.replies if reply.ok and reply.contents]
    gaps = [np.diff(reply.contents) for reply in whole]
    per_token = [
        (reply.contents[-1] - reply.contents[0]) / (reply.completion_tokens - 1)
        for reply in whole
        if reply.completion_tokens > 1
    ]
    return {
        "load": asdict(run.load),
        "seconds": seconds,
        "requests": len(run.replies),
        "outcomes": dict(collections.Counter(reply.outcome for reply in run.replies)),
        "errors": sorted({reply.error for reply in run.replies if reply.error})[:3],
        "requests_per_s": len(whole) / seconds,
        "tokens_per_s": sum(reply.completion_tokens for reply in whole) / seconds,
        "prompt_tokens": float(np.mean([reply.prompt_tokens for reply in whole])) if whole else 0.0,
        "tokens_per_chunk": _ratio(
            sum(reply.completion_tokens for reply in whole), sum(len(reply.contents) for reply in whole)
        ),
        "ttft_ms": _percentiles([reply.contents[0] - reply.start for reply in whole]),
        "itl_ms": _percentiles(np.concatenate(gaps) if gaps else []),
        "tpot_ms": _percentiles(per_token),
        "e2e_ms": _percentiles([reply.end - reply.start for reply in whole]),
        "client_cores": run.client_cpu / seconds,
        **_machine_use(run, samples),
    }


def timeline(run: Run, samples: list[Sample]) -> dict[str, Any]:
    """Return when each request started, spoke first and ended, and the samples, in seconds from the start."""
    return {
        "seconds": run.end - run.begin,
        "requests": [
            [round(x - run.begin, 4) for x in (reply.start, reply.contents[0], reply.end)]
            for reply in run.replies
            if reply.contents
        ],
        "chunks": _histogram(run),
        "samples": [[round(s.when - run.begin, 3), s.cpu, s.front, s.workers] for s in _during(run, samples)],
    }


def machine() -> dict[str, Any]:
    """Return what a reader of the numbers needs to know of the machine."""
    return {
        "processor": _processor(),
        "cores": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table of summaries by the name of the row."""
    columns = ["", "requests/s", "tokens/s", "TTFT p50/p90/p99 ms", "ITL p50/p90/p99 ms"]
    columns += ["CPU cores", "front MB", "workers MB", "failed"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['requests_per_s']:.1f} | {row['tokens_per_s']:.0f} | {_three(row['ttft_ms'])} "
            f"| {_three(row['itl_ms'])} | {row['cpu_cores']:.2f} | {row['front_mb']:.0f} "
            f"| {row['workers_mb']:.0f} | {failed(row)} |"
        )
    return "\n".join(lines)


def failed(row: dict[str, Any]) -> int:
    """Return how many of a summary's requests did not bring a whole reply."""
    return int(row["requests"] - row["outcomes"].get("200", 0))


def knee(rows: Sequence[dict[str, Any]]) -> int | None:
    """Return which of a server's loads is at the knee of latency against throughput.

    It is where whole replies a second, divided by the mean time that one takes, are most: Kleinrock's power ("Power and
    deterministic rules of thumb for probabilistic problems in computer communications", ICC 1979). With a fixed
    number of clients, twice as many beyond it bring less than 1.41 times the throughput. Loads of which more than
    1 % failed are left out. None if that leaves none, or the last load: the knee may lie beyond it.
    """
    power = [
        row["requests_per_s"] / row["e2e_ms"]["mean"]
        if row["e2e_ms"]["mean"] and failed(row) <= MOST_FAILED * row["requests"]
        else 0.0
        for row in rows
    ]
    if not any(power):
        return None
    found = power.index(max(power))
    return found if found < len(rows) - 1 else None


def times_better(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, float]:
    """Return, by number, the median over pairs of summaries of how many times better the first is; 0 if unknown."""
    found = {key: statistics.median(_ratio(one[key], other[key]) for one, other in pairs) for key in HIGHER_IS_BETTER}
    for key in LOWER_IS_BETTER:
        for p in (f"p{percentile}" for percentile in PERCENTILES):
            found[f"{key} {p}"] = statistics.median(_ratio(other[key][p], one[key][p]) for one, other in pairs)
    return found


def cores(run: Run, samples: list[Sample]) -> float:
    """Return how many cores a server kept busy on average during a run, its own or another's."""
    if not samples:
        return 0.0
    times, used = [s.when for s in samples], [s.cpu for s in samples]
    begin, end = np.interp([run.begin, run.end], times, used)
    return float((end - begin) / (run.end - run.begin))


def shown(value: float | None, digits: int = 0) -> str:
    """Return a number for people; "n/a" for None."""
    return "n/a" if value is None else f"{value:.{digits}f}"


def _three(values: dict[str, float | None]) -> str:
    return " / ".join(shown(values[f"p{p}"], 1) for p in PERCENTILES)


def _percentiles(seconds: Any) -> dict[str, float | None]:
    if len(seconds) == 0:
        return dict.fromkeys([*(f"p{p}" for p in PERCENTILES), "mean", "max"])
    values = np.asarray(seconds) * 1e3
    found = np.percentile(values, PERCENTILES)
    named: dict[str, float | None] = {f"p{p}": float(value) for p, value in zip(PERCENTILES, found, strict=True)}
    return {**named, "mean": float(values.mean()), "max": float(values.max())}


def _machine_use(run: Run, samples: list[Sample]) -> dict[str, float]:
    seen = _during(run, samples) or samples[-1:]
    return {
        "cpu_cores": cores(run, samples),
        "front_mb": max((s.front for s in seen), default=0) / MB,
        "workers_mb": max((s.workers for s in seen), default=0) / MB,
    }


def _during(run: Run, samples: list[Sample]) -> list[Sample]:
    return [s for s in samples if run.begin <= s.when <= run.end]


def _histogram(run: Run, bins: int = 100) -> list[int]:
    arrivals = [when for reply in run.replies for when in reply.contents]
    counts, _ = np.histogram(arrivals, bins, (run.begin, run.end))
    return [int(count) for count in counts]


def _ratio(above: float | None, below: float | None) -> float:
    return above / below if above and below else 0.0


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
