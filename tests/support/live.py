"""The real server as a user starts it: `lmi serve`, in a process of its own, on a free loopback port."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import psutil
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.support.backend import ENGINE_PROCESS, OPTIONS, READY_SECONDS, STOP_SECONDS


class LiveServer:
    """Use as a context manager; entering returns once the model can answer (or at once with ready=False)."""

    def __init__(
        self,
        model: Path | str,
        *options: str,
        ready: bool = True,
        command: str = "serve",
        flags: Sequence[str] = (),
        program: Sequence[str] = ("-m", "container.cli"),
        **environ: str,
    ) -> None:
        """program: what Python runs as `lmi`."""
        named = {option.partition("=")[0] for option in options}
        usual = [option for option in OPTIONS if option.partition("=")[0] not in named]
        arguments = [part for option in (*usual, *options) for part in ("--option", option)]
        self._wait_ready = ready
        self.process = subprocess.Popen(
            [
                sys.executable, "-P", *program, command, str(model), "--port", "0", *arguments, *flags,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **environ},
        )  # fmt: skip
        self._lines: list[str] = []
        self._arrivals: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = "http://" + self.wait_for(r"listening on ([^\s\"]+)")
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def __enter__(self) -> LiveServer:
        try:
            if self._wait_ready:
                self.wait_for(r"ready after")
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def log(self) -> str:
        return "".join(self._lines)

    @property
    def engines(self) -> list[psutil.Process]:
        """The engine processes, one per replica."""
        return children_running(self.process.pid, ENGINE_PROCESS)

    def wait_for(self, pattern: str, seconds: float = READY_SECONDS) -> str:
        """The first group of the first log line, from now on, that matches."""
        end = time.monotonic() + seconds
        while True:
            try:
                line = self._arrivals.get(timeout=max(0.01, end - time.monotonic()))
            except queue.Empty:
                self.kill()
                raise AssertionError(f"{pattern!r} did not come:\n{self.log}") from None
            if line is None:
                raise AssertionError(f"the server ended before {pattern!r}:\n{self.log}")
            match = re.search(pattern, line)
            if match:
                return match[1] if match.groups() else match[0]

    def chat(self, *content: str | Image.Image, **fields: Any) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json=chat_body(*content, **fields))

    def metrics(self) -> dict[str, float]:
        """Every sample without labels, by name."""
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        return {s.name: s.value for family in families for s in family.samples if not s.labels}

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """The exit status; the log is complete afterwards."""
        status = self.process.wait(seconds)
        self._reader.join(seconds)
        return status

    def kill(self) -> None:
        """End it, its engines included, whatever its state."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line)
            self._arrivals.put(line)
        self._arrivals.put(None)


def data_url(image: Image.Image, form: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def message(*content: str | Image.Image, role: str = "user") -> dict[str, Any]:
    """A turn: strings starting with http(s) and images are image parts, other strings are text."""
    parts: list[dict[str, Any]] = []
    for item in content:
        if isinstance(item, Image.Image):
            item = data_url(item)
        if item.startswith(("data:", "http:", "https:", "file:")):
            parts.append({"type": "image_url", "image_url": {"url": item}})
        else:
            parts.append({"type": "text", "text": item})
    return {"role": role, "content": parts}


def chat_body(*content: str | Image.Image, **fields: Any) -> dict[str, Any]:
    return {"messages": [message(*content)], "temperature": 0, "max_tokens": 16, **fields}


def asked(server: LiveServer, body: dict[str, Any]) -> socket.socket:
    """The connection of a client that has asked, reads nothing, and leaves when it is closed."""
    connection = socket.create_connection(server.url.removeprefix("http://").split(":"))
    payload = httpx.Request("POST", server.url, json=body).content
    head = f"POST /invocations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(payload)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + payload)
    return connection


def running(server: LiveServer) -> float:
    metrics = server.metrics()
    return metrics["lmi_requests_running"] + metrics["lmi_requests_in_flight"]


def until_idle(server: LiveServer, seconds: float) -> None:
    end = time.monotonic() + seconds
    while running(server) > 0:
        assert time.monotonic() < end, f"still running after {seconds} s"


def children_running(pid: int, words: str, recursive: bool = False) -> list[psutil.Process]:
    """The children of a process whose command line has the words; some may end while they are looked at."""
    found = []
    for child in psutil.Process(pid).children(recursive=recursive):
        with contextlib.suppress(psutil.NoSuchProcess):
            if words in " ".join(child.cmdline()):
                found.append(child)
    return found


def free_port() -> int:
    """A port that nobody is given by chance before it is bound: not one of those that the kernel gives out."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("0.0.0.0", port))
            return port
