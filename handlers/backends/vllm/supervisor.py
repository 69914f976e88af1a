"""Keeps a vLLM engine running: starts it, watches what it reports, and replaces it when it dies or hangs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from handlers.backends.base import Health, no_engine
from handlers.backends.vllm.compat import engine_process_ids, expect_the_end, fail_requests, replica_count
from handlers.backends.vllm.probes import Counters
from handlers.backends.vllm.processes import ProcessTree, engine_children
from handlers.errors import stopping
from processes.guard import Guard
from processes.supervisor import FIRST_PAUSE_SECONDS, Supervisor

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.25

IDLE_SECONDS = 30.0

JOIN_SECONDS = 30.0
"""How long killed processes may take to end and free their memory."""

Ask = Callable[[Any, int], Awaitable[None]]
"""Has one replica of an engine, by its number, generate a token."""


class EngineSupervisor(Supervisor["RunningEngine"]):
    """Keeps an engine running; `engine` is None while there is none.

    Attributes:
        in_flight: How many requests are in flight.
        answered: Whether the engine that serves now has answered a request.
        closed: Whether `close` has been called.
    """

    def __init__(
        self,
        build: Callable[[], Any],
        ask: Ask,
        counters: Counters,
        *,
        prepare: Callable[[Any], Awaitable[None]] | None = None,
        retry_threshold: int = 3,
        loading_seconds: float = 1800.0,
        suspect_seconds: float = 20.0,
        stuck_seconds: float = 300.0,
        idle_seconds: float = IDLE_SECONDS,
        look_seconds: float = LOOK_SECONDS,
        first_pause_seconds: float = FIRST_PAUSE_SECONDS,
    ) -> None:
        """Prepare to keep an engine running; `start` builds the first and raises what `build` and `prepare` raise.

        Args:
            build: Makes an engine. It is slow and called in a thread.
            ask: Has one replica generate a token.
            counters: The progress that vLLM last reported.
            prepare: Makes a new engine ready to serve.
            retry_threshold: See `Supervisor`.
            loading_seconds: The time limit of one restart.
            suspect_seconds: How long a replica may be silent, with requests in flight, before the engine counts as not
                ready. For the first half of that time it is only waited for; then it is asked for a token.
            stuck_seconds: How long the token may take; longer than the engine's longest step.
            idle_seconds: How long a replica may be silent without requests before it is asked for a token.
            look_seconds: How often the engine's processes and its latest output are checked.
            first_pause_seconds: See `Supervisor`.
        """
        super().__init__(
            "the engine",
            self._launched,
            retry_threshold=retry_threshold,
            start_seconds=loading_seconds,
            first_pause_seconds=first_pause_seconds,
        )
        self.ask = ask
        self.signs = counters.signs
        self.quiet = suspect_seconds / 2
        self.stuck = stuck_seconds
        self.idle = idle_seconds
        self.look = look_seconds
        self.in_flight = 0
        self.answered = self.closed = False
        self._build = build
        self._prepare = prepare
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="vllm-engine")
        self._guard = Guard()

    @property
    def engine(self) -> Any:
        return None if self.current is None else self.current.engine

    @property
    def serving(self) -> Any:
        """The engine that serves now. Raises Unavailable."""
        if self.closed:
            raise stopping()
        if self.engine is None or self.engine.errored:
            raise no_engine(given_up=self.given_up)
        return self.engine

    def health(self) -> Health:
        """Return whether the engine serves now."""
        if self.current is None or self.current.engine.errored:
            return Health(False, self.reason("the engine"), lost=self.given_up)
        if any(time.monotonic() - asked > self.quiet for asked in self.current.asked.values()):
            return Health(False, "the engine does not answer")
        return Health(True, "ready")

    async def close(self) -> None:
        """End the engine's processes. Never raises; safe to call twice."""
        self.closed = True
        await super().close()
        await self._guard.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _launched(self) -> RunningEngine:
        others = engine_children()
        building = asyncio.get_running_loop().run_in_executor(self._threads, self._build)
        engine = tree = None
        try:
            while not building.done():  # which takes minutes with a large model
                await asyncio.wait({building}, timeout=self.look)
                await self._guard.protect(ProcessTree(engine_children() - others).members)
            engine = building.result()
            tree = ProcessTree(engine_process_ids(engine))
            await self._guard.protect(tree.members)
            if self._prepare is not None:
                await self._prepare(engine)
        except BaseException:
            building.cancel()
            await self.end(engine, tree or ProcessTree(engine_children() - others))
            raise
        self.answered = False
        return RunningEngine(self, engine, tree)

    async def end(self, engine: Any, tree: ProcessTree) -> None:
        """End an engine's processes and free what the front end holds of it. engine: None if it was not built."""
        try:
            if engine is not None:
                expect_the_end(engine)
            await asyncio.get_running_loop().run_in_executor(self._threads, _kill, engine, tree)
        finally:
            await self._guard.protect([])


