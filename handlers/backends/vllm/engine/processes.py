"""The processes of one engine, which is the only thing here that may be killed: found, watched, and ended.

The front may be somebody's script with processes of its own, so an engine's are those that vLLM holds as such and all
that these have started. /proc is read, as vLLM runs on Linux only.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handlers.backends.vllm.engine import segments

POLL_SECONDS = 0.02

_PROC = Path("/proc")
_NAMES = ("EngineCore", "DP_Coordinator")
"""In the names, as multiprocessing knows them, of what vLLM's front starts."""


@dataclass(frozen=True)
class Process:
    """A process id is given again to others; with the time of its start (ticks since boot) it is nobody else's."""

    pid: int
    started: int

    @property
    def running(self) -> bool:
        """Perhaps stopped, but not ended. True where it cannot be told, for want of file descriptors."""
        try:
            stat = _stat(self.pid)
        except OSError:
            return True
        return stat is not None and stat.started == self.started and stat.state not in "ZX"

    @property
    def gone(self) -> bool:
        """Ended with all its threads, so that its memory is free. It may wait for its parent to take note."""
        return not self.running and (self._replaced or _threads(self.pid) <= 1)

    @property
    def _replaced(self) -> bool:
        try:
            stat = _stat(self.pid)
        except OSError:
            return False
        return stat is None or stat.started != self.started

    @property
    def title(self) -> str:
        """Its command line, which vLLM's processes overwrite with what they are; blanks are single."""
        try:
            words = (_PROC / str(self.pid) / "cmdline").read_bytes()
        except OSError:
            return ""
        return " ".join(words.decode(errors="replace").replace("\0", " ").split())

    def kill(self) -> None:
        """Kill it and nobody else; nothing happens when it has gone."""
        with suppress(ProcessLookupError, PermissionError):
            try:
                handle = os.pidfd_open(self.pid)
            except ProcessLookupError:
                return
            except OSError:  # a kernel without them
                if self.running:
                    os.kill(self.pid, signal.SIGKILL)
                return
            try:
                if self.running:
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
            finally:
                os.close(handle)


class ProcessTree:
    """The processes of one engine; what it starts later is found when they are ended."""

    def __init__(self, roots: Iterable[int]) -> None:
        """roots: the ids of what the front itself has started for the engine."""
        self.roots = tuple(_known(roots))
        self.members = _with_descendants(self.roots)
        self._segments = _segments(self.members)
        self._needed = {
            process: title
            for process in self.members
            if _is_worker(title := process.title) or process in self.roots
        }

    @property
    def dead(self) -> str | None:
        """What has ended and the engine cannot do without: an engine core, a coordinator, a worker."""
        for process, title in self._needed.items():
            if not process.running:
                return f"{title} (process {process.pid})"
        return None

    def kill(self, seconds: float) -> list[Process]:
        """Kill all, and what they have started since, and wait for their memory. Returns those left after `seconds`.

        Blocks. Workers are killed themselves: one that waits for another in a collective operation does not see that
        the engine has gone. What memory they shared among themselves is given back when all have gone.
        """
        members = dict.fromkeys((*self.members, *_with_descendants(self.members)))
        shared = self._segments | _segments(members)
        for process in members:
            process.kill()
        end = time.monotonic() + seconds
        while left := [process for process in members if not process.gone]:
            if time.monotonic() > end:
                break
            time.sleep(POLL_SECONDS)
        if not left:
            segments.remove(shared)
        return left


def roots_of(engine: Any) -> list[int]:
    """Ids of what vLLM's front has started for this `AsyncLLM`; none where Ray has started all."""
    resources = engine.engine_core.resources
    processes = list(getattr(resources.engine_manager, "processes", ()))
    if (coordinator := getattr(resources, "coordinator", None)) is not None:
        processes.append(coordinator.proc)
    return [process.pid for process in processes if process.pid]


def unfinished(before: Collection[int]) -> list[int]:
    """The same for an engine that is being built or whose start has failed: it cannot be asked.

    before: the ids of this process's children when the start began, see `children`.
    """
    return [
        child.pid
        for child in multiprocessing.active_children()
        if child.pid and child.pid not in before and any(name in child.name for name in _NAMES)
    ]


def children() -> frozenset[int]:
    """Ids of all that this process has started through multiprocessing."""
    return frozenset(child.pid for child in multiprocessing.active_children() if child.pid)


@dataclass(frozen=True)
class _Stat:
    state: str
    parent: int
    started: int


def _stat(pid: int | str) -> _Stat | None:
    """The fields of /proc/PID/stat that matter, None without the process. Raises OSError when it cannot be read.

    The name before them may hold blanks and parentheses.
    """
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()
    return _Stat(fields[0], int(fields[1]), int(fields[19]))


def _threads(pid: int) -> int:
    try:
        return len(os.listdir(_PROC / str(pid) / "task"))
    except OSError:
        return 0


def _known(pids: Iterable[int]) -> Iterator[Process]:
    for pid in pids:
        if (stat := _stat(pid)) is not None:
            yield Process(pid, stat.started)


def _with_descendants(roots: Iterable[Process]) -> tuple[Process, ...]:
    """The roots that run still, then what they have started, and so on: parents come before children."""
    offspring: dict[int, list[Process]] = {}
    with suppress(OSError):
        for entry in os.listdir(_PROC):
            if entry.isdecimal() and (stat := _stat(entry)) is not None:
                offspring.setdefault(stat.parent, []).append(Process(int(entry), stat.started))
    found = [process for process in roots if process.running]
    for process in found:
        found.extend(offspring.get(process.pid, ()))
    return tuple(dict.fromkeys(found))


def _segments(processes: Iterable[Process]) -> frozenset[str]:
    return frozenset().union(*(segments.mapped(process.pid) for process in processes if process.running))


def _is_worker(title: str) -> bool:
    """Not a compiler, a resource tracker or one of Ray's, which come and go."""
    return "::Worker" in title or "--multiprocessing-fork" in title
