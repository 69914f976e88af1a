"""How many threads compute a step."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

MANY_ROWS = 64
"""From so many rows on, all threads are used: with one, a step could take longer than others may wait."""

RECENT = 5
"""Steps whose median time counts."""

RETRY = 64
"""One of so many steps is computed with the other number of threads."""


class StepThreads:
    """Computes small steps with one thread or with all, whichever took less time of late.

    A thread that waits for another spins for a while, then sleeps. On idle cores all threads are faster; where the
    front end or another program has taken a core, one is, since the others wait for what does not run. The results
    do not depend on it.

    Attributes:
        count: Number of all threads; with 1 torch's setting is left alone. It changes with the engine's cores.
    """

    def __init__(self, count: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.count = count
        self._clock = clock
        self._sizes: dict[tuple[int, int], _Size] = {}

    def use_all(self) -> None:
        """Use all threads until the next step."""
        if self.count > 1:
            torch.set_num_threads(self.count)

    @contextmanager
    def step(self, rows: int) -> Iterator[None]:
        """Choose the threads for a step of so many rows, which is what runs meanwhile."""
        if self.count == 1 or rows >= MANY_ROWS:
            self.use_all()
            yield
            return
        kind = self.count, rows.bit_length()  # one for each power of two
        if kind not in self._sizes:
            self._sizes[kind] = _Size((1, self.count))
        size = self._sizes[kind]
        threads = size.choose()
        torch.set_num_threads(threads)
        began = self._clock()
        yield
        size.seconds[threads].append(self._clock() - began)


class _Size:
    """Steps of about the same number of rows.

    Attributes:
        seconds: Number of threads -> times of the latest steps.
    """

    def __init__(self, choices: tuple[int, int]) -> None:
        self.seconds: dict[int, deque[float]] = {threads: deque(maxlen=RECENT) for threads in choices}
        self._steps = 0

    def choose(self) -> int:
        untried = min(self.seconds, key=lambda threads: len(self.seconds[threads]))
        if len(self.seconds[untried]) < RECENT:
            return untried
        self._steps += 1
        fast, slow = sorted(self.seconds, key=lambda threads: statistics.median(self.seconds[threads]))
        return slow if self._steps % RETRY == 0 else fast
