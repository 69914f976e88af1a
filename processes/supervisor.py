"""Keeps a child process, or what one provides, running: restarts it when it is lost, until it has failed too often."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from processes.shortage import shortage

logger = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
"""The first restart is immediate; the pause before each further one doubles."""

LONGEST_WAIT_SECONDS = 5.0
"""The longest pause between two starts while this machine is short of a resource."""


class Supervised(Protocol):
    """What a supervisor starts: an engine, the process of the user's handler, or the workers of one machine."""

    @property
    def served(self) -> bool:
        """Whether it has answered a request, so that earlier failures no longer count."""

    async def lost(self) -> str:
        """Wait until it must be replaced; return the reason, for example "ended with code -9"."""

    async def stop(self) -> None:
        """Stop what still runs of it. Safe to call twice, also after the first call was cancelled."""


T = TypeVar("T", bound=Supervised)


class Supervisor(Generic[T]):
    """Keeps one `Supervised` running, replacing it when it is lost; `current` is None while none is running."""

    def __init__(
        self,
        name: str,
        start: Callable[[], Awaitable[T]],
        *,
        retry_threshold: int,
        start_seconds: float | None = None,
        first_pause_seconds: float = FIRST_PAUSE_SECONDS,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare to keep something running; `start` starts it.

        Args:
            name: Its name in the log, for example "replica 0".
            start: Starts one and returns it when it is ready. If that fails, it raises and leaves nothing behind.
            retry_threshold: The number of failures in a row, with no answered request between them, after which it is
                still restarted.
            start_seconds: The time limit of one restart.
            first_pause_seconds: The pause before the second restart in a row.
            changed: Called when `current` has been lost or replaced, and when no further restart is tried.
        """
        self._name = name
        self._start = start
        self._start_seconds = start_seconds
        self._changed = changed
        self._keeping: asyncio.Task[None] | None = None
        self._stopping: T | None = None
        self._tries = Restarts(retry_threshold, first_pause_seconds)
        self.current: T | None = None
        self.restarts = 0
        self.given_up = False

    async def start(self) -> T:
        """Start the first one and keep it running from now on. Raises what the given `start` raises."""
        self.current = first = await self._start()
        self._keeping = asyncio.create_task(self._keep(), name=f"keep {self._name}")
        return first

    def start_later(self) -> None:
        """Start the first one in the background, as often as a lost one is restarted, and keep it running."""
        self._keeping = asyncio.create_task(self._keep(), name=f"keep {self._name}")

    @property
    def short(self) -> str | None:
        """The resource that the machine was short of at the last start; None if it did not fail for that reason."""
        return self._tries.short

    def reason(self, name: str) -> str:
        """Return why it is not running, for health. name: what to call it, for example "the engine"."""
        if self.given_up:
            return f"{name} failed too often"
        return self._tries.reason(name)

    async def close(self) -> None:
        """Stop it and start no other. Never raises; safe to call twice."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        current, self.current = self.current, None
        for one in (self._stopping, current):
            if one is not None:
                await self._stop(one)

    async def _keep(self) -> None:
        try:
            if self.current is None:
                self.current = await self._started()
                self._changed()
            while (one := self.current) is not None:
                reason = await one.lost()
                self.current, self._stopping = None, one
                self._tries.died(served=one.served)
                logger.error("%s %s", self._name, reason)
                self._changed()
                await self._stop(one)
                self._stopping = None
                del one  # its resources must be free before the next one starts
                self.current = await self._started()
                self._changed()
        except Exception:
            logger.exception("%s is not watched any more", self._name)
            self.given_up = True
            self._changed()

    async def _started(self) -> T | None:
        """Try to start it until it runs; return None when it has failed too often."""
        again = self._tries.failures > 0
        while not self._tries.exhausted:
            await asyncio.sleep(self._tries.pause)
            self.restarts += again
            try:
                async with asyncio.timeout(self._start_seconds):
                    one = await self._start()
            except Exception as error:
                what = "did not start again" if again else "did not start"
                logger.error("%s %s: %s", self._name, what, str(error) or type(error).__name__)
                self._tries.failed(error)
            else:
                self._tries.succeeded()
                logger.info("%s is %s", self._name, "back" if again else "ready")
                return one
        logger.critical("%s is given up after %d failures", self._name, self._tries.failures)
        self.given_up = True
        return None

    async def _stop(self, one: T) -> None:
        try:
            await one.stop()
        except Exception:
            logger.exception("%s did not stop cleanly", self._name)


def why_down(supervisors: Sequence[Supervisor[Any]], name: str) -> str:
    """Return why nothing is running, for health. name: what to call it, for example "the engine"."""
    waiting = [one for one in supervisors if not one.given_up]
    short = [one for one in waiting if one.short is not None]
    return (short or waiting or supervisors)[0].reason(name)


class Restarts:
    """Decides when a child that died is restarted, and when it has failed too often.

    A start that fails because this machine or process is short of descriptors, memory or processes is repeated until
    they are available. It says nothing about the child, so it is not counted.
    """

    def __init__(self, most_failures: int, first_pause_seconds: float = FIRST_PAUSE_SECONDS) -> None:
        """most_failures: how many in a row, with no answered request between them, are still followed by a restart."""
        self._most_failures = most_failures
        self._first_pause_seconds = first_pause_seconds
        self._waits = 0
        self.failures = 0
        self.short: str | None = None
        """The resource that the last start was short of."""

    @property
    def exhausted(self) -> bool:
        return self.failures > self._most_failures

    @property
    def pause(self) -> float:
        """Seconds to wait before the next start."""
        number = self.failures + self._waits
        if number <= 1:
            return 0.0
        longest = LONGEST_PAUSE_SECONDS if self.short is None else LONGEST_WAIT_SECONDS
        return min(longest, self._first_pause_seconds * 2.0 ** min(number - 2, 16))

    def died(self, *, served: bool) -> None:
        """Count a death. served: whether it had answered a request, which ends the row of failures before."""
        self.failures = 1 if served else self.failures + 1

    def failed(self, error: BaseException) -> None:
        """Count a start that failed."""
        self.short = shortage(error)
        if self.short is None:
            self._waits = 0
            self.failures += 1
        else:
            self._waits += 1

    def succeeded(self) -> None:
        self._waits, self.short = 0, None

    def reason(self, name: str) -> str:
        """Return why it is not running, for health. name: what to call it, for example "the engine"."""
        if self.short is None:
            return f"{name} is being restarted"
        return f"{name} is restarted as soon as it can be: the server is short of {self.short}"
