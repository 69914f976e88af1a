"""One container of the image, as `podman run` starts it."""

from __future__ import annotations

import queue
import re
import subprocess
import threading
import time
import uuid
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import httpx

from tests.image.images import podman, run_options
from tests.support.live import chat_body

_READY_SECONDS = 120.0
_STOP_SECONDS = 60.0


class Container:
    """Use as a context manager: at its end the container is gone. options: of `podman run`."""

    def __init__(self, image: str, *command: str, options: Sequence[str] = ()) -> None:
        self.name = f"lmi-test-{uuid.uuid4().hex[:12]}"
        self.url = ""
        self._lines: list[str] = []
        self._arrivals: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._command = podman("run", "--rm", "--name", self.name, *run_options(options), image, *command)

    def __enter__(self) -> Container:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            subprocess.run(podman("rm", "--force", "--time=5", self.name), capture_output=True, check=False)
            self._process.wait(_STOP_SECONDS)

    @property
    def log(self) -> str:
        return "".join(self._lines)

    def ready(self) -> None:
        """Wait until the model can answer; `url` is then where, on this machine's loopback, and `http` asks there."""
        address = self.wait_for(r"listening on \S+?:(\d+)$")
        self.url = f"http://127.0.0.1:{address}"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.wait_for("ready after")

    def wait_for(self, pattern: str, seconds: float = _READY_SECONDS) -> str:
        """The first group of the first line, from now on, that matches."""
        end = time.monotonic() + seconds
        while True:
            try:
                line = self._arrivals.get(timeout=max(0.01, end - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"{pattern!r} did not come:\n{self.log}") from None
            if line is None:
                raise AssertionError(f"the container ended before {pattern!r}:\n{self.log}")
            if match := re.search(pattern, line):
                return match[1] if match.groups() else match[0]

    def chat(self, *content: Any, **fields: Any) -> httpx.Response:
        """As LiveServer's."""
        return self.http.post("/v1/chat/completions", json=chat_body(*content, **fields))

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in it."""
        return subprocess.run(
            podman("exec", self.name, *command), capture_output=True, text=True, timeout=60, check=False
        )

    def signal(self, name: str) -> None:
        """Send a signal to its process 1, as `docker stop` does."""
        subprocess.run(podman("kill", "--signal", name, self.name), capture_output=True, timeout=60, check=True)

    def wait(self) -> int:
        """Its exit status, once it has ended."""
        return self._process.wait(_STOP_SECONDS)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line)
            self._arrivals.put(line)
        self._arrivals.put(None)


def run(image: str, *command: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """What a container printed that ends by itself, and its exit status."""
    return subprocess.run(
        podman("run", "--rm", *run_options(options), image, *command),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
