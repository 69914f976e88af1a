"""The processes of one engine, the only ones here that may be killed: found, watched, and ended.

The front end may be somebody's script with processes of its own, so an engine's are those that vLLM holds as such and
all that these have started. vLLM runs on Linux only.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import psutil

from handlers.backends.vllm.compat import ENGINE_PROCESSES

POLL_SECONDS = 0.02

_SHARED = "/dev/shm/"
_PYTHONS = "psm_"
_MADE = re.compile(r"psm_[0-9a-f]+|[^/]*cpushm_[0-9]+")
"""Python's queues between the engine and its workers, and the CPU workers' among themselves; /dev/shm may hold an
operator's files as well."""

_ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


class ProcessTree:
    """The processes of one engine; what it starts later is found when they are ended."""

    def __init__(self, roots: Iterable[int]) -> None:
        """roots: the ids of what the front end itself has started for the engine."""
        known = []
        for pid in roots:
            with suppress(psutil.Error):
                known.append(psutil.Process(pid))
        self.members = _with_descendants(known)
        self._segments = _segments(self.members)
        self._needed = {
            process: title
            for process in self.members
            if _is_worker(title := _title(process)) or process in known
        }

    @property
    def dead(self) -> str | None:
        """What has ended and the engine cannot do without: an engine core, a coordinator, a worker."""
        for process, title in self._needed.items():
            if not running(process):
                return f"{title} (process {process.pid})"
        return None

    def kill(self, seconds: float) -> list[psutil.Process]:
        """Kill all, and what they have started since, and wait for their memory. Returns those left after `seconds`.

        Blocks. Workers are killed themselves: one that waits for another in a collective operation does not see that
        the engine has gone. What memory they shared among themselves is given back when all have gone.
        """
        members = dict.fromkeys((*self.members, *_with_descendants(self.members)))
        shared = self._segments | _segments(members)
        for process in members:
            with suppress(psutil.Error, ProcessLookupError):
                try:
                    process.kill()
                except OSError:  # no file descriptor is left to see whether the id is still its own
                    os.kill(process.pid, signal.SIGKILL)
        end = time.monotonic() + seconds
        while left := [process for process in members if not _gone(process)]:
            if time.monotonic() > end:
                break
            time.sleep(POLL_SECONDS)
        if not left:
            _remove_segments(shared)
        return left


def running(process: psutil.Process) -> bool:
    """Perhaps stopped, but not ended. True where it cannot be known, for want of file descriptors."""
    try:
        return process.is_running() and process.status() not in _ENDED
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, OSError):
        return True


def _gone(process: psutil.Process) -> bool:
    """Ended with all its threads, so that its memory is free. Its parent may not have taken note of it yet."""
    try:
        return not process.is_running() or (process.status() in _ENDED and process.num_threads() <= 1)
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, OSError):
        return False


def unfinished(before: Collection[int]) -> list[int]:
    """Ids of what vLLM's front end has started for an engine that is being built or whose start has failed.

    before: the ids of this process's children when the start began, see `children`.
    """
    return [
        child.pid
        for child in multiprocessing.active_children()
        if child.pid and child.pid not in before and any(name in child.name for name in ENGINE_PROCESSES)
    ]


def children() -> frozenset[int]:
    """Ids of all that this process has started through multiprocessing."""
    return frozenset(child.pid for child in multiprocessing.active_children() if child.pid)


def _with_descendants(roots: Iterable[psutil.Process]) -> list[psutil.Process]:
    """The roots that still run, and what they have started, and so on: parents come before children."""
    found: dict[psutil.Process, None] = {}
    for root in roots:
        if root not in found and running(root):
            found[root] = None
            with suppress(psutil.Error, OSError):
                found |= dict.fromkeys(root.children(recursive=True))
    return list(found)


def _title(process: psutil.Process) -> str:
    """Its command line, which vLLM's processes overwrite with what they are; blanks are single."""
    try:
        return " ".join(" ".join(process.cmdline()).split())
    except (psutil.Error, OSError):
        return ""


def _is_worker(title: str) -> bool:
    """Not a compiler, a resource tracker or one of Ray's, which come and go."""
    return "::Worker" in title or "--multiprocessing-fork" in title


def _segments(processes: Iterable[psutil.Process]) -> frozenset[str]:
    return frozenset().union(*(_mapped(process.pid) for process in processes if running(process)))


def _mapped(pid: int | str) -> frozenset[str]:
    """Return the names of the segments in /dev/shm, which is small in containers, that a process has mapped.

    psutil would read `smaps`, for which the kernel walks all pages of a process that may hold a model.
    """
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    names = (line.partition(_SHARED)[2] for line in lines if _SHARED in line)
    return frozenset(name for name in names if _MADE.fullmatch(name))


def _remove_segments(names: frozenset[str]) -> None:
    """Once nobody uses them: killed processes leave them behind. What this process has mapped is its own."""
    for name in names - _mapped("self"):
        with suppress(OSError, ValueError):
            if name.startswith(_PYTHONS):
                segment = SharedMemory(name)
                segment.close()
                segment.unlink()  # also from what multiprocessing would call leaked at the end
            else:
                os.unlink(_SHARED + name)
