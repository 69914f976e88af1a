"""Start a server, wait until it answers, watch its processes, and leave none of them behind."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psutil

HOST = "127.0.0.1"
MB = 1_000_000
INTERVAL = 0.5  # seconds between samples


@dataclass
class Sample:
    """A sample of a server's processes; resident memory in bytes, in which shared pages count twice."""

    when: float  # seconds on time.perf_counter's clock
    cpu: float  # seconds of processor time so far
    front: int  # resident memory of the process that was started: the HTTP server
    workers: int  # and of all its children


@dataclass
class Server:
    """A server that answers as ``model``; it has no pid and no samples if it was not started here.

    Attributes:
        path: What precedes ``/v1`` in its URLs.
        key: The API key that requests carry, if any.
    """

    name: str
    host: str
    port: int
    model: str
    pid: int = 0
    samples: list[Sample] = field(default_factory=list)
    path: str = ""
    tls: bool = False
    key: str = field(default="", repr=False)

    @property
    def netloc(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def our_command(folder: Path, port: int, options: Sequence[str] = (), python: Path | None = None) -> list[str]:
    """Return the command that serves a folder with this project.

    Our default is one image per prompt; the loads contain several.

    Args:
        folder: The model.
        port: Port to listen on.
        options: ``key=value`` each.
        python: Interpreter of an environment with this project; None for this one.
    """
    if not any("limit_mm_per_prompt" in option for option in options):
        options = [*options, 'limit_mm_per_prompt={"image": 8}']
    chosen = [word for option in options for word in ("--option", option)]
    command = [str(python or sys.executable), "-P", "-m", "container", "serve"]
    return [*command, str(folder), "--port", str(port), *chosen]


def vllm_command(python: Path, folder: Path, port: int, arguments: Sequence[str] = ()) -> list[str]:
    """Return the command that serves a folder with the vLLM of another environment, at its own defaults."""
    module = "vllm.entrypoints.openai.api_server"
    where = ["--model", str(folder), "--host", HOST, "--port", str(port)]
    return [str(python), "-m", module, *where, *arguments]


VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; unset, it would claim nearly all of the machine's memory
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def started(
    name: str,
    command: Sequence[str],
    port: int,
    log: Path,
    environment: dict[str, str] | None = None,
    patience: float = 300.0,
    cores: Collection[int] = (),
) -> Iterator[Server]:
    """Run a server until the block ends; raises RuntimeError with its last words if it never answers.

    cores: the only ones that it may use; all of this process's where there are none.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        if cores:
            os.sched_setaffinity(process.pid, cores)
        watch = _Watch(process.pid)
        try:
            model = _wait(process, port, log, patience)
            yield Server(name, HOST, port, model, process.pid, watch.samples)
        finally:
            watch.stop()
            _end(process, watch.seen)


class Unusable(Exception):
    """A server that cannot be measured; says why."""


def running(url: str, model: str = "", key: str = "") -> Server:
    """Return a server that somebody else started.

    Args:
        url: ``http://host:port`` or ``https://host/path``, with or without ``/v1``.
        model: The model to ask; "" for the first that the server lists.
        key: API key; "" for none.

    Raises:
        Unusable: If the URL is not such a URL, or the server does not list its models.
    """
    parts = urlsplit(url)
    try:
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (KeyError, ValueError):
        raise Unusable(f"{url} is not a URL such as http://127.0.0.1:8080") from None
    if not parts.hostname or parts.username or parts.password or parts.query or parts.fragment:
        raise Unusable("a URL has the form http://host:port/path, without a user, a password or a query")
    path = parts.path.rstrip("/").removesuffix("/v1")
    if not (path + key).isascii() or not (path + key).isprintable() or " " in path + key:
        raise Unusable("the URL's path and the API key must be printable ASCII without spaces")
    target = Server(parts.netloc + path, parts.hostname, port, model, path=path, tls=parts.scheme == "https", key=key)
    if not model:
        target.model = _listed_model(target)
    return target


def _listed_model(target: Server) -> str:
    make = http.client.HTTPSConnection if target.tls else http.client.HTTPConnection
    connection = make(target.host, target.port, timeout=30)
    try:
        headers = {"authorization": f"Bearer {target.key}"} if target.key else {}
        connection.request("GET", f"{target.path}/v1/models", headers=headers)
        reply = connection.getresponse()
        content = reply.read(1 << 20)
    except (OSError, http.client.HTTPException) as error:
        raise Unusable(f"{target.name} does not answer GET /v1/models: {error}") from error
    finally:
        connection.close()
    if reply.status in (401, 403):
        raise Unusable(f"{target.name} refuses the API key, or wants one (status {reply.status}): --key-variable")
    if reply.status != 200:
        raise Unusable(f"{target.name} answers GET /v1/models with status {reply.status}; name a model with --model")
    try:
        return str(json.loads(content)["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise Unusable(f"{target.name} does not list a model in GET /v1/models; name one with --model") from None


def leave_cores(cores: Collection[int]) -> None:
    """Keep this process, which sends the load, off the servers' cores if there are others."""
    if others := os.sched_getaffinity(0) - set(cores):
        os.sched_setaffinity(0, others)


def interrupt_on_termination() -> None:
    """Let SIGTERM end this program as Ctrl-C does, so that it still stops the servers it started."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def _wait(process: subprocess.Popen[bytes], port: int, log: Path, patience: float) -> str:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server exited with {process.returncode}; {log} ends:\n{_tail(log)}")
        health = _get(HOST, port, "/ping")
        if health is not None and b"replicas" not in health:  # "ready: 1 of 2 replicas" until all of ours are
            model = _model(HOST, port)
            if model is not None:
                return model
        time.sleep(0.25)
    raise RuntimeError(f"the server did not answer within {patience:g} s; {log} ends:\n{_tail(log)}")


def _model(host: str, port: int) -> str | None:
    body = _get(host, port, "/v1/models")
    return None if body is None else str(json.loads(body)["data"][0]["id"])


def _get(host: str, port: int, path: str) -> bytes | None:
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", path)
        reply = connection.getresponse()
        return reply.read() if reply.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:])


def _end(process: subprocess.Popen[bytes], seen: set[psutil.Process]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(list(seen), timeout=5)
    for child in alive:  # psutil checks that the id still means the same process
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(alive, timeout=5)


class _Watch:
    """Samples a process and its children, in a thread."""

    def __init__(self, pid: int) -> None:
        self.samples: list[Sample] = []
        self.seen: set[psutil.Process] = set()
        self._front = psutil.Process(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            with contextlib.suppress(psutil.NoSuchProcess):
                self._sample()

    def _sample(self) -> None:
        children = self._front.children(recursive=True)
        self.seen.update(children)
        cpu, front = _usage(self._front)
        workers = 0
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                seconds, resident = _usage(child)
                cpu, workers = cpu + seconds, workers + resident
        self.samples.append(Sample(time.perf_counter(), cpu, front, workers))


def _usage(process: psutil.Process) -> tuple[float, int]:
    with process.oneshot():
        times = process.cpu_times()
        return times.user + times.system, process.memory_info().rss
