"""One machine's workers of an engine that is on another machine: a process of its own that starts them and ends them.

It leads a group of processes, which is how none is left behind: workers that wait for the other machine do not notice
that their parent is gone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import signal
import threading
from typing import Any

from handlers.backends.vllm import compat
from handlers.errors import InvalidConfiguration
from processes.child import Child, Log
from processes.inside import Parent

logger = logging.getLogger(__name__)

_JOINED = b""


class Workers:
    """They are part of an engine (see `processes.supervisor.Supervised`)."""

    served = True
    """An engine that took them in has started, so what went before is over."""

    def __init__(self, child: Child) -> None:
        """Use `start`."""
        self._child = child

    @classmethod
    async def start(cls, arguments: dict[str, Any], seconds: float) -> Workers:
        """Return when they are part of an engine, which the first machine starts.

        Raises InvalidConfiguration with the reason, and OSError. Nothing is left running then.

        Args:
            arguments: those of `AsyncEngineArgs`.
            seconds: for the first machine to take them in.
        """
        child = await Child.start("handlers.backends.vllm.nodes.workers", "vllm", Log(logger))
        try:
            child.send(pickle.dumps(arguments))
            async with asyncio.timeout(seconds):
                reason = await child.receive()
            if reason != _JOINED:
                raise InvalidConfiguration(
                    f"the workers of this machine did not start: {reason.decode(errors='replace')}"
                )
        except BaseException as error:
            child.kill()
            await child.wait()
            if isinstance(error, TimeoutError):
                raise InvalidConfiguration(
                    "the first machine did not take in the workers of this one"
                ) from error
            if isinstance(error, EOFError):
                raise InvalidConfiguration(
                    "the workers of this machine did not start: their process ended"
                ) from error
            raise
        return cls(child)

    async def lost(self) -> str:
        await self._child.wait()
        return "ended, as it does with the engine"

    async def stop(self) -> None:
        self._child.kill()
        await self._child.wait()


def main() -> None:
    """The process, until a worker ends, which they do with the engine."""
    parent = Parent(die_with_it=False)
    arguments = parent.receive()
    if arguments is None:
        return
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        executor = _joining(pickle.loads(arguments))
    except Exception as error:
        parent.send((str(error) or type(error).__name__).encode())
        raise
    parent.send(_JOINED)
    executor.start_worker_monitor(inline=True)


def _joining(arguments: dict[str, Any]) -> Any:
    """Return the executor of this machine's workers, once they have joined.

    Its arguments are the first machine's: vLLM derives the size of a step, and so of all workers' buffers, from who
    asks.
    """
    vllm = compat.load()
    config = vllm.AsyncEngineArgs(**arguments).create_engine_config(vllm.server_context, headless=True)
    return compat.multiproc_executor()(config, monitor_workers=False)


def _end_with(parent: Parent) -> None:
    """All of the group, when the parent is gone, however that came."""
    parent.receive()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
