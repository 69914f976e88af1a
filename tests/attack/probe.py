"""A probe inside the server under test: how long its event loop is kept from its work, by whom, and how often.

    python -P tests/attack/probe.py FILE serve MODEL ...

runs `lmi serve MODEL ...` in this process, with a timer on its event loop that writes what it measures into FILE, which
is mapped into memory and which `Readings` reads from the test's process. The product knows nothing of it: no route, no
thread, no descriptor that an attack could use up.

What counts as a stall. The timer is due every 5 ms. Lateness by the clock alone would blame the server for a busy
machine, so it is divided into what the kernel knows about it:

* `work`: processor time that the loop's own thread used since the last tick (`time.thread_time`). Handlers, parsing,
  garbage collection on the loop.
* `queued`: time that the loop's thread was ready to run but had no core (`/proc/self/task/TID/schedstat`): the
  machine's fault, never counted.
* `held`: the rest of the lateness, in which the thread slept although it was due, hence waited for the GIL (or for a
  lock), as far as other threads of the process used processor time meanwhile (`time.process_time`). A GIL holder
  has to compute in order to hold on to it; one that the machine gives no core is charged with what it computed, not
  with what it waited. Threads that compute with the GIL released (zlib, numpy, Pillow's decoders) do not make the
  loop's thread sleep, hence are not counted, however much they use.

A tick's stall is `work + held`, which is the true one within an interval.
A call on the loop that sleeps without anyone computing (a disk, `time.sleep`) is in `waited`, which is reported and not
judged: on a busy machine it cannot be told from a GIL holder that has no core.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

INTERVAL = 0.005
BOUNDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Upper ends of the histogram's buckets, in seconds; a last one has no end."""

_TICKS, _ASKED, _SEEN, _LONGEST, _WORK, _HELD, _WAITED, _LATE, _COUNTS = range(9)
_SIZE = (_COUNTS + len(BOUNDS) + 1) * 8


class Stalls(NamedTuple):
    """Since the last reset, in seconds. longest: the worst tick's stall; work, held: its parts.

    waited: longest sleep of the loop's thread, outside its own selector, that no computing explains. late: longest
    lateness by the clock, whoever caused it. counts: of ticks by stall, in the buckets of `BOUNDS`.
    """

    longest: float
    work: float
    held: float
    waited: float
    late: float
    counts: tuple[int, ...]

    def __str__(self) -> str:
        parts = f"work {self.work * 1000:.0f} + GIL {self.held * 1000:.0f}"
        return f"{self.longest * 1000:.0f} ms ({parts}; late by the clock {self.late * 1000:.0f})"


def _view(path: Path, create: bool) -> memoryview:
    if create:
        path.write_bytes(bytes(_SIZE))
    with path.open("r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), _SIZE)).cast("d")


class Readings:
    """The test's side. Its file exists before the server starts."""

    def __init__(self, path: Path) -> None:
        self._view = _view(path, create=True)

    def reset(self, seconds: float = 30.0) -> None:
        """Forget what was measured. Raises TimeoutError when the loop does not tick."""
        self._view[_ASKED] += 1
        self._until(lambda: self._view[_SEEN] == self._view[_ASKED], seconds)

    def read(self, seconds: float = 120.0) -> Stalls:
        """What was measured, work that is under way included. Raises TimeoutError when the loop does not tick."""
        before = self._view[_TICKS]
        self._until(lambda: self._view[_TICKS] >= before + 2, seconds)
        values = self._view.tolist()
        counts = tuple(int(count) for count in values[_COUNTS:])
        return Stalls(*values[_LONGEST:_COUNTS], counts)

    def _until(self, done: Any, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not done():
            if time.monotonic() > end:
                raise TimeoutError(f"the server's event loop did not tick for {seconds:.0f} s")
            time.sleep(INTERVAL)


class Probe:
    """The server's side: a timer on its loop."""

    def __init__(self, path: Path, stacks: Path | None = None) -> None:
        """stacks: a file for the stacks of all threads whenever a tick is 50 ms late, for people who look for the
        cause. Costs a thread a tick: do not measure with it."""
        self._view = _view(path, create=False)
        self._stacks = stacks.open("w") if stacks is not None else None

    def start(self, loop: Any) -> None:
        self._loop = loop
        self._schedstat = _schedstat()
        self._last = self._now()
        loop.call_later(INTERVAL, self._tick)

    def _now(self) -> tuple[float, float, float, float]:
        """Wall clock, processor time of this thread and of the process, and time spent queued for a core."""
        queued = 0.0
        if self._schedstat is not None:
            queued = int(os.pread(self._schedstat, 64, 0).split()[1]) / 1e9
        return time.perf_counter(), time.thread_time(), time.process_time(), queued

    def _tick(self) -> None:
        now = self._now()
        wall, work, everyone, queued = (new - old for new, old in zip(now, self._last, strict=True))
        self._last = now
        slept = max(0.0, wall - INTERVAL - work - queued)
        held = min(slept, max(0.0, everyone - work))
        view = self._view
        if view[_SEEN] != view[_ASKED]:
            for place in range(_LONGEST, len(view)):
                view[place] = 0.0
            view[_SEEN] = view[_ASKED]
        elif work + held > view[_LONGEST]:
            view[_LONGEST], view[_WORK], view[_HELD] = work + held, work, held
        view[_WAITED] = max(view[_WAITED], slept - held)
        view[_LATE] = max(view[_LATE], wall - INTERVAL)
        view[_COUNTS + sum(work + held > bound for bound in BOUNDS)] += 1
        view[_TICKS] += 1
        if self._stacks is not None:
            import faulthandler

            faulthandler.dump_traceback_later(0.05 + INTERVAL, file=self._stacks)
        self._loop.call_later(INTERVAL, self._tick)


def _schedstat() -> int | None:
    """The file of the loop's thread, where the kernel keeps one."""
    try:
        return os.open(f"/proc/self/task/{threading.get_native_id()}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def main() -> int:
    """Serve with a probe on the loop that the server runs on."""
    import uvloop

    path = Path(sys.argv.pop(1))
    stacks = os.environ.pop("ATTACK_STACKS", None)
    probe = Probe(path, Path(stacks) if stacks else None)
    make = uvloop.new_event_loop

    def new_event_loop() -> Any:
        loop = make()
        loop.call_soon(probe.start, loop)
        return loop

    uvloop.new_event_loop = new_event_loop
    from container.cli import main as serve

    return serve()


if __name__ == "__main__":
    sys.exit(main())
