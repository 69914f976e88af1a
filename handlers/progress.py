"""How far the loading of a model is, for the people who wait for it."""

from __future__ import annotations

import logging
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

logger = logging.getLogger(__name__)

ERASE = "\r\x1b[K"
"""Makes a terminal's line empty."""

BAR_COLUMNS = 16
LOG_SECONDS = 10.0
TERMINAL_SECONDS = 0.5


class Progress:
    """What is done now, and how much of it. One thread changes it; any may read it.

    Attributes:
        what: The name of the phase, which may be "" where it needs none.
        done: Bytes so far.
        total: Bytes at the end; 0 in a phase that has none, or where they are not known.
    """

    def __init__(self) -> None:
        self.what = ""
        self.done = self.total = 0
        self._began = 0.0

    def begin(self, what: str, total: int = 0, ago: float = 0.0) -> None:
        """Begin a phase, unless it is the current one; without a name and a total, one of which nothing is known.

        Args:
            what: See above.
            total: See above.
            ago: Seconds since it began.
        """
        if (what, total) != (self.what, self.total):
            self.what, self.done, self.total = what, 0, total
            self._began = time.monotonic() - ago

    def __str__(self) -> str:
        """Return a part of a sentence, or "" where nothing is known."""
        seconds = max(1e-9, time.monotonic() - self._began)
        total = self.total  # another thread may begin the next phase now
        if not total:
            return f"{self.what}, {_duration(seconds)}" if self.what else ""
        done = min(self.done, total)
        left = f", {_duration(seconds * (total - done) / done)} left" if done else ""
        return (
            f"{self.what}{' ' if self.what else ''}{size_text(done)} of {size_text(total)}, "
            f"{size_text(done / seconds)}/s{left}"
        )

    @property
    def bar(self) -> str:
        """A bar and a blank for a terminal, or "" in a phase without bytes."""
        total = self.total
        filled = total and BAR_COLUMNS * min(self.done, total) // total
        return f"[{'#' * filled}{'.' * (BAR_COLUMNS - filled)}] " if total else ""


_current: ContextVar[Progress] = ContextVar("progress")


def current() -> Progress:
    """Return the progress of the load that the caller belongs to; nobody looks at it outside of `shown`."""
    return _current.get(Progress())


@contextmanager
def shown(tell: Callable[[Progress], None], seconds: float) -> Iterator[Progress]:
    """Report the progress of what is loaded within the context, every so many seconds. tell: called by a thread."""
    progress, ended = Progress(), threading.Event()

    def report() -> None:
        while not ended.wait(seconds):
            if str(progress):
                tell(progress)

    token = _current.set(progress)
    thread = threading.Thread(target=report, daemon=True, name="progress")
    thread.start()
    try:
        yield progress
    finally:
        ended.set()
        thread.join()
        _current.reset(token)


@contextmanager
def shown_to_script(log_seconds: float = LOG_SECONDS) -> Iterator[None]:
    """Report progress as a library does: a line on standard error if that is a terminal, else in the log."""
    terminal = sys.stderr.isatty()

    def tell(progress: Progress) -> None:
        if terminal:
            told = f"{progress.bar}{progress}"
            sys.stderr.write(f"{ERASE}{told[: shutil.get_terminal_size().columns - 1]}")
            sys.stderr.flush()
        else:
            logger.info("loading the model: %s", progress)

    try:
        with shown(tell, TERMINAL_SECONDS if terminal else log_seconds):
            yield
    finally:
        if terminal:
            sys.stderr.write(ERASE)


def size_text(count: float) -> str:
    """Return a number of bytes as people read it."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
