"""Kills processes that must not outlive this one, even if this one is killed.

A separate process, the guard, does so. It is for processes that `processes.child` does not start: vLLM starts its own,
and any that were left would go on holding the devices.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil

from processes.inside import Parent

if TYPE_CHECKING:
    from processes.child import Child

logger = logging.getLogger(__name__)


class Guard:
    """Kills the protected processes once this process is gone, even if this process was killed."""

    def __init__(self) -> None:
        self._child: Child | None = None
        self._told: list[int] = []
        self._unguarded: list[int] = []
        """What the log says to be without a guard."""

    async def protect(self, processes: Iterable[psutil.Process]) -> None:
        """Guard these processes, and no others, from now on. If no guard can be started, that is logged."""
        from processes.child import Child, Log  # not in the guard's own process, which stays small

        pids = [process.pid for process in processes]
        child = self._child
        if pids == self._told and (not pids or (child is not None and not child.has_ended())):
            return
        try:
            if child is None or child.has_ended():
                await self.close()
                child = self._child = await Child.start("processes.guard", "plain", Log(logger, logging.WARNING))
            child.send(json.dumps(pids).encode())
            self._told = pids
        except OSError as error:
            if pids == self._unguarded:
                return
            self._unguarded = pids
            logger.warning("without a guard an engine may outlive a killed server: %s", error)

    async def close(self) -> None:
        """End the guard and leave the processes alive. Safe to call twice."""
        child, self._child = self._child, None
        self._told = []
        if child is not None:
            child.kill()
            await child.wait()


def main() -> None:
    """Wait until the parent is gone, then kill the processes that it named last.

    A process is identified when it is named, so a later process with the same id is spared.
    """
    parent = Parent(die_with_it=False)
    guarded: list[psutil.Process] = []
    while (message := parent.receive()) is not None:
        guarded = []
        for pid in json.loads(message):
            with suppress(psutil.Error):
                guarded.append(psutil.Process(pid))
    for process in guarded:
        with suppress(psutil.Error):
            process.kill()


if __name__ == "__main__":
    main()
