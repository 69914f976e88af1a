"""What a machine that is not the first of several runs: its part of the model, for the engine of the first one.

vLLM's own launcher (`option.nnodes`) has the engine on the first machine reach the workers of all. Here are those of
one other machine. They end whenever the engine does, and are started again, as the engine is on the first machine.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from handlers.backends.base import BackendStats, Capabilities, Health
from handlers.backends.vllm.engine.builder import EngineBuilder
from handlers.backends.vllm.nodes.workers import Workers
from processes.supervisor import Supervisor

if TYPE_CHECKING:
    from handlers.backends.adapters import AdapterStore
    from properties.configuration import Configuration


class VllmFollower:
    """See `handlers.backends.base.Lifecycle`: ready while its workers are part of an engine; answers nothing itself."""

    def __init__(self, configuration: Configuration, model_path: Path) -> None:
        self._configuration = configuration
        self._settings = configuration.settings
        self._path = model_path
        self._supervisor: Supervisor[Workers] | None = None

    async def load(self) -> None:
        # The first machine's: parts of one engine that disagreed about samplers or adapters would drift apart.
        arguments = (await asyncio.to_thread(EngineBuilder, self._configuration, self._path)).arguments
        supervisor = Supervisor(
            "this machine's part of the engine",
            lambda: Workers.start(arguments, self._settings.model_loading_timeout),
            # One more: that they ended with an engine is not a failure of theirs.
            retry_threshold=self._settings.retry_threshold + 1,
        )
        await supervisor.start()
        self._supervisor = supervisor

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(max_model_len=self._settings.max_model_len or 0, images=False)

    @property
    def adapters(self) -> AdapterStore | None:
        return None

    def health(self) -> Health:
        supervisor = self._supervisor
        if supervisor is not None and supervisor.current is not None:
            return Health(True, "ready")
        if supervisor is not None and supervisor.given_up:
            return Health(False, "the workers of this machine failed too often", lost=True)
        if supervisor is None or supervisor.short is None:
            return Health(False, "the workers of this machine are being started")
        return Health(False, supervisor.reason("this machine's part of the engine"))

    def stats(self) -> BackendStats:
        return BackendStats(engine_restarts=0 if self._supervisor is None else self._supervisor.restarts)

    async def close(self) -> None:
        if self._supervisor is not None:
            await self._supervisor.close()
