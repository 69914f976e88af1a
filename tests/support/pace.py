"""Bounds on processor time that hold on a slower machine, too."""

from __future__ import annotations

import time

WORK_SECONDS = 0.0012
"""Processor time of the fixed work on the machine on which the tests' bounds were set."""


def too_long(taken: float, most: float) -> bool:
    """Whether work has taken more processor time than `most`, which is for the machine on which the bounds were set."""
    return taken >= most and taken >= most * slowness()


def slowness() -> float:
    """How many times as long as there this machine takes now for fixed work: from 1 to 4."""
    return min(4.0, max(1.0, min(_work() for _ in range(5)) / WORK_SECONDS))


def _work() -> float:
    began = time.thread_time()
    sum(number % 7 for number in range(50_000))
    return time.thread_time() - began