class RunningEngine:
    """An engine that serves (see `processes.supervisor.Supervised`).

    With data parallelism each replica is watched separately: one may hang while the others answer.

    Attributes:
        asked: The time since which a replica owes a token, for those that do.
    """

    def __init__(self, owner: EngineSupervisor, engine: Any, tree: ProcessTree) -> None:
        self.engine = engine
        self._owner = owner
        self._tree = tree
        self._replicas = replica_count(engine)
        self.asked: dict[int, float] = {}
        self._ending: asyncio.Future[None] | None = None
        self._lost = False

    @property
    def served(self) -> bool:
        return self._owner.answered

    async def lost(self) -> str:
        watching = [asyncio.create_task(self._until_dead())]
        watching += [asyncio.create_task(self._until_silent(replica)) for replica in range(self._replicas)]
        try:
            done, _ = await asyncio.wait(watching, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
        self._lost = True
        return done.pop().result()

    async def stop(self) -> None:
        """Fail the requests of a lost engine at once; vLLM would do so only after all of its processes have ended."""
        if self._lost:
            fail_requests(self.engine)
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._owner.end(self.engine, self._tree))
        await asyncio.shield(self._ending)
        if self._lost:
            fail_requests(self.engine)  # those that came in between

    async def _until_dead(self) -> str:
        # vLLM reports the death of a worker only when the other workers have ended too, seconds later.
        while not self.engine.errored:
            if dead := self._tree.dead:
                return f"lost {dead}"
            await asyncio.sleep(self._owner.look)
        return "process died"

    async def _until_silent(self, replica: int) -> str:
        owner = self._owner
        owner.signs[replica] = time.monotonic()
        while True:
            await asyncio.sleep(min(owner.look, owner.quiet))
            allowed = owner.quiet if owner.in_flight else max(owner.quiet, owner.idle)
            silent = time.monotonic() - owner.signs[replica]
            if silent > allowed and not await self._answers(replica):
                which = f" (replica {replica} of {self._replicas})" if self._replicas > 1 else ""
                return f"has not answered for {owner.stuck:.0f} s{which}"

    async def _answers(self, replica: int) -> bool:
        """Ask for a token. Progress of any other request counts as an answer too; a death is not noticed here."""
        owner = self._owner
        asking = asyncio.create_task(self._until_answered(replica))
        asked = self.asked[replica] = time.monotonic()
        try:
            while not asking.done() and owner.signs[replica] <= asked:
                if time.monotonic() - asked > owner.stuck:
                    return False
                await asyncio.wait({asking}, timeout=owner.look)
            return True
        finally:
            del self.asked[replica]
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            owner.signs[replica] = max(asked, owner.signs[replica])

    async def _until_answered(self, replica: int) -> None:
        asking = asyncio.current_task()
        assert asking is not None
        while True:
            try:
                return await self._owner.ask(self.engine, replica)
            except asyncio.CancelledError:
                if asking.cancelling():
                    raise
                # vLLM itself has dropped the question, which says nothing about the engine.
            except Exception:
                # A refusal is no answer, since the requests that a hung engine holds fill its queue. Replicas share one
                # queue, which the other ones may have filled.
                if self._replicas > 1:
                    return
            await asyncio.sleep(self._owner.look)


def _kill(engine: Any, tree: ProcessTree) -> None:
    if left := tree.kill(JOIN_SECONDS):
        text = "%.0f s after they were killed, %d processes of the engine still hold their memory: %s"
        logger.error(text, JOIN_SECONDS, len(left), ", ".join(str(process.pid) for process in left))
    if engine is not None:
        engine.shutdown(timeout=0)
