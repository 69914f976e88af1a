"""The scripted server with a probe in it: how much CPU time the process takes between two ticks of its event loop.

A tick that a long step holds up, on the event loop or in a thread that keeps the interpreter to itself, shows as the
CPU time of that step; a machine that is busy with other processes does not. The message `{"stalls": true}` is answered
with the longest since the last such message, in milliseconds; `{"frozen": true}` with the number of objects that the
garbage collector does not look at.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from pathlib import Path
from typing import Any

from handlers.deltas import Delta
from handlers.request import GenerationRequest
from tests.support.scripted import Step
from tests.support.scripted_server import ObedientBackend, ordered


class ProbedBackend(ObedientBackend):
    def __init__(self) -> None:
        super().__init__()
        self._longest = 0.0

    async def load(self) -> None:
        self._ticks = asyncio.create_task(self._tick())

    def _obey(self, request: GenerationRequest) -> Any:
        order = ordered(request)
        if "frozen" in order:
            told = gc.get_freeze_count()
        elif "stalls" in order:
            told, self._longest = round(self._longest * 1000), 0.0
        else:
            return super()._obey(request)
        steps: list[Step] = [Delta(0, [1], str(told), finish_reason="stop")]
        return steps

    async def _tick(self) -> None:
        last = time.process_time()
        while True:
            await asyncio.sleep(0.001)
            now = time.process_time()
            self._longest, last = max(self._longest, now - last), now


if __name__ == "__main__":
    from container.build import Served
    from container.cli import main

    def _build(configuration: object, path: Path) -> Served:
        backend: Any = ProbedBackend()

        async def start() -> Any:
            await backend.load()
            return backend

        return Served.by(start, lambda pipeline: pipeline)

    sys.exit(main(["serve", *sys.argv[2:]], _build))
