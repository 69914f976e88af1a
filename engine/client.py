"""The front's end of one engine process: start it, talk to it, notice at once when it is gone."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections import deque

import msgspec

from engine.config import EngineConfig
from engine.environment import child_environment
from engine.errors import EngineDead, EngineError, ModelLoadError
from engine.messages import (
    FRAME,
    MAX_FRAME_BYTES,
    Abort,
    Add,
    FromEngine,
    LoadFailed,
    Output,
    Ping,
    Pong,
    Ready,
    Shutdown,
    Stats,
    StepDone,
    ToEngine,
)

logger = logging.getLogger(__name__)
engine_log = logging.getLogger("engine.process")
"""What the engine processes write to their standard error."""

SHUTDOWN_SECONDS = 5.0
"""How long an engine that was asked to stop may take before it is killed."""


class OutputStream:
    """The outputs of one request, in order. One reader; the engine's client is the writer."""

    __slots__ = ("_error", "_items", "_waiter")

    def __init__(self) -> None:
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
        """Everything that has come since the last call, at least one output. Raises EngineDead."""
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

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineClient:
    """One engine process from start to death; it is not started twice."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.ready: Ready | None = None
        self.stats = Stats()
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.answered = False
        """Whether any request has had an output from this process."""
        self._streams: dict[int, OutputStream] = {}
        self._pongs: dict[int, asyncio.Future[None]] = {}
        self._next_id = 0
        self._died = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._encoder = msgspec.msgpack.Encoder()

    @property
    def alive(self) -> bool:
        return self.ready is not None and not self._died.is_set()

    @property
    def num_requests(self) -> int:
        return len(self._streams)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def start(self) -> Ready:
        """Spawn the process and wait until the model is loaded.

        Raises ModelLoadError with the engine's reason, EngineDead when the process ends without giving one.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "engine.process", str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=(theirs.fileno(),),
                env=child_environment(),
                start_new_session=True,
            )  # fmt: skip
        assert self._process.stderr is not None
        self._tasks.append(asyncio.create_task(_relay_log(self._process.stderr), name="engine-log"))
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._write(msgspec.msgpack.encode(self.config))
        decoder = msgspec.msgpack.Decoder(FromEngine)
        first = await _read(reader, decoder)
        if isinstance(first, Ready):
            self.ready = first
            self._tasks.append(asyncio.create_task(self._receive(reader, decoder), name="engine-receive"))
            return first
        await self.stop()
        if isinstance(first, LoadFailed):
            raise ModelLoadError(first.message)
        raise EngineDead("the engine process ended while it was loading the model; its log lines say why")

    def submit(self, add: Add, stream: OutputStream) -> int:
        """Hand over a request under an id of this client's choosing, which is returned. Raises EngineDead.

        Several requests may share a stream; their outputs carry the id.
        """
        if not self.alive:
            raise EngineDead("the engine process is not running")
        add.request_id = self._next_id
        self._next_id += 1
        self._streams[add.request_id] = stream
        self._send(add)
        return add.request_id

    def abort(self, request_id: int) -> None:
        """The engine forgets the request before its next step. Fine for finished requests."""
        if self._streams.pop(request_id, None) is not None and self.alive:
            self._send(Abort([request_id]))

    async def ping(self, number: int, seconds: float) -> bool:
        """Whether the engine's loop answers within that many seconds."""
        if not self.alive:
            return False
        pong = self._pongs[number] = asyncio.get_running_loop().create_future()
        self._send(Ping(number))
        try:
            async with asyncio.timeout(seconds):
                await pong
        except (TimeoutError, EngineDead):
            return False
        finally:
            self._pongs.pop(number, None)
        return True

    async def wait_dead(self) -> int | None:
        """Return once the process is gone: its exit code, negative for a signal."""
        await self._died.wait()
        return self._process.returncode if self._process is not None else None

    def kill(self) -> None:
        """End the process at once; the requests it holds fail with EngineDead."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def stop(self) -> None:
        """Ask the process to end, kill it when it does not. Never raises."""
        if self._process is None:
            return
        if self.alive:
            self._send(Shutdown())
        elif self._process.returncode is None and self._writer is not None:
            self._writer.close()
        try:
            async with asyncio.timeout(SHUTDOWN_SECONDS if self.ready is not None else 0.5):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()
        self._bury("the engine was stopped")
        if self._tasks:
            _, unfinished = await asyncio.wait(self._tasks, timeout=1.0)
            for task in unfinished:
                task.cancel()
        if self._writer is not None:
            self._writer.close()

    async def _receive(
        self, reader: asyncio.StreamReader, decoder: msgspec.msgpack.Decoder[FromEngine]
    ) -> None:
        try:
            while (message := await _read(reader, decoder)) is not None:
                self._handle(message)
        except (EngineError, msgspec.MsgspecError):
            logger.exception("the engine process sent something unreadable; it is killed")
            self.kill()
        assert self._process is not None
        if self._process.returncode is None:
            try:
                async with asyncio.timeout(SHUTDOWN_SECONDS):
                    await self._process.wait()
            except TimeoutError:
                self.kill()
                await self._process.wait()
        self._bury(
            f"the engine process ended (exit code {self._process.returncode}) while it held this request"
        )

    def _handle(self, message: FromEngine) -> None:
        if isinstance(message, StepDone):
            self.stats = message.stats
            self.answered = True
            streams = self._streams
            for output in message.outputs:
                stream = (
                    streams.get(output.request_id)
                    if output.finish is None
                    else streams.pop(output.request_id, None)
                )
                if stream is not None:
                    stream.put(output)
        elif isinstance(message, Pong):
            self.stats = message.stats
            pong = self._pongs.get(message.number)
            if pong is not None and not pong.done():
                pong.set_result(None)

    def _bury(self, reason: str) -> None:
        """Fail everything that still waits. Once."""
        if self._died.is_set():
            return
        self._died.set()
        error = EngineDead(reason)
        for stream in self._streams.values():
            stream.fail(error)
        self._streams.clear()
        for pong in self._pongs.values():
            if not pong.done():
                pong.set_exception(error)

    def _send(self, message: ToEngine) -> None:
        self._write(self._encoder.encode(message))

    def _write(self, body: bytes) -> None:
        assert self._writer is not None
        self._writer.writelines((FRAME.pack(len(body)), body))


async def _relay_log(lines: asyncio.StreamReader) -> None:
    """Put what the engine's processes say into this process's log, in its form."""
    while True:
        try:
            line = await lines.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            line = error.partial
            if not line:
                return
        except asyncio.LimitOverrunError as error:
            line = await lines.readexactly(error.consumed)
        text = line.decode(errors="replace").rstrip()
        level, _, message = text.partition(" ")
        known = logging.getLevelNamesMapping().get(level)
        engine_log.log(known or logging.INFO, "%s", message if known else text)


async def _read(
    reader: asyncio.StreamReader, decoder: msgspec.msgpack.Decoder[FromEngine]
) -> FromEngine | None:
    """The next message; None once the engine has closed its end."""
    try:
        (size,) = FRAME.unpack(await reader.readexactly(FRAME.size))
        if size > MAX_FRAME_BYTES:
            raise EngineError(f"a frame of {size} bytes came; allowed: {MAX_FRAME_BYTES}")
        return decoder.decode(await reader.readexactly(size))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
