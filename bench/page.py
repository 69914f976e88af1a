"""The page that shows the results of a sweep: one HTML file without scripts, which fetches nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from bench import report

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 58, WIDTH - 16, 26, HEIGHT - 44  # of the plotted area
PLOTS = (
    ("Throughput, tokens/s", "tokens_per_s"),
    ("Time to first token, ms", "ttft_ms"),
    ("Time between tokens, ms", "itl_ms"),
    ("Whole reply, ms", "e2e_ms"),
)
RATIOS = (
    ("requests/s", "requests_per_s"),
    ("tokens/s", "tokens_per_s"),
    ("TTFT p50", "ttft_ms p50"),
    ("TTFT p99", "ttft_ms p99"),
    ("ITL p50", "itl_ms p50"),
    ("ITL p99", "itl_ms p99"),
    ("whole p50", "e2e_ms p50"),
)
NICE = [step * 10.0**power for power in range(-4, 10) for step in (1, 2, 5)]


def html(results: dict[str, Any]) -> str:
    """Return the page for what `bench.sweep` found."""
    levels, knees = results["levels"], results["knees"]
    places = [round(LEFT + (RIGHT - LEFT) * (at + 0.5) / len(levels), 1) for at in range(len(levels))]
    labels, axis = _axis([level["name"] for level in levels])
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(Path(__file__).with_suffix(".html").read_text())
    return template.render(
        results,
        busiest=max(row["client_cores"] for level in levels for row in level["servers"]),
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=RIGHT,
        bottom=BOTTOM,
        places=places,
        labels=labels,
        axis=axis,
        plots=[_plot(title, key, levels, places) for title, key in PLOTS],
        marks=[(at, places[knee], TOP - 12 * at) for at, knee in enumerate(knees) if knee is not None],
        ratios=RATIOS,
        failures=_failures(results["servers"], levels),
        number=_number,
        failed=report.failed,
    )


def _plot(title: str, key: str, levels: list[dict[str, Any]], places: Sequence[float]) -> dict[str, Any]:
    """Return what the template draws: rates from 0 on, and times, of which there are two lines, logarithmically."""
    lines: list[tuple[str, list[float | None]]] = []
    for number in range(len(levels[0]["servers"])):
        values = [level["servers"][number][key] for level in levels]
        if isinstance(values[0], dict):
            lines += [(f"s{number} {p}", [value[p] for value in values]) for p in ("p50", "p99")]
        else:
            lines.append((f"s{number}", values))
    known = [value for _, values in lines for value in values if value] or [1.0]
    log = isinstance(levels[0]["servers"][0][key], dict)
    ticks = _decades(min(known), max(known)) if log else _steps(max(known))
    low, high = (math.log(ticks[0]), math.log(ticks[-1])) if log else (0.0, ticks[-1])

    def y(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * ((math.log(value) if log else value) - low) / (high - low), 1)

    def line(kind: str, values: list[float | None]) -> dict[str, Any]:
        points = [
            (x, y(value), f"{level['name']}: {_number(value)} {kind[3:]}".strip())
            for x, value, level in zip(places, values, levels, strict=True)
            if value
        ]
        return {"kind": kind, "points": points, "path": "M" + "L".join(f"{x},{y}" for x, y, _ in points)}

    return {
        "title": title,
        "ticks": [(_number(tick) if tick else "0", y(tick)) for tick in ticks],
        "lines": [line(kind, values) for kind, values in lines if any(values)],
    }


def _axis(names: list[str]) -> tuple[list[str], str]:
    """Return the labels of loads, and what they count where all count the same."""
    counts, _, units = zip(*(name.partition(" ") for name in names), strict=True)
    for axis, known in (
        ("clients at once", {"stream", "streams"}),
        ("requests sent a second", {"requests/s"}),
    ):
        if known.issuperset(units):
            return [*counts], axis
    return names, ""


def _decades(low: float, high: float) -> list[float]:
    """Return 1, 2, 5, 10, ... from the one at or below `low` to the one at or above `high`."""
    first = max((at for at, tick in enumerate(NICE) if tick <= low), default=0)
    last = min((at for at, tick in enumerate(NICE) if tick >= high), default=len(NICE) - 1)
    return NICE[first : max(last, first + 1) + 1]


def _steps(high: float) -> list[float]:
    """Return the multiples of a tick of `NICE` from 0 to the first at or above `high`, seven at most."""
    step = next((tick for tick in NICE if high <= 6 * tick), NICE[-1])
    return [step * count for count in range(math.ceil(high / step) + 1)]


def _failures(servers: list[dict[str, str]], levels: list[dict[str, Any]]) -> list[tuple[str, str, str, int, str]]:
    return [
        (level["name"], server["name"], status, count, "; ".join(row["errors"]))
        for level in levels
        for server, row in zip(servers, level["servers"], strict=True)
        for status, count in sorted(row["outcomes"].items())
        if status != "200"
    ]


def _number(value: float | None) -> str:
    if not value:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
