"""Shared memory that killed processes leave behind in /dev/shm, of which containers have little."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

_FOLDER = "/dev/shm/"
_PYTHONS = "psm_"
_MADE = re.compile(r"psm_[0-9a-f]+|[^/]*cpushm_[0-9]+")
"""Python's queues between the engine and its workers, and the CPU workers' among themselves; /dev/shm may hold an
operator's files as well."""


def mapped(pid: int | str) -> frozenset[str]:
    """The names of those segments that a process has mapped."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    paths = (line.partition(_FOLDER)[2] for line in lines if _FOLDER in line)
    return frozenset(name for name in paths if _MADE.fullmatch(name))


def remove(names: Iterable[str]) -> None:
    """Once nobody uses them. What this process has mapped is its own."""
    for name in set(names) - mapped("self"):
        with suppress(OSError, ValueError):
            if name.startswith(_PYTHONS):
                segment = SharedMemory(name)
                segment.close()
                segment.unlink()  # also from what multiprocessing would call leaked at the end
            else:
                os.unlink(_FOLDER + name)
