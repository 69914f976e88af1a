"""What a terminal shows while loads run: a row for each that has ended, and one for the load that runs."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from bench import report
from bench.client import Reply
from bench.load import Load
from bench.servers import Server

SWITCH = 0.0005  # seconds after which the thread that draws gives way to the one that measures


class View:
    """Use as a context manager. Without a terminal, a line is printed for each load that has ended.

    Of the times, the median and the 99th percentile are shown; while a load runs, the median so far.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._rows: list[list[str]] = []
        self._now: tuple[Server, Load, list[Reply]] | None = None
        self._live = Live(console=self._console, get_renderable=self.__rich__, refresh_per_second=2)

    def __enter__(self) -> View:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    @contextlib.contextmanager
    def watch(self, target: Server, load: Load, replies: list[Reply]) -> Iterator[None]:
        """Show a load while it runs; a `bench.load.Watch`."""
        interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH)
        self._now = target, load, replies
        try:
            yield
        finally:
            self._now = None
            sys.setswitchinterval(interval)

    def add(self, target: Server, load: Load, row: dict[str, Any]) -> None:
        """Keep the row of a load that has ended."""
        cells = [load.arrival, target.name, f"{row['requests']} requests", f"{row['tokens_per_s']:.0f}"]
        cells += [f"{report.shown(of['p50'])} / {report.shown(of['p99'])}" for of in (row["ttft_ms"], row["itl_ms"])]
        cells.append(str(report.failed(row)))
        self._rows.append(cells)
        if not self._console.is_terminal:
            print("{}, {}: {}, {} tokens/s, TTFT {} ms, ITL {} ms, {} failed".format(*cells), file=sys.stderr)

    def __rich__(self) -> Table:
        table = Table(box=None, header_style="dim", pad_edge=False)
        for name in ("load", "server", "progress", "tokens/s", "TTFT ms", "ITL ms", "failed"):
            table.add_column(name, justify="left" if name in ("load", "server", "progress") else "right")
        for row in self._rows:
            table.add_row(*row)
        if self._now is not None:
            table.add_row(*self._running(*self._now), style="bold")
        return table

    def _running(self, target: Server, load: Load, replies: list[Reply]) -> list[Any]:
        if not replies:
            return [load.arrival, target.name, "warming up", "", "", "", ""]
        seen = list(replies)  # which grows meanwhile
        seconds = time.perf_counter() - seen[0].start
        ended = sum(reply.end > 0 for reply in seen)
        tokens = sum(reply.completion_tokens or len(reply.contents) for reply in seen)
        first = [reply.contents[0] - reply.start for reply in seen if reply.contents]
        gaps = [
            (reply.contents[-1] - reply.contents[0]) / (len(reply.contents) - 1)
            for reply in seen
            if len(reply.contents) > 1
        ]
        failed = sum(reply.end > 0 and not reply.ok for reply in seen)
        part = max(ended / load.requests, seconds / load.seconds if load.seconds else 0.0)
        shown = [f"{1000 * statistics.median(of):.0f}" if of else "" for of in (first, gaps)]
        bar = ProgressBar(total=1.0, completed=min(1.0, part), width=16)
        return [load.arrival, target.name, bar, f"{tokens / max(seconds, 1e-9):.0f}", *shown, str(failed)]
