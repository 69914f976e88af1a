"""The processes of one engine: found, watched and killed.

The front end may be a user's script with processes of its own, so only those that vLLM has started for the engine, and
their descendants, are ever killed.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import psutil

from handlers.backends.vllm.compat import ENGINE_PROCESSES

POLL_SECONDS = 0.02

_SEGMENT = re.compile(r"/dev/shm/(psm_[0-9a-f]+|[^/\s]*cpushm_[0-9]+)$", re.MULTILINE)
"""Shared memory between the engine and its workers, and among CPU workers; other files there are not ours."""

_ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


class ProcessTree:
    """The processes of one engine: those that the front end has started for it, and their descendants."""

    def __init__(self, roots: Iterable[int]) -> None:
        """Find the processes. roots: the ids of those that the front end has started."""
        started = []
        for pid in roots:
            with suppress(psutil.Error):
                started.append(psutil.Process(pid))
        self.members = _with_descendants(started)
        self._segments = _segments(self.members)
        titles = {process: _title(process) for process in self.members}
        self._needed = {
            process: title
            for process, title in titles.items()
            # Compilers, resource trackers and Ray's processes come and go.
            if process in started or "::Worker" in title or "--multiprocessing-fork" in title
        }

    @property
    def dead(self) -> str | None:
        """An engine core, a coordinator or a worker that has ended; None while all run."""
        for process, title in self._needed.items():
            if not _running(process):
                return f"{title} (process {process.pid})"
        return None

    def kill(self, seconds: float) -> list[psutil.Process]:
        """Kill all of them, wait until their memory is free, and return those left after `seconds`. Blocks.

        Workers have to be killed themselves: one that waits in a collective operation does not notice that the engine
        is gone. When all are gone, the shared memory that they leave behind is removed.
        """
        members = dict.fromkeys((*self.members, *_with_descendants(self.members)))
        segments = self._segments | _segments(members)
        for process in members:
            with suppress(psutil.Error, ProcessLookupError):
                try:
                    process.kill()
                except OSError:  # without a free file descriptor psutil cannot check whose the id is
                    os.kill(process.pid, signal.SIGKILL)
        end = time.monotonic() + seconds
        while left := [process for process in members if _running(process, threads=True)]:
            if time.monotonic() > end:
                return left
            time.sleep(POLL_SECONDS)
        for name in segments - _mapped("self"):
            with suppress(OSError, ValueError):
                segment = SharedMemory(name)
                segment.close()
                segment.unlink()  # and multiprocessing no longer reports it as leaked at exit
        return []


def engine_children() -> frozenset[int]:
    """Return the ids of this process's children that vLLM has started for its engines."""
    return frozenset(
        child.pid
        for child in multiprocessing.active_children()
        if child.pid and any(name in child.name for name in ENGINE_PROCESSES)
    )


def _running(process: psutil.Process, *, threads: bool = False) -> bool:
    """Whether a process runs; True if that cannot be found out, for want of file descriptors.

    threads: whether a zombie with threads counts as running, since its memory is not free yet.
    """
    try:
        if not process.is_running():
            return False
        return process.status() not in _ENDED or (threads and process.num_threads() > 1)
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, OSError):
        return True


def _with_descendants(roots: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Return the roots that still run and their descendants, parents first."""
    found: dict[psutil.Process, None] = {}
    for root in roots:
        if root not in found and _running(root):
            found[root] = None
            with suppress(psutil.Error, OSError):
                found |= dict.fromkeys(root.children(recursive=True))
    return list(found)


def _title(process: psutil.Process) -> str:
    """Return its command line, which vLLM overwrites with the process's role, with single blanks."""
    try:
        return " ".join(" ".join(process.cmdline()).split())
    except (psutil.Error, OSError):
        return ""


def _segments(processes: Iterable[psutil.Process]) -> frozenset[str]:
    return frozenset().union(*(_mapped(process.pid) for process in processes if _running(process)))


def _mapped(pid: int | str) -> frozenset[str]:
    """Return the names of the segments that a process has mapped.

    Not with psutil, which reads `smaps`: the kernel would walk all pages of a process that may hold a model.
    """
    try:
        return frozenset(_SEGMENT.findall(Path(f"/proc/{pid}/maps").read_text(errors="replace")))
    except OSError:
        return frozenset()
