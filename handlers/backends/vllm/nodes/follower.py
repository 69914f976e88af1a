"""What a machine that is not the first of several runs: its part of the model, for the engine of the first one.

vLLM's own launcher (`option.nnodes`) has the engine on the first machine reach the workers of all. Here are those of
one other machine. They end whenever the engine does, and are started again, as the engine is on the first machine.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from handlers.backends.base import BackendStats, Capabilities, Health
from handlers.backends.vllm.engine.builder import EngineBuilder
from handlers.backends.vllm.nodes.workers import Workers
from handlers.errors import InvalidConfiguration
from processes.restarts import Restarts

if TYPE_CHECKING:
    from handlers.backends.adapters import AdapterStore
    from properties.configuration import Configuration

logger = logging.getLogger(__name__)


class VllmFollower:
    """See `handlers.backends.base.Lifecycle`: ready while its workers are part of an engine; answers nothing itself."""

    def __init__(self, configuration: Configuration, model_path: Path) -> None:
        self._configuration = configuration
        self._settings = configuration.settings
        self._path = model_path
        self._workers: Workers | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._ready = False
        self._lost = False
        self._restarts = 0
        self._tries = self._fresh_tries()

    async def load(self) -> None:
        # The first machine's: parts of one engine that disagreed about samplers or adapters would drift apart.
        self._arguments = (await asyncio.to_thread(EngineBuilder, self._configuration, self._path)).arguments
        await self._start()
        self._keeping = asyncio.create_task(self._keep())

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(max_model_len=self._settings.max_model_len or 0, images=False)

    @property
    def adapters(self) -> AdapterStore | None:
        return None

    def health(self) -> Health:
        if self._lost:
            return Health(False, "the workers of this machine failed too often", lost=True)
        if not self._ready:
            if self._tries.short is None:
                return Health(False, "the workers of this machine are being started")
            return Health(False, self._tries.reason("this machine's part of the engine"))
        return Health(True, "ready")

    def stats(self) -> BackendStats:
        return BackendStats(engine_restarts=self._restarts)

    async def close(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        self._ready = False
        if self._workers is not None:
            await asyncio.to_thread(self._workers.end)

    async def _start(self) -> None:
        """Return when the workers are part of an engine. Raises InvalidConfiguration."""
        self._workers = workers = Workers(self._arguments)
        waiting = asyncio.ensure_future(asyncio.to_thread(workers.joined))
        try:
            async with asyncio.timeout(self._settings.model_loading_timeout):
                reason = await asyncio.shield(waiting)
        except BaseException as error:
            workers.end()
            await asyncio.gather(waiting, return_exceptions=True)
            if isinstance(error, TimeoutError):
                raise InvalidConfiguration(
                    "the first machine did not take in the workers of this one"
                ) from error
            raise
        if reason is not None:
            workers.end()
            raise InvalidConfiguration(f"the workers of this machine did not start: {reason}")
        self._ready = True

    async def _keep(self) -> None:
        """Start them again whenever they end, until that fails too often."""
        while not self._lost:
            assert self._workers is not None
            await asyncio.to_thread(self._workers.ended)
            self._ready = False
            logger.error(
                "the workers of this machine ended, as they do with the engine that they are part of"
            )
            await asyncio.to_thread(self._workers.end)
            self._lost = not await self._restarted()

    def _fresh_tries(self) -> Restarts:
        """After the end of workers that were part of an engine."""
        tries = Restarts(self._settings.retry_threshold + 1)
        tries.died(served=True)
        return tries

    async def _restarted(self) -> bool:
        self._tries = self._fresh_tries()
        while not self._tries.exhausted:
            await asyncio.sleep(self._tries.pause)
            self._restarts += 1
            try:
                await self._start()
            except (InvalidConfiguration, OSError) as error:
                logger.error("the workers of this machine did not start: %s", error)
                self._tries.failed(error)
            else:
                self._tries.succeeded()
                logger.info("the workers of this machine are back")
                return True
        return False
