"""The real server, in a process of its own, around a backend that does what the prompt says.

The user's message is JSON: `tokens` to say, `pause` seconds before each, `fail` to raise after them, `say` for the
text of each, to which `digests` adds those of the images; the last one waits until somebody writes into the FIFO
`until`. The environment says how loading goes: `SCRIPTED_LOAD` is seconds to take, `halfway` to stay there, `until` and
such a FIFO, or the text of an error; `SCRIPTED_ADAPTERS` is how many adapters have a place.
Tests use `ServerProcess`; the process itself runs this file.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from handlers import progress
from handlers.backends.adapters import AdapterStore
from handlers.backends.base import BackendStats, Health
from handlers.deltas import Delta
from handlers.errors import EngineFailed, Unavailable
from handlers.request import ChatPrompt, GenerationRequest, TextPart
from tests.support.scripted import ScriptedBackend, Step
from tests.support.scripted_adapters import scripted_adapters
from tests.support.shapes import ROOT


class ObedientBackend(ScriptedBackend):
    """`{"sick": true}` as a prompt makes it unhealthy until `{"sick": false}`."""

    def __init__(self, adapters: AdapterStore | None = None) -> None:
        super().__init__(self._obey)  # type: ignore[arg-type]
        self.adapters = adapters
        self.sick = False

    def _obey(self, request: GenerationRequest) -> Iterator[Step]:
        order = ordered(request)
        self.sick = order.get("sick", self.sick)
        if "digests" in order:
            loaded = [part.loaded for part in request.images()]
            order["say"] += "".join(f" {image.digest.hex()}" for image in loaded if image is not None)
        return _steps(order)

    async def load(self) -> None:
        plan = os.environ.get("SCRIPTED_LOAD", "0")
        if re.fullmatch(r"[\d.]+", plan):
            await asyncio.sleep(float(plan))
        elif plan == "halfway":
            loading = progress.current()
            loading.begin("", 2 << 30)
            loading.done = 1 << 30
            await asyncio.Event().wait()
        elif plan.startswith("until "):
            await opened(plan.removeprefix("until "))
        elif plan == "crash":
            raise RuntimeError("secret detail")
        else:
            raise Unavailable(plan)

    def health(self) -> Health:
        return Health(not self.sick, "the engine is being restarted" if self.sick else "ready")

    def stats(self) -> BackendStats:
        return BackendStats(running=self.running, replicas=1, replicas_ready=int(not self.sick))


async def opened(fifo: str) -> None:
    """Return when somebody has written into it."""
    await asyncio.to_thread(Path(fifo).read_bytes)


def _steps(order: dict[str, Any]) -> Iterator[Step]:
    said = order.get("say")  # A list holds the text of each token.
    for number in range(count := len(said) if isinstance(said, list) else order.get("tokens", 1)):
        last = number == count - 1 and "fail" not in order
        if "pause" in order:
            yield order["pause"]
        if last and "until" in order:
            yield partial(opened, order["until"])
        text = said[number] if isinstance(said, list) else f"t{number} " if said is None else said
        yield Delta(0, [number], text, finish_reason="stop" if last else None)
    if "fail" in order:
        known = {"known": EngineFailed("the engine died while it held this request")}
        yield known.get(order["fail"], RuntimeError(order["fail"]))


def ordered(request: GenerationRequest) -> dict[str, Any]:
    prompt = request.prompt
    parts = prompt.messages[-1].parts if isinstance(prompt, ChatPrompt) else prompt.parts
    text = "".join(part.text for part in parts if isinstance(part, TextPart))
    try:
        order = json.loads(text)
    except ValueError:
        return {}
    return order if isinstance(order, dict) else {}


class ServerProcess:
    """The server as a child. `lines` grows as it writes its log."""

    def __init__(
        self,
        model: Path | str | None,
        *arguments: str,
        command: str = "lmi",
        port: int | None = 0,
        module: str = "tests.support.scripted_server",
        **environ: str,
    ) -> None:
        """model: a directory is made where it is not there. port: of `--port`. None: the environment says.

        module: runs the server.
        """
        if isinstance(model, Path):
            model.mkdir(exist_ok=True)
            (model / "config.json").write_text("{}")
        chosen = (*(() if model is None else (str(model),)), *(() if port is None else ("--port", str(port))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, command, *chosen, *arguments],
            cwd=ROOT,
            env={**os.environ, **environ, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._news: queue.Queue[None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port = 0
        self.host = ""

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip("\n"))
            self._news.put(None)

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """The first log line that matches, waiting for it."""
        seen = 0
        while True:
            for line in self.lines[seen:]:
                seen += 1
                if re.search(pattern, line):
                    return line
            try:
                self._news.get(timeout=seconds)
            except queue.Empty:
                raise AssertionError(f"no line like {pattern!r} in:\n{self.log}") from None

    def listening(self) -> ServerProcess:
        found = re.search(r"listening on ([\d.]+):(\d+)", self.wait_for("listening on|problem"))
        assert found is not None, self.log
        self.host, self.port = found[1], int(found[2])
        return self

    def ready(self) -> ServerProcess:
        self.listening().wait_for(r"ready after")
        return self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def signal(self, number: int = signal.SIGTERM) -> None:
        self._process.send_signal(number)

    def wait(self, seconds: float = 60) -> int:
        """The exit status; the log is complete afterwards."""
        status = self._process.wait(seconds)
        self._reader.join()
        return status


if __name__ == "__main__":
    from container.build import Served
    from container.cli import main, serve_main

    def _build(configuration: object, path: Path) -> Served:
        places = os.environ.get("SCRIPTED_ADAPTERS")
        backend: Any = ObedientBackend(scripted_adapters(path, int(places))[0] if places else None)

        async def start() -> Any:
            await backend.load()
            return backend

        return Served.by(start, lambda pipeline: pipeline)

    command, *rest = sys.argv[1:]
    sys.exit(serve_main(rest, _build) if command == "serve" else main(["serve", *rest], _build))
