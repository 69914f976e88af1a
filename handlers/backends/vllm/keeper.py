"""One vLLM engine after another under one name: started, watched, and replaced when it dies or hangs."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from handlers.backends.base import Health
from handlers.backends.vllm.counters import Counters
from handlers.backends.vllm.guard import Guard

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
"""Pause between two looks at whether the engine's processes are alive."""

QUIET_SECONDS = 10.0
"""With requests in flight: so long without a word, and the engine is asked for a token."""

IDLE_SECONDS = 30.0
"""The same without requests."""

SUSPECT_SECONDS = 10.0
"""An engine that owes an answer to the question for so long counts as not ready."""

STUCK_SECONDS = 120.0
"""An engine that owes it for so long is killed and replaced: longer than the longest step."""

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
"""The first restart comes at once; the pause before each further one doubles."""

JOIN_SECONDS = 10.0
"""What a killed process gets to be gone, with its memory."""


class EngineKeeper:
    """Holds the engine that serves now; `engine` is None while there is none."""

    def __init__(
        self,
        build: Callable[[], Any],
        ask: Callable[[Any], Awaitable[None]],
        counters: Counters,
        *,
        prepare: Callable[[Any], Awaitable[None]] | None = None,
        retry_threshold: int = 3,
        loading_seconds: float = 1800.0,
        stuck_seconds: float = STUCK_SECONDS,
    ) -> None:
        """build: makes an engine; slow, called in a thread. ask: makes an engine generate one token.

        prepare: makes an engine that answers ready to serve.
        retry_threshold: failures, with no answered request between them, that a restart answers.
        loading_seconds: what one restart may take.
        """
        self._build = build
        self._ask = ask
        self._prepare = prepare
        self._counters = counters
        self._retry_threshold = retry_threshold
        self._loading_seconds = loading_seconds
        self._stuck_seconds = stuck_seconds
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="vllm-engine")
        self._keeping: asyncio.Task[None] | None = None
        self._asked_at: float | None = None
        self._closing = False
        self._guard: Guard | None = None
        self.engine: Any = None
        self.in_flight = 0
        self.answered = False
        """Since the engine that serves now came up."""
        self.failures = 0
        self.restarts = 0
        self.given_up = False

    async def start(self) -> None:
        """Build the first engine and keep it. Raises what `build` and `ask` raise."""
        self.engine = await self._built()
        self._keeping = asyncio.create_task(self._keep())

    def health(self) -> Health:
        if self.given_up:
            return Health(False, "the engine failed too often", lost=True)
        if self.engine is None or self.engine.errored:
            return Health(False, "the engine is being restarted")
        if self._asked_at is not None and time.monotonic() - self._asked_at > SUSPECT_SECONDS:
            return Health(False, "the engine does not answer")
        return Health(True, "ready")

    async def close(self) -> None:
        """End the engine's processes. Never raises; safe to call twice."""
        if self._closing:
            return
        self._closing = True
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        engine, self.engine = self.engine, None
        try:
            await self._ended(engine)
        except Exception:
            logger.exception("the engine did not stop cleanly")
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _built(self) -> Any:
        engine = await asyncio.get_running_loop().run_in_executor(self._threads, self._build)
        self._guard = Guard([child.pid for child in multiprocessing.active_children() if child.pid])
        try:
            # vLLM's profiling leaves dummy pictures in the cache.
            await engine.reset_mm_cache()
            await self._ask(engine)
            if self._prepare is not None:
                await self._prepare(engine)
        except BaseException:
            await self._ended(engine)
            raise
        return engine

    async def _ended(self, engine: Any) -> None:
        if self._guard is not None:
            self._guard.release()
        await asyncio.get_running_loop().run_in_executor(self._threads, _end, engine)

    async def _keep(self) -> None:
        """Replace the engine whenever it is lost, until it is lost too often."""
        while not self._closing:
            reason = await self._until_lost(self.engine)
            lost, self.engine, self._asked_at = self.engine, None, None
            logger.error("the engine %s", reason)
            self.failures = 1 if self.answered else self.failures + 1
            self.answered = False
            await self._ended(lost)
            del lost
            if not await self._restart():
                self.given_up = True
                return

    async def _until_lost(self, engine: Any) -> str:
        """Why it has to be replaced."""
        self._counters.last_sign = time.monotonic()
        while not engine.errored:
            await asyncio.sleep(LOOK_SECONDS)
            quiet = time.monotonic() - self._counters.last_sign
            if quiet > (QUIET_SECONDS if self.in_flight else IDLE_SECONDS) and not await self._answers(
                engine
            ):
                return f"has not answered for {self._stuck_seconds:.0f} s"
        return "process died"

    async def _answers(self, engine: Any) -> bool:
        """Ask it for a token. A word about any request is an answer as well; a death is not told here."""
        asking = asyncio.ensure_future(self._ask(engine))
        asked = self._asked_at = time.monotonic()
        try:
            while True:
                await asyncio.wait({asking}, timeout=LOOK_SECONDS)
                if asking.done() or engine.errored or self._counters.last_sign > asked:
                    return True
                if time.monotonic() - asked > self._stuck_seconds:
                    return False
        finally:
            self._asked_at = None
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            self._counters.last_sign = max(asked, self._counters.last_sign)

    async def _restart(self) -> bool:
        """Try until it is back, or has failed too often."""
        while self.failures <= self._retry_threshold:
            await asyncio.sleep(_pause(self.failures))
            self.restarts += 1
            try:
                async with asyncio.timeout(self._loading_seconds):
                    self.engine = await self._built()
            except Exception as error:
                logger.error("the engine did not start again: %s", error or type(error).__name__)
                await self._ended(None)
                self.failures += 1
            else:
                logger.info("the engine is back")
                return True
        logger.critical("the engine is given up after %d failures", self.failures)
        return False


def _end(engine: Any) -> None:
    """Kill the engine's processes, which have nothing to save, and free what the front holds of it.

    The processes are all that this process starts through multiprocessing; workers end with their engine.
    """
    children = multiprocessing.active_children()
    for child in children:
        child.kill()
    for child in children:
        child.join(JOIN_SECONDS)
    if engine is not None:
        engine.shutdown(timeout=0)


def _pause(failures: int) -> float:
    """Seconds to wait before the restart after that many failures in a row."""
    if failures <= 1:
        return 0.0
    return min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** (failures - 2))
