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

LOG_SECONDS = 10.0
TERMINAL_SECONDS = 0.5


class Progress:
    """What is done now, and how much of it. One thread changes it; any may read it.

    Attributes:
        done: Units of `total` so far: bytes of a download, tensors of weights.
        total: 0 if it is not known.
    """

    def __init__(self) -> None:
        self.done = 0
        self.total = 0
        self._what = ""
        self._size: int | None = None
        self._began = 0.0

    def begin(self, what: str, total: int = 0, size: int | None = None) -> None:
        """Begin a phase; without a name and a total, one of which nothing is known.

        Args:
            what: Its name, which may be "" where the phase needs none.
            total: What `done` will be at the end; 0 if that is not known.
            size: Bytes of the whole, where `total` does not count bytes; 0 if that is not known.
        """
        self.done, self.total, self._what, self._size = 0, total, what, size
        self._began = time.monotonic()

    def __str__(self) -> str:
        """Return a part of a sentence, or "" where nothing is known."""
        seconds = max(1e-9, time.monotonic() - self._began)
        total, size = self.total, self._size  # another thread may begin the next phase now
        if not total:
            return f"{self._what}, {_duration(seconds)}" if self._what else ""
        done = min(self.done, total)
        if size is None:
            told = f"{size_text(done)} of {size_text(total)}, {size_text(done / seconds)}/s"
        else:
            told = f"{100 * done // total} %" + (f" of {size_text(size)}" if size else "")
        left = f", {_duration(seconds * (total - done) / done)} left" if done else ""
        return f"{self._what}{' ' if self._what else ''}{told}{left}"


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
def shown_to_script() -> Iterator[None]:
    """Report progress as a library does: a line on standard error if that is a terminal, else in the log."""
    terminal = sys.stderr.isatty()

    def tell(progress: Progress) -> None:
        if terminal:
            sys.stderr.write(f"{ERASE}{str(progress)[: shutil.get_terminal_size().columns - 1]}")
            sys.stderr.flush()
        else:
            logger.info("loading the model: %s", progress)

    try:
        with shown(tell, TERMINAL_SECONDS if terminal else LOG_SECONDS):
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
