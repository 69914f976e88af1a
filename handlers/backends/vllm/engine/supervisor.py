"""One vLLM engine after another under one name: started, watched, and replaced when it dies or hangs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from handlers.backends.base import Health
from handlers.backends.vllm.compat import engine_process_ids, expect_the_end, fail_requests
from handlers.backends.vllm.engine.counters import Counters
from handlers.backends.vllm.engine.processes import ProcessTree, children, unfinished
from handlers.backends.vllm.engine.watch import Ask, Patience, Watch, count_replicas
from processes.guard import Guard
from processes.supervisor import Supervisor

logger = logging.getLogger(__name__)

GUARD_SECONDS = 0.5
"""How often an engine that is being built is looked at for new processes."""

JOIN_SECONDS = 30.0
"""What killed processes get to be gone, with their memory, all together."""


class EngineSupervisor:
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
        """Prepare to hold an engine; `start` builds it.

        Args:
            build: Makes an engine. It is slow and called in a thread.
            ask: Has one replica generate a token.
            counters: The progress that vLLM last reported.
            warm: Has a new replica compile what the first requests would wait for; `ask` by default.
            prepare: Makes an engine that has generated a token ready to serve.
            retry_threshold: The number of failures, with no answered request between them, after which the engine is
                still restarted.
            loading_seconds: The time limit of one restart.
            patience: How long the engine may be silent.
        """
        self._build = build
        self._ask = ask
        self._warm = warm or ask
        self._prepare = prepare
        self._counters = counters
        self._patience = patience or Patience()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="vllm-engine")
        self._guard = Guard()
        self._supervisor = Supervisor(
            "the engine", self._start, retry_threshold=retry_threshold, start_seconds=loading_seconds
        )
        self.in_flight = 0
        self.answered = False
        """Whether the engine that serves now has answered a request."""

    @property
    def engine(self) -> Any:
        running = self._supervisor.current
        return None if running is None else running.engine

    @property
    def restarts(self) -> int:
        return self._supervisor.restarts

    @property
    def given_up(self) -> bool:
        return self._supervisor.given_up

    async def start(self) -> None:
        """Build the first engine and keep it. Raises what `build`, `warm` and `prepare` raise."""
        await self._supervisor.start()

    def health(self) -> Health:
        running = self._supervisor.current
        if running is None or running.engine.errored:
            return Health(False, self._supervisor.reason("the engine"), lost=self.given_up)
        if running.watch.suspect:
            return Health(False, "the engine does not answer")
        return Health(True, "ready")

    async def close(self) -> None:
        """End the engine's processes. Never raises; safe to call twice."""
        await self._supervisor.close()
        await self._guard.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _start(self) -> _Running:
        before = children()
        engine = tree = None
        try:
            engine = await self._built(before)
            tree = ProcessTree(engine_process_ids(engine))
            await self._guard.protect(tree.members)
            # vLLM's profiling leaves dummy images in the cache.
            await engine.reset_mm_cache()
            await asyncio.gather(*(self._warm(engine, replica) for replica in range(count_replicas(engine))))
            if self._prepare is not None:
                await self._prepare(engine)
        except BaseException:
            await self.end(engine, tree or ProcessTree(unfinished(before)))
            raise
        self.answered = False
        watch = Watch(engine, tree, self._ask, self._counters, lambda: self.in_flight > 0, self._patience)
        return _Running(self, watch)

    async def _built(self, before: frozenset[int]) -> Any:
        """A new engine; its processes are guarded while they start, which takes minutes with a large model.

        before: the ids of children that are not its own.
        """
        building = asyncio.get_running_loop().run_in_executor(self._threads, self._build)
        try:
            while not building.done():
                await asyncio.wait({building}, timeout=GUARD_SECONDS)
                await self._guard.protect(ProcessTree(unfinished(before)).members)
            return building.result()
        finally:
            building.cancel()

    async def end(self, engine: Any, tree: ProcessTree) -> None:
        """End the processes of an engine, or of one that was not ready yet, and free what the front end holds of it."""
        try:
            if engine is not None:
                expect_the_end(engine)
            await asyncio.get_running_loop().run_in_executor(self._threads, _end, engine, tree)
        finally:
            await self._guard.protect([])


class _Running:
    """An engine that serves (see `processes.supervisor.Supervised`)."""

    def __init__(self, supervisor: EngineSupervisor, watch: Watch) -> None:
        self.watch = watch
        self.engine = watch.engine
        self._supervisor = supervisor
        self._ending: asyncio.Future[None] | None = None
        self._lost = False

    @property
    def served(self) -> bool:
        return self._supervisor.answered

    async def lost(self) -> str:
        reason = await self.watch.until_lost()
        self._lost = True
        return reason

    async def stop(self) -> None:
        """Fail the requests of a lost engine at once; vLLM would do so only after all of its processes have ended."""
        self._fail_requests()
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._supervisor.end(self.engine, self.watch.tree))
        await asyncio.shield(self._ending)
        self._fail_requests()  # who came in between

    def _fail_requests(self) -> None:
        if self._lost:
            fail_requests(self.engine)


def _end(engine: Any, tree: ProcessTree) -> None:
    """Kill the engine's processes, which have nothing to save, and free what the front end holds of it."""
    if left := tree.kill(JOIN_SECONDS):
        logger.error(
            "%d processes of the engine are there %.0f s after they were killed, with what memory they hold: %s",
            len(left),
            JOIN_SECONDS,
            ", ".join(str(process.pid) for process in left),
        )
    if engine is not None:
        engine.shutdown(timeout=0)
