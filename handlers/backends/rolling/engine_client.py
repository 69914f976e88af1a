"""One engine process as the front end sees it: started, asked about a model, given requests, watched and ended."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from engine.config import EngineConfig
from engine.errors import EngineDead, EngineStopped, ModelLoadError, RequestRejected
from engine.messages import (
    Abort,
    Add,
    Answer,
    Ask,
    Cores,
    FromEngine,
    Loaded,
    LoadFailed,
    Opening,
    Output,
    Ping,
    Pong,
    Ready,
    Stats,
    StepDone,
    ToEngine,
)
from handlers import progress
from handlers.backends.weights_read import WARM_UP, weights_told
from processes.child import Child, Connection, Log
from processes.inside import MAX_FRAME_BYTES

logger = logging.getLogger(__name__)
engine_log = logging.getLogger("engine.process")
"""The log of what the engine processes print."""

SHUTDOWN_SECONDS = 3.0
"""How long an engine that was asked to stop may take before it is killed."""

PING_SECONDS = 2.0
"""The pause between two checks whether an engine's loop is still running."""

STUCK_SECONDS = 120.0
"""An engine whose loop has not turned for this long is killed and restarted. A step is one turn, so this must be
longer than the longest step."""


class OutputStream:
    """The outputs of one request, in order. One task reads it; the engine's client writes it.

    Attributes:
        client: Where the request went.
        ids: Those that this client gave it, one for each choice.
    """

    __slots__ = ("_error", "_items", "_waiter", "client", "ids")

    def __init__(self, client: EngineClient, ids: range) -> None:
        self.client = client
        self.ids = ids
        self._items: deque[Output] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._error: EngineDead | None = None

    def put(self, output: Output) -> None:
        self._items.append(output)
        self._wake()

    def fail(self, error: EngineDead) -> None:
        self._error = error
        self._wake()

    async def get(self) -> list[Output]:
        """Return everything that has arrived since the last call, at least one output. Raises EngineDead."""
        while not self._items:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        items = list(self._items)
        self._items.clear()
        return items

    def abort(self, ids: Sequence[int] | None = None) -> None:
        """Abort some of the choices, or all."""
        self.client.abort(self.ids if ids is None else ids)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineProcess:
    """An engine process. It imports what it needs, which takes seconds, and answers questions until it loads a model.

    Attributes:
        connection: To the process; when it is closed, the process ends.
    """

    def __init__(self, child: Child, connection: Connection) -> None:
        """Take over a process; use `spawn` to start one."""
        self.connection = connection
        self._child = child
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)

    @classmethod
    async def spawn(cls) -> EngineProcess:
        """Start a process. Raises OSError, and leaves nothing running then."""
        child = await Child.start("engine.process", "engine", Log(engine_log))
        try:
            return cls(child, await child.connect())
        except BaseException:
            await child.stop(0)
            raise

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def returncode(self) -> int | None:
        """The process's exit code, negative for a signal; None while it runs."""
        return self._child.returncode

    async def ask(self, function: str, question: bytes) -> bytes:
        """Return what the function, "module:name", returns in the process.

        Raises:
            EngineDead: The process ended before it answered.
        """
        self.send(Ask(function, question))
        message = await self.receive()
        if not isinstance(message, Answer):
            raise EngineDead("the engine process ended while it was asked about the model")
        return message.answer

    async def load(self, config: EngineConfig, stuck_seconds: float = STUCK_SECONDS) -> EngineClient:
        """Load the model; returns when it has answered a test request. Afterwards only the client uses this object.

        If this fails, nothing is left running.

        Raises:
            ModelLoadError: The model cannot be loaded; the message contains the engine's reason.
            EngineDead: The process ended without a reason.
        """
        try:
            self.send(config)
            async with weights_told(Path(config.model_path), lambda: (self.pid,)):
                first = await self.receive()
            if isinstance(first, Loaded):
                progress.current().begin(WARM_UP)
                first = await self.receive()
            if isinstance(first, Ready):
                return EngineClient(self, first, stuck_seconds)
            if isinstance(first, LoadFailed):
                raise ModelLoadError(first.message)
            raise EngineDead("the engine process ended while it was loading the model; its log lines say why")
        except BaseException:
            await self.stop()
            raise

    def send(self, message: Opening | ToEngine) -> None:
        """Send a message without waiting.

        Raises:
            EngineDead: The process is going away.
            RequestRejected: The message cannot be sent.
        """
        try:
            body = self._encoder.encode(message)
        except (ValueError, OverflowError, TypeError) as error:
            raise RequestRejected("a number in the request is out of range") from error
        if len(body) > MAX_FRAME_BYTES:
            raise RequestRejected("the request's images are too large together")
        try:
            self.connection.send(body)
        except OSError as error:
            raise EngineDead("the engine process is going away") from error

    async def receive(self) -> FromEngine | None:
        """Return the next message; None once the process has ended. Raises ValueError for what is none."""
        frame = await self.connection.receive()
        return None if frame is None else self._decoder.decode(frame)

    def kill(self) -> None:
        """End the process at once."""
        self._child.kill()

    async def stop(self, seconds: float = 0.0) -> int:
        """Ask the process to end, kill it after so many seconds, and return its exit code. Safe to call twice."""
        return await self._child.stop(seconds)


