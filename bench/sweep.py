"""Measure OpenAI-compatible servers under growing load, and write a page that shows how many requests they can take.

lmi bench http://127.0.0.1:8080
lmi bench http://10.0.0.7:8080 https://example.com/v1 --model a --model b --key-variable KEY_A --key-variable KEY_B
lmi bench http://10.0.0.7:8080 --streams 8,16,32,64 --images 2 --size 1024x1024 --tokens 256

Two servers get the same requests in turns. The ratios say how many times better the first one is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import load, page, report, servers
from bench.live import View

Results = dict[str, Any]
"""What is saved as JSON and shown on the page: machine, time, servers, load, levels, knees."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 1 if a server gave no whole reply, or could not be asked."""
    given = _parser().parse_args(arguments)
    path: Path = given.report or Path(time.strftime("lmi-bench-%Y%m%d-%H%M%S.html"))
    try:
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise servers.Unusable(f"{path} cannot be written; name another file with --report")
        targets = _targets(given)
    except servers.Unusable as error:
        print(f"lmi bench: {error}", file=sys.stderr)
        return 1
    with View() as view:
        found = sweep(targets, load.from_arguments(given), view)
    if not found["levels"]:
        print("lmi bench: stopped before the first load had run", file=sys.stderr)
        return 1
    path.write_text(page.html(found), encoding="utf-8", errors="replace")
    print(json.dumps(found, indent=2) if given.json else "\n".join(verdict(found)))
    print(f"report: {path}", file=sys.stderr)
    if given.open:
        webbrowser.open(path.resolve().as_uri())
    silent = [place for place in range(len(targets)) if not any(_whole(level, place) for level in found["levels"])]
    for place in silent:
        row = found["levels"][-1]["servers"][place]
        print(f"{targets[place].name} gave no whole reply: {row['outcomes']}: {row['errors']}", file=sys.stderr)
    return 1 if silent else 0


def sweep(
    targets: Sequence[servers.Server],
    loads: Sequence[load.Load],
    view: View,
    runs: list[load.Run] | None = None,
) -> Results:
    """Run each load against each server.

    It ends early with Ctrl-C, and where a server gave no whole reply to a load: a larger one brings none, either.

    Args:
        targets: One server, or two that take turns.
        loads: What to send, the smallest first.
        view: Shows what runs.
        runs: To which every run is added; they hold all replies.
    """
    levels: list[dict[str, Any]] = []
    with contextlib.suppress(KeyboardInterrupt):
        for place, one in enumerate(loads):
            rows: dict[int, dict[str, Any]] = {}
            numbered = [*enumerate(targets)]
            for number, target in numbered if place % 2 == 0 else numbered[::-1]:
                run = load.run(one, target, view.watch)
                rows[number] = report.summary(run, target.samples)
                if runs is not None:
                    runs.append(run)
                view.add(target, one, rows[number])
            levels.append(level(one.arrival, [rows[number] for number in range(len(targets))]))
            if not all(_whole(levels[-1], number) for number in range(len(targets))):
                break
    return results(targets, loads[0].content, levels)


def results(targets: Sequence[servers.Server], content: str, levels: list[dict[str, Any]]) -> Results:
    """Return what is saved and shown. content: what was sent, in words."""
    return {
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "machine": report.machine(),
        "servers": [{"name": target.name, "model": target.model} for target in targets],
        "load": content,
        "levels": levels,
        "knees": [report.knee([one["servers"][number] for one in levels]) for number in range(len(targets))],
    }


def level(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one load's part of the results."""
    ratios = report.times_better([(rows[0], rows[1])]) if len(rows) == 2 else None
    return {"name": name, "servers": rows, "times_better": ratios}


def verdict(found: Results) -> list[str]:
    """Return a line for each server: the load at its knee, or the last one, and what it gives there."""
    lines = []
    for place, (server, knee) in enumerate(zip(found["servers"], found["knees"], strict=True)):
        at = found["levels"][-1 if knee is None else knee]
        row = at["servers"][place]
        lines.append(
            f"{server['name']}: {'no knee up to' if knee is None else 'the knee is at'} {at['name']}, which give "
            f"{row['tokens_per_s']:.0f} tokens/s, {row['requests_per_s']:.1f} requests/s, "
            f"TTFT p50 {report.shown(row['ttft_ms']['p50'])} ms, p99 {report.shown(row['ttft_ms']['p99'])} ms, "
            f"ITL p50 {report.shown(row['itl_ms']['p50'], 1)} ms, p99 {report.shown(row['itl_ms']['p99'], 1)} ms"
        )
    for one in found["levels"]:
        if ratios := one["times_better"]:
            shown = ", ".join(
                f"{text} {report.shown(ratios[key] or None, 2)}"
                for text, key in (
                    ("tokens/s", "tokens_per_s"),
                    ("TTFT", "ttft_ms p50"),
                    ("ITL", "itl_ms p50"),
                )
            )
            lines.append(f"{one['name']}: the first is better by {shown} times")
    return lines


def _whole(one: dict[str, Any], place: int) -> bool:
    return "200" in one["servers"][place]["outcomes"]


def _targets(given: argparse.Namespace) -> list[servers.Server]:
    if len(given.url) > 2:
        raise servers.Unusable("one or two URLs can be measured")
    models, keys = (
        _each(given.model, given.url, "--model"),
        _each(given.key_variable, given.url, "--key-variable"),
    )
    for name in keys:
        if name and name not in os.environ:
            raise servers.Unusable(f"--key-variable {name}: there is no such environment variable")
    targets = [
        servers.running(url, model, os.environ.get(name, ""))
        for url, model, name in zip(given.url, models, keys, strict=True)
    ]
    if len({(target.name, target.model) for target in targets}) < len(targets):
        raise servers.Unusable("the two URLs are the same server and model, which would answer from its caches")
    return targets


def _each(values: Sequence[str], urls: Sequence[str], flag: str) -> list[str]:
    """Spread the values of a flag over the URLs: none, one for all of them, or one for each."""
    if len(values) not in (0, 1, len(urls)):
        raise servers.Unusable(f"{flag} is given {len(values)} times for {len(urls)} URLs")
    return [*values] if len(values) == len(urls) else [*(values or [""])] * len(urls)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lmi bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", nargs="+", metavar="URL", help="http://host:port, with or without /v1")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        help="to ask (the first that the server lists); one for each URL, or one",
    )
    parser.add_argument(
        "--key-variable",
        action="append",
        default=[],
        metavar="NAME",
        help="environment variable with the API key; one for each URL, or one",
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="the page (lmi-bench-TIME.html)")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    load.add_arguments(parser, streams="1,2,4,8,16,32,64", warmup=8, seconds=60.0)
    return parser
