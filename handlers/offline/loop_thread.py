"""An event loop in a thread of its own, for callers that block."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Collection, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

END_SECONDS = 10.0
"""How long what still runs at the end may take to clean up."""


class LoopThread:
    """An event loop in its own thread, so that scripts, threads and notebooks can wait for what runs on it.

    Nothing of it survives a fork.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, daemon=True, name="offline")
        self._thread.start()

    @property
    def usable(self) -> bool:
        """Whether the thread can run something: not in a forked child, and not after `stop`."""
        return os.getpid() == self._pid and self._thread.is_alive()

    @property
    def inside(self) -> bool:
        """Whether the caller is the loop's own thread, which must not wait for itself."""
        return threading.current_thread() is self._thread

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for the work; if the wait is interrupted, the work is cancelled."""
        future = self.start(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """End the thread, and cancel what still runs on it."""
        if self.usable:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                if not task.cancelling():  # one that has been interrupted may be ending an engine that it has started
                    task.cancel()
            self._loop.run_until_complete(_ended(tasks))
        finally:
            self._loop.close()


async def _ended(tasks: Collection[asyncio.Task[Any]]) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), END_SECONDS)
