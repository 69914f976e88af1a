"""One vLLM engine after another under one name: started, watched, and replaced when it dies or hangs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from handlers.backends.base import Health
from handlers.backends.vllm.engine.counters import Counters
from handlers.backends.vllm.engine.guard import Guard
from handlers.backends.vllm.engine.processes import ProcessTree, children, roots_of, unfinished
from handlers.backends.vllm.engine.watch import Ask, Patience, Watch, count_copies
from processes.restarts import Restarts

logger = logging.getLogger(__name__)

GUARD_SECONDS = 0.5
"""How often an engine that is being built is looked at for new processes."""

JOIN_SECONDS = 30.0
"""What killed processes get to be gone, with their memory, all together."""


class EngineKeeper:
    """Holds the engine that serves now; `engine` is None while there is none."""

    def __init__(
        self,
        build: Callable[[], Any],
        ask: Ask,
        counters: Counters,
        *,
        warm: Ask | None = None,
        prepare: Callable[[Any], Awaitable[None]] | None = None,
        retry_threshold: int = 3,
        loading_seconds: float = 1800.0,
        patience: Patience | None = None,
    ) -> None:
        """build: makes an engine; slow, called in a thread.

        warm: makes a copy of a new engine pay for what the first requests would wait for. Default: ask.
        prepare: makes an engine that answers ready to serve.
        retry_threshold: failures, with no answered request between them, that a restart answers.
        loading_seconds: what one restart may take.
        """
        self._build = build
        self._ask = ask
        self._warm = warm or ask
        self._prepare = prepare
        self._counters = counters
        self._loading_seconds = loading_seconds
        self._patience = patience or Patience()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="vllm-engine")
        self._keeping: asyncio.Task[None] | None = None
        self._closing = False
        self._others: frozenset[int] | None = None
        """While an engine is being built: children of this process before, which are none of the engine's."""
        self._tree: ProcessTree | None = None
        self._guard: Guard | None = None
        self._watch: Watch | None = None
        self.engine: Any = None
        self.in_flight = 0
        self.answered = False
        """Since the engine that serves now came up."""
        self.restarts = 0
        self._tries = Restarts(retry_threshold)
        self.given_up = False

    async def start(self) -> None:
        """Build the first engine and keep it. Raises what `build`, `warm` and `prepare` raise."""
        self.engine = await self._built()
        self._keeping = asyncio.create_task(self._keep())

    def health(self) -> Health:
        if self.given_up:
            return Health(False, "the engine failed too often", lost=True)
        if self.engine is None or self.engine.errored:
            return Health(False, self._tries.reason("the engine"))
        if self._watch is not None and self._watch.suspect:
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
        engine = None
        self._others = children()
        try:
            engine = await self._guarded(self._others)
            self._tree, self._others = ProcessTree(roots_of(engine)), None
            self._guard_these(self._tree)
            # vLLM's profiling leaves dummy pictures in the cache.
            await engine.reset_mm_cache()
            await asyncio.gather(*(self._warm(engine, copy) for copy in range(count_copies(engine))))
            if self._prepare is not None:
                await self._prepare(engine)
        except BaseException:
            await self._ended(engine)
            raise
        return engine

    async def _guarded(self, others: frozenset[int]) -> Any:
        """A new engine; its processes are guarded while they start, which takes minutes with a large model.

        others: the ids of children that are not its own.
        """
        building = asyncio.get_running_loop().run_in_executor(self._threads, self._build)
        try:
            while not building.done():
                await asyncio.wait({building}, timeout=GUARD_SECONDS)
                self._guard_these(ProcessTree(unfinished(others)))
            return building.result()
        finally:
            building.cancel()

    def _guard_these(self, tree: ProcessTree) -> None:
        if self._guard is None or self._guard.processes != tree.members:
            before, self._guard = self._guard, Guard(tree.members)
            if before is not None:
                before.release()

    async def _ended(self, engine: Any) -> None:
        """End the processes of an engine, or of one that was not ready yet, and free what the front holds of it."""
        tree, self._tree = self._tree, None
        others, self._others = self._others, None
        guard, self._guard = self._guard, None
        if tree is None:
            tree = ProcessTree([] if others is None else unfinished(others))
        try:
            _expect_the_end(engine)
            await asyncio.get_running_loop().run_in_executor(self._threads, _end, engine, tree)
        finally:
            if guard is not None:
                guard.release()

    async def _keep(self) -> None:
        """Replace the engine whenever it is lost, until it is lost too often."""
        while not self._closing:
            assert self._tree is not None, "an engine was built"
            self._watch = Watch(
                self.engine,
                self._tree,
                self._ask,
                self._counters,
                lambda: self.in_flight > 0,
                self._patience,
            )
            reason = await self._watch.until_lost()
            lost, self.engine, self._watch = self.engine, None, None
            logger.error("the engine %s", reason)
            self._tries.died(served=self.answered)
            self.answered = False
            try:
                _tell(lost)
                await self._ended(lost)
                _tell(lost)  # who came in between
            except Exception:
                logger.exception("the lost engine did not stop cleanly")
            del lost
            if not await self._restart():
                self.given_up = True
                return

    async def _restart(self) -> bool:
        """Try until it is back, or has failed too often."""
        while not self._tries.exhausted:
            await asyncio.sleep(self._tries.pause)
            self.restarts += 1
            try:
                async with asyncio.timeout(self._loading_seconds):
                    self.engine = await self._built()
            except Exception as error:
                logger.error("the engine did not start again: %s", error or type(error).__name__)
                self._tries.failed(error)
            else:
                self._tries.succeeded()
                logger.info("the engine is back")
                return True
        logger.critical("the engine is given up after %d failures", self._tries.failures)
        return False


def _tell(engine: Any) -> None:
    """All whose requests it holds, at once: vLLM itself tells them when it has seen all processes end."""
    if (processor := getattr(engine, "output_processor", None)) is not None:
        processor.propagate_error(engine.dead_error)


def _expect_the_end(engine: Any) -> None:
    """Else vLLM's front takes the death of its engine for a failure, and logs it as one."""
    if (handler := getattr(engine, "output_handler", None)) is not None:
        handler.cancel()
    if (resources := getattr(getattr(engine, "engine_core", None), "resources", None)) is not None:
        resources.engine_dead = True


def _end(engine: Any, tree: ProcessTree) -> None:
    """Kill the engine's processes, which have nothing to save, and free what the front holds of it."""
    if left := tree.kill(JOIN_SECONDS):
        logger.error(
            "%d processes of the engine are there %.0f s after they were killed, with what memory they hold: %s",
            len(left),
            JOIN_SECONDS,
            ", ".join(str(process.pid) for process in left),
        )
    if engine is not None:
        engine.shutdown(timeout=0)
