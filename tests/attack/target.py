"""The server that is attacked: the model in the repository behind `lmi serve`, with a probe on its event loop and an
eye on the memory, the processor time and the log of all of its processes."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from PIL import Image, ImageDraw

from tests.attack.probe import Readings, Stalls
from tests.support.live import LiveServer, chat_body
from tests.support.pace import too_long
from tests.support.shapes import SHAPES

PROBE = Path(__file__).parent / "probe.py"
MB = 2**20
KEY = "attack-key-5f1c2b"
"""The server's key. It must turn up in no log, reply or child process."""

EVIL, GOOD = "127.0.0.2", "127.0.0.3"
"""Loopback addresses that the server may fetch images from; all others are private to it."""

OPTIONS = (
    "log_format=json",
    'limit_mm_per_prompt={"image": 8}',
    "max_image_pixels=1000000",
    "image_memory_mb=16",
    "image_cache_mb=8",
    "max_rolling_batch_size=16",
    "job_queue_size=48",
    "request_memory_mb=192",
    f'image_fetch_allow_private=["{EVIL}", "{GOOD}"]',
    "image_fetch_timeout=20",
    "predict_timeout=60",
    "max_model_len=1024",
    "sessions_expiration=600",
)
"""Limits so low that a few requests reach them: what decoded images may take fits into the 50 MB of the bound."""

_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""Large blocks go back to the system at once, so that what one attack freed does not hide what the next one takes."""

SLACK = 50 * MB
FACTOR = 3
STALL_SECONDS = 0.05


class Bound(AssertionError):
    """A bound was broken: what, by how much."""


@dataclass
class Process:
    """One process of the server's tree. base: bytes resident when the attack began (or, for one that began later,
    what others of its kind take). peak: since then."""

    kind: str
    base: int
    peak: int
    cpu: float = 0.0

    @property
    def growth(self) -> int:
        return self.peak - self.base


@dataclass
class Measured:
    """What one attack did to the server. sent: bytes of its requests. cpu: seconds, of all processes together."""

    sent: int = 0
    stalls: Stalls | None = None
    processes: dict[tuple[int, float], Process] = field(default_factory=dict)
    cpu: float = 0.0

    @property
    def worst(self) -> Process:
        return max(self.processes.values(), key=lambda process: process.growth)

    def within(self, *, allowed: int | None = None, stalls: bool = True) -> None:
        """Raises Bound. allowed: bytes that a process may grow by, instead of 3 times what was sent and 50 MB."""
        most = FACTOR * self.sent + SLACK if allowed is None else allowed
        broken = [
            f"{process.kind} grew by {process.growth / MB:.0f} MB; allowed for {self.sent / MB:.1f} MB sent: "
            f"{most / MB:.0f} MB"
            for process in self.processes.values()
            if process.growth > most
        ]
        if stalls and self.stalls is not None and too_long(self.stalls.longest, STALL_SECONDS):
            broken.append(f"the event loop stalled for {self.stalls}")
        if broken:
            raise Bound("; ".join(broken))

    def __str__(self) -> str:
        worst = self.worst
        return (
            f"{self.sent / MB:.1f} MB sent; {worst.kind} grew by {worst.growth / MB:.1f} MB; "
            f"stall {self.stalls}; {self.cpu:.1f} s of processor time"
        )


class Target(LiveServer):
    """Use as a context manager, like its base."""

    def __init__(self, folder: Path, *options: str, **environ: str) -> None:
        """folder: for the probe's file; must exist. options: before those above."""
        path = folder / f"probe-{time.monotonic_ns()}"
        self.probe = Readings(path)
        self._typical: dict[str, int] = {}
        named = {option.partition("=")[0] for option in options}
        usual = [option for option in OPTIONS if option.partition("=")[0] not in named]
        super().__init__(
            SHAPES,
            *usual,
            *options,
            program=(str(PROBE), str(path)),
            SERVING_API_KEY=KEY,
            **_MEMORY,
            **environ,
        )
        self.http.headers["authorization"] = f"Bearer {KEY}"
        self.address = (self.http.base_url.host, self.http.base_url.port or 80)

    def __enter__(self) -> Target:
        super().__enter__()
        try:
            self.warm_up()
        except BaseException:
            self.kill()
            raise
        return self

    def warm_up(self) -> None:
        """One request of each kind, so that what is loaded or started once is not charged to an attack."""
        for form in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"):
            self.question(form)
        schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
        self.chat("Hello", response_format=schema)
        self.chat("Hello", stream=True)
        self.http.post("/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 2})
        self.http.post("/invocations", json={"inputs": "a", "parameters": {"max_new_tokens": 2}})
        # Of each length of a prompt and its answer, torch keeps kernels.
        self.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 600, "ignore_eos": True})
        self.http.get("/metrics")
        self.http.get("/openapi.json")
        for process in self.tree():
            with contextlib.suppress(psutil.Error, OSError):
                kind = kind_of(process)
                self._typical[kind] = max(self._typical.get(kind, 0), process.memory_info().rss)

    def question(self, form: str = "PNG", timeout: float = 60.0) -> None:
        """A normal question about an image. Raises AssertionError when it is not answered rightly.

        The image is new each time, so that the answer comes from its pixels and from no cache.
        """
        color = ("red", "green", "blue")[next(_NUMBERS) % 3]
        image = Image.new("RGB", (320, 240), "white")
        ImageDraw.Draw(image).ellipse((90, 50, 230, 190), fill=color)
        image.putpixel((0, 0), (255, 255, 255 - next(_NUMBERS) % 16))
        body = chat_body(data_url(encoded(image, form)), "What is this an image of?", max_tokens=64)
        reply = self.http.post("/v1/chat/completions", json=body, timeout=timeout)
        assert reply.status_code == 200, reply.text[:500]
        said = reply.json()["choices"][0]["message"]["content"]
        assert said == f"a {color} circle", said

    def tree(self) -> list[psutil.Process]:
        """The front and all of its children."""
        front = psutil.Process(self.process.pid)
        return [front, *front.children(recursive=True)]

    @contextlib.contextmanager
    def attack(self) -> Iterator[Measured]:
        """Measure what happens within; set `sent` there. Afterwards everything must be as before: see `settle`."""
        measured = Measured()
        watch = _Watch(self, measured)
        self.probe.reset()
        watch.start()
        try:
            yield measured
            measured.stalls = self.probe.read()
        finally:
            watch.stop()

    def settle(self, seconds: float = 60.0) -> None:
        """Wait until nothing runs, and ask a question. Raises AssertionError when something is left or lost."""
        end = time.monotonic() + seconds
        while True:
            left = self.left_over()
            if not left:
                break
            assert time.monotonic() < end, f"left over after the attack: {left}"
            time.sleep(0.02)
        self.question()

    def left_over(self, timeout: float = 60.0) -> dict[str, float]:
        """What requests that are gone still hold, by the server's own metrics."""
        reply = self.http.get("/metrics", timeout=timeout)
        values = dict(line.rsplit(" ", 1) for line in reply.text.splitlines() if line and not line.startswith("#"))
        names = (
            "lmi_requests_in_flight",
            "lmi_requests_running",
            "lmi_requests_waiting",
            "lmi_kv_cache_usage_ratio",
        )
        return {name: float(values[name]) for name in names if float(values[name]) != 0}

    def logged(self) -> list[dict[str, Any]]:
        """The log so far, a JSON object a line. Raises AssertionError for a line that is something else."""
        lines = []
        for line in self.log.splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                raise AssertionError(f"a line of the log is not JSON: {line[:300]!r}") from None
        return lines


