"""One machine's workers of an engine that is on another machine: a process of its own that starts them and ends them.

It leads a group of processes, which is how none is left behind: workers that wait for the other machine do not notice
that their parent is gone.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

from handlers.backends.vllm import compat
from processes.environment import child_environment

_JOINED = "joined"


class Workers:
    """arguments: those of `AsyncEngineArgs`."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._told, telling = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(telling)],
                stdin=subprocess.PIPE,
                pass_fds=[telling],
                env=child_environment("vllm"),
                start_new_session=True,
            )
        finally:
            os.close(telling)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(pickle.dumps(arguments))
            self._process.stdin.flush()

    def ended(self) -> None:
        """Wait until they have ended."""
        self._process.wait()

    def joined(self) -> str | None:
        """Wait until they are part of an engine, which the first machine starts, or why they are not. Once."""
        with open(self._told, encoding="utf-8", errors="replace") as told:
            reason = told.read()
        return None if reason == _JOINED else reason or "their process ended"

    def end(self) -> None:
        """Safe to call twice."""
        if self._process.stdin is None or self._process.stdin.closed:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with suppress(BrokenPipeError):
            self._process.stdin.close()


def _run(telling: int) -> None:
    """The process, until a worker ends, which they do with the engine."""
    os.set_inheritable(telling, False)
    arguments = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(telling, "w", encoding="utf-8", errors="replace") as tell:
        try:
            executor = _joining(arguments)
        except Exception as error:
            tell.write(str(error) or type(error).__name__)
            raise
        tell.write(_JOINED)
    executor.start_worker_monitor(inline=True)


def _joining(arguments: dict[str, Any]) -> Any:
    """The executor of this machine's workers, once they have joined. It takes the arguments as the first machine does:
    the size of a step, of which all workers' buffers are, depends on who asks.
    """
    vllm = compat.load()
    config = vllm.AsyncEngineArgs(**arguments).create_engine_config(vllm.server_context, headless=True)
    return compat.multiproc_executor()(config, monitor_workers=False)


def _end_with_parent() -> None:
    """Its end of our standard input is closed when it is gone, however that came."""
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    _run(int(sys.argv[1]))
