"""Whether an engine still serves: its processes are looked at, and a replica that is silent is asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from handlers.backends.vllm.engine.counters import Counters
from handlers.backends.vllm.engine.processes import ProcessTree

LOOK_SECONDS = 0.25
"""Pause between two looks at the engine's processes and at its last words."""

IDLE_SECONDS = 30.0
"""A replica without a word for so long is asked, though no request is in flight."""

Ask = Callable[[Any, int], Awaitable[None]]
"""Has one replica of an engine's model, by its number, generate a token."""


@dataclass(frozen=True)
class Patience:
    """How long an engine may be silent.

    Attributes:
        suspect: Seconds without progress, with requests in flight, after which an engine counts as not ready.
        stuck: Seconds within which an engine must generate the token that it is asked for; longer than its
            longest step.
    """

    suspect: float = 20.0
    stuck: float = 300.0

    @property
    def quiet(self) -> float:
        """Without a word for so long, a replica is asked; for as long again it may owe the answer unsuspected."""
        return self.suspect / 2


class Watch:
    """Over one engine. With data parallelism each replica counts alone: one may hang while the others answer."""

    def __init__(
        self,
        engine: Any,
        tree: ProcessTree,
        ask: Ask,
        counters: Counters,
        busy: Callable[[], bool],
        patience: Patience,
    ) -> None:
        """busy: whether requests are in flight."""
        self.engine = engine
        self.tree = tree
        self._ask = ask
        self._signs = counters.signs
        self._busy = busy
        self._patience = patience
        self._asked: dict[int, float] = {}
        self._replicas = range(count_replicas(engine))

    @property
    def suspect(self) -> bool:
        """Whether a replica owes an answer for too long."""
        now = time.monotonic()
        return any(now - asked > self._patience.quiet for asked in self._asked.values())

    async def until_lost(self) -> str:
        """Why it has to be replaced."""
        watching = [asyncio.create_task(self._until_dead())]
        watching += [asyncio.create_task(self._until_silent(replica)) for replica in self._replicas]
        try:
            done, _ = await asyncio.wait(watching, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)

    async def _until_dead(self) -> str:
        """vLLM tells of a worker's death only when the other workers have ended, too: seconds later."""
        while not self.engine.errored:
            if dead := self.tree.dead:
                return f"lost {dead}"
            await asyncio.sleep(LOOK_SECONDS)
        return "process died"

    async def _until_silent(self, replica: int) -> str:
        self._signs[replica] = time.monotonic()
        while True:
            await asyncio.sleep(min(LOOK_SECONDS, self._patience.quiet))
            silent = time.monotonic() - self._signs[replica]
            quiet = self._patience.quiet
            if silent > (quiet if self._busy() else max(quiet, IDLE_SECONDS)) and not await self._answers(
                replica
            ):
                which = f" (replica {replica} of {len(self._replicas)})" if len(self._replicas) > 1 else ""
                return f"has not answered for {self._patience.stuck:.0f} s{which}"

    async def _answers(self, replica: int) -> bool:
        """Ask it for a token. Its word about any request is an answer as well; a death is not told here.

        That it cannot be asked is no answer: the requests that a hung engine holds fill its queue.
        """
        asking = asyncio.ensure_future(self._ask(self.engine, replica))
        asked = self._asked[replica] = time.monotonic()
        try:
            while True:
                await asyncio.wait({asking}, timeout=LOOK_SECONDS)
                if self._signs[replica] > asked:
                    return True
                if asking.done():
                    # All replicas share one queue: who fills it may be the others.
                    if _succeeded(asking) or len(self._replicas) > 1:
                        return True
                    await asyncio.sleep(LOOK_SECONDS)
                    asking = asyncio.ensure_future(self._ask(self.engine, replica))
                if time.monotonic() - asked > self._patience.stuck:
                    return False
        finally:
            del self._asked[replica]
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            self._signs[replica] = max(asked, self._signs[replica])


def _succeeded(asking: asyncio.Future[None]) -> bool:
    return not asking.cancelled() and asking.exception() is None


def count_replicas(engine: Any) -> int:
    """How many replicas an `AsyncLLM` holds; 1 for what else a supervisor holds."""
    config = getattr(engine, "vllm_config", None)
    return 1 if config is None else int(config.parallel_config.data_parallel_size)