_NUMBERS = iter(range(10**9))


class _Watch:
    """Keeps the peak of each process's resident memory, which the kernel counts (VmHWM), so that none is missed
    between two looks, but that of a process which lives for less than one interval."""

    INTERVAL = 0.02

    def __init__(self, target: Target, measured: Measured) -> None:
        self._target = target
        self._measured = measured
        self._started: dict[tuple[int, float], float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._look(first=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(psutil.Error):
            self._look()
        self._measured.cpu = sum(process.cpu for process in self._measured.processes.values())

    def _run(self) -> None:
        while not self._ended.wait(self.INTERVAL):
            with contextlib.suppress(psutil.Error):
                self._look()

    def _look(self, first: bool = False) -> None:
        for one in self._target.tree():
            with contextlib.suppress(psutil.Error, OSError, ProcessLookupError):
                key = (one.pid, one.create_time())
                known = self._measured.processes.get(key)
                times = one.cpu_times()
                if known is None:
                    kind = kind_of(one)
                    if first:
                        Path(f"/proc/{one.pid}/clear_refs").write_text("5")
                        base = one.memory_info().rss
                        self._started[key] = times.user + times.system
                    else:
                        base = self._target._typical.get(kind, 100 * MB)
                    known = self._measured.processes[key] = Process(kind, base, base)
                known.peak = max(known.peak, peak_of(one.pid))
                known.cpu = times.user + times.system - self._started.get(key, 0.0)


def kind_of(process: psutil.Process) -> str:
    """`front`, or the module that a child runs."""
    command = process.cmdline()
    if any(part.endswith("probe.py") for part in command):
        return "front"
    return command[command.index("-m") + 1] if "-m" in command[:-1] else process.name()


def peak_of(pid: int) -> int:
    """Bytes, since the last reset."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def encoded(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()