class EngineClient:
    """An engine process with its model, until it dies (see `processes.supervisor.Supervised`).

    Attributes:
        process: The process.
        ready: What it reported when it had loaded the model.
        stats: The last values that it reported; of a process that has died, only the counters.
        served: Whether any request has received a token from this process.
        load_changed: Called when the process gets its first request, and when it has none any more.
    """

    def __init__(self, process: EngineProcess, ready: Ready, stuck_seconds: float) -> None:
        """Take over a process; use `EngineProcess.load`."""
        self.process = process
        self.ready = ready
        self.stats = Stats()
        self.served = False
        self.load_changed: Callable[[], None] = lambda: None
        self._stuck_seconds = stuck_seconds
        self._streams: dict[int, OutputStream] = {}
        self._asked: float | None = None
        self._pings = itertools.count()
        self._pongs: dict[int, asyncio.Future[None]] = {}
        self._next_id = 0
        self._died = asyncio.Event()
        self._receiving = asyncio.create_task(self._receive(), name="engine-receive")

    @property
    def alive(self) -> bool:
        return not self._died.is_set()

    @property
    def num_requests(self) -> int:
        return len(self._streams)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def silent_for(self) -> float:
        """Seconds for which the answer to a ping has been outstanding; 0 when none is due."""
        return 0.0 if self._asked is None else time.monotonic() - self._asked

    def submit(self, add: Add) -> OutputStream:
        """Submit a request and return the stream in which the outputs of all its choices arrive.

        Raises:
            EngineDead: The process has ended.
            RequestRejected: The request cannot be sent.
        """
        if not self.alive:
            raise EngineDead("the engine process is not running")
        add.request_id = self._next_id
        self.process.send(add)
        self._next_id += len(add.seeds)
        stream = OutputStream(self, add.choice_ids)
        idle = not self._streams
        self._streams.update(dict.fromkeys(stream.ids, stream))
        if idle:
            self.load_changed()
        return stream

    def abort(self, request_ids: Iterable[int]) -> None:
        """Have the engine drop the requests before its next step. Ignores finished ones and never raises."""
        held = [request_id for request_id in request_ids if self._streams.pop(request_id, None) is not None]
        if held and self.alive:
            with suppress(EngineDead):
                self.process.send(Abort(held))
                if not self._streams:
                    self.load_changed()

    def use_cores(self, share: float) -> None:
        """Have the engine use a part of the cores from its next step on. Never raises."""
        if self.alive:
            with suppress(EngineDead):
                self.process.send(Cores(share))

    async def ping(self, seconds: float) -> bool:
        """Whether the engine's loop answers within that many seconds. Never raises."""
        if not self.alive:
            return False
        number = next(self._pings)
        pong = self._pongs[number] = asyncio.get_running_loop().create_future()
        try:
            self.process.send(Ping(number))
            self._asked = time.monotonic()
            async with asyncio.timeout(seconds):
                await pong
        except (TimeoutError, EngineDead):
            return False
        finally:
            self._pongs.pop(number, None)
        return True

    async def wait_dead(self) -> None:
        """Wait until nothing more will arrive from the process."""
        await self._died.wait()

    async def lost(self) -> str:
        """Wait until the process has ended; a process whose loop has stopped is killed."""
        stuck, reason = self._stuck_seconds, ""
        while self.alive:
            with suppress(TimeoutError):
                async with asyncio.timeout(min(PING_SECONDS, stuck)):
                    await self.wait_dead()
            if self.alive and not await self.ping(stuck) and self.alive:
                reason = f"has not answered for {stuck:.0f} s: killed"
                self.kill()
                await self.wait_dead()
        return reason or f"ended with code {await self.process.stop(SHUTDOWN_SECONDS)}"

    def kill(self) -> None:
        """End the process at once; the requests that it holds fail with EngineDead."""
        self.process.kill()

    async def stop(self) -> None:
        """Ask the process to end, and kill it if it does not. Never raises."""
        self._bury(EngineStopped("the engine was stopped"))
        await self.process.stop(SHUTDOWN_SECONDS)
        await asyncio.wait({self._receiving}, timeout=1.0)
        self._receiving.cancel()

    async def _receive(self) -> None:
        try:
            while (message := await self.process.receive()) is not None:
                self._handle(message)
        except Exception:
            logger.exception("what the engine process sent cannot be used; it is killed")
            self.kill()
        finally:
            self._bury(EngineDead("the engine process ended while it held this request"))

    def _handle(self, message: FromEngine) -> None:
        if isinstance(message, StepDone):
            self.stats = message.stats
            self._asked = None
            streams = self._streams
            for output in message.outputs:
                stream = (
                    streams.get(output.request_id) if output.finish is None else streams.pop(output.request_id, None)
                )
                if stream is not None:
                    stream.put(output)
                    self.served = self.served or bool(output.token_ids)
            if message.outputs and not streams:
                self.load_changed()
        elif isinstance(message, Pong):
            self.stats = message.stats
            self._asked = None
            pong = self._pongs.get(message.number)
            if pong is not None and not pong.done():
                pong.set_result(None)

    def _bury(self, error: EngineDead) -> None:
        """Fail everything that is still waiting. Has an effect only once."""
        if self._died.is_set():
            return
        self._died.set()
        self._asked = None
        self.stats = msgspec.structs.replace(self.stats, running=0, waiting=0, blocks_used=0, blocks_total=0)
        for stream in self._streams.values():
            stream.fail(error)
        self._streams.clear()
        for pong in self._pongs.values():
            if not pong.done():
                pong.set_exception(error)
