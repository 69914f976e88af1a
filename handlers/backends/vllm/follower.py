"""A machine's part of an engine whose first machine is another one (`option.nnodes`, vLLM's own launcher).

The engine on the first machine reaches the workers of all machines. Those of one further machine run in a process of
their own, which this module is when it is run as a script. They end whenever the engine does, and are started again,
as the engine is on the first machine.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handlers import progress
from handlers.backends.base import BackendStats, Capabilities, Health
from handlers.backends.vllm import compat
from handlers.backends.weights_read import weights_told
from handlers.errors import InvalidConfiguration
from processes.child import Child, Log
from processes.inside import Parent
from processes.supervisor import Supervisor

if TYPE_CHECKING:
    from handlers.backends.adapters import AdapterStore
    from properties.configuration import Configuration

logger = logging.getLogger(__name__)

_PART = "this machine's part of the engine"


class VllmFollower:
    """See `handlers.backends.base.Lifecycle`: ready while its workers are part of an engine; it answers no requests."""

    adapters: AdapterStore | None = None

    def __init__(self, configuration: Configuration, supervisor: Supervisor[Workers]) -> None:
        """Use `start`."""
        self.capabilities = Capabilities(max_model_len=configuration.settings.max_model_len or 0, images=False)
        self._supervisor = supervisor

    @classmethod
    async def start(cls, configuration: Configuration, model_path: Path) -> VllmFollower:
        """Return when the workers are part of an engine; see `Backend.part`."""
        from handlers.backends.vllm.engine import EngineBuilder

        progress.current().begin("starting vLLM")
        # Made as on the first machine, so that the parts of the engine agree about samplers and adapters.
        arguments = (await asyncio.to_thread(EngineBuilder, configuration, model_path)).arguments
        settings = configuration.settings
        supervisor = Supervisor(
            _PART,
            lambda: Workers.start(arguments, settings.model_loading_timeout),
            # One more, since their end with the engine is not a failure of theirs.
            retry_threshold=settings.retry_threshold + 1,
        )
        await supervisor.start()
        return cls(configuration, supervisor)

    def health(self) -> Health:
        supervisor = self._supervisor
        if supervisor.current is not None:
            return Health(True, "ready")
        return Health(False, supervisor.reason(_PART), lost=supervisor.given_up)

    def stats(self) -> BackendStats:
        return BackendStats(engine_restarts=self._supervisor.restarts)

    async def close(self) -> None:
        await self._supervisor.close()


class Workers:
    """The workers of this machine, which are part of an engine (see `processes.supervisor.Supervised`)."""

    served = True
    """An engine that has accepted them has started, so earlier failures no longer count."""

    def __init__(self, child: Child) -> None:
        """Use `start`."""
        self._child = child

    @classmethod
    async def start(cls, arguments: dict[str, Any], seconds: float) -> Workers:
        """Return when they are part of an engine, which the first machine starts. If this fails, nothing is left.

        Args:
            arguments: For `AsyncEngineArgs`.
            seconds: How long the first machine may take to accept them.

        Raises:
            InvalidConfiguration: With the reason.
            OSError: The process cannot be started.
        """
        child = await Child.start(__name__, "vllm", Log(logger))
        workers = cls(child)
        try:
            child.send(pickle.dumps(arguments))
            async with asyncio.timeout(seconds), weights_told(Path(arguments["model"]), lambda: (child.pid,)):
                failure = (await child.receive()).decode(errors="replace")
        except BaseException as error:
            await workers.stop()
            if isinstance(error, TimeoutError):
                text = "the first machine did not accept the workers of this one in time"
                raise InvalidConfiguration(text) from error
            if not isinstance(error, EOFError):
                raise
            failure = "their process ended"
        if failure:
            await workers.stop()
            raise InvalidConfiguration(f"the workers of this machine did not start: {failure}")
        return workers

    async def lost(self) -> str:
        await self._child.wait()
        return "ended, as it does with the engine"

    async def stop(self) -> None:
        self._child.kill()
        await self._child.wait()


def main() -> None:
    """Run the workers until one of them ends, as all do with the engine; the reply is empty, or why they failed."""
    parent = Parent(die_with_it=False)
    arguments = parent.receive()
    if arguments is None:
        return
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        executor = _joined(pickle.loads(arguments))
    except Exception as error:
        parent.send((str(error) or type(error).__name__).encode())
        raise
    parent.send(b"")
    executor.start_worker_monitor(inline=True)


def _joined(arguments: dict[str, Any]) -> Any:
    """Return the executor of this machine's workers, once the first machine has accepted them."""
    vllm = compat.load()
    # From the context vLLM derives the size of a step, and so of all buffers, which must be the first machine's.
    config = vllm.AsyncEngineArgs(**arguments).create_engine_config(vllm.server_context, headless=True)
    return compat.multiproc_executor()(config, monitor_workers=False)


def _end_with(parent: Parent) -> None:
    """Kill this process's group when the parent is gone: workers that wait for the other machine do not notice."""
    parent.receive()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
