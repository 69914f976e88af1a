"""The front's end of one engine process: start it, talk to it, notice at once when it is gone."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress

import msgspec

from engine.config import EngineConfig
from engine.errors import EngineDead, EngineError, EngineStopped, ModelLoadError, RequestRejected
from engine.messages import (
    FRAME,
    MAX_FRAME_BYTES,
    Abort,
    Add,
    Answer,
    Ask,
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
from processes.environment import child_environment

logger = logging.getLogger(__name__)
engine_log = logging.getLogger("engine.process")
"""What the engine processes write to their standard error."""

SHUTDOWN_SECONDS = 3.0
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

    def __init__(self, config: EngineConfig | None = None) -> None:
        """config: needed at last for `start`."""
        self.config = config
        self.ready: Ready | None = None
        self.stats = Stats()
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.answered = False
        """Whether any request has had a token from this process."""
        self._streams: dict[int, OutputStream] = {}
        self._asked: float | None = None
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

    @property
    def silent_for(self) -> float:
        """Seconds since a sign of life was asked for that has not come; 0 when none is due."""
        return 0.0 if self._asked is None else time.monotonic() - self._asked

    async def spawn(self) -> None:
        """Start the process ahead of `start`: it imports what it needs, which takes seconds, and waits.

        Raises OSError; nothing is left running then.
        """
        try:
            await self._spawn()
        except BaseException:
            await self.stop()
            raise

    async def ask(self, function: str, question: bytes) -> bytes:
        """What the function, "module:name", says in the process, which is spawned and not started yet.

        Raises EngineDead where the process ends instead.
        """
        assert self._reader is not None
        self._write(self._encoder.encode(Ask(function, question)))
        message = await _read(self._reader, msgspec.msgpack.Decoder(FromEngine))
        if not isinstance(message, Answer):
            raise EngineDead("the engine process ended while it was asked about the model")
        return message.answer

    async def start(self) -> Ready:
        """Spawn the process, unless that is done, and wait until the model has answered a first request of its own.

        Raises ModelLoadError with the engine's reason, EngineDead when the process ends without giving one, and
        OSError when it cannot be started. Nothing is left running then.
        """
        try:
            return await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, "-P", "-m", "engine.process", str(theirs.fileno()),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,  # of libraries alone
                    stderr=asyncio.subprocess.STDOUT,
                    pass_fds=(theirs.fileno(),),
                    env=child_environment("engine"),
                    start_new_session=True,
                )  # fmt: skip
            assert self._process.stdout is not None
            self._tasks.append(asyncio.create_task(_relay_log(self._process.stdout), name="engine-log"))
            self._reader, self._writer = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            raise

    async def _start(self) -> Ready:
        assert self.config is not None
        if self._process is None:
            await self._spawn()
        reader = self._reader
        assert reader is not None
        self._write(msgspec.msgpack.encode(self.config))
        decoder = msgspec.msgpack.Decoder(FromEngine)
        first = await _read(reader, decoder)
        if isinstance(first, Ready):
            self.ready = first
            self._tasks.append(asyncio.create_task(self._receive(reader, decoder), name="engine-receive"))
            return first
        if isinstance(first, LoadFailed):
            raise ModelLoadError(first.message)
        raise EngineDead("the engine process ended while it was loading the model; its log lines say why")

    def submit(self, add: Add, stream: OutputStream) -> range:
        """Hand over a request under ids of this client's choosing, which are returned: one for each answer.

        Their outputs come to the one stream. Raises EngineDead, and RequestRejected for what cannot be sent.
        """
        if not self.alive:
            raise EngineDead("the engine process is not running")
        add.request_id = self._next_id
        try:
            body = self._encoder.encode(add)
        except (ValueError, OverflowError, TypeError) as error:
            raise RequestRejected("a number in the request is out of range") from error
        if len(body) > MAX_FRAME_BYTES:
            raise RequestRejected("the request's pictures are too large together")
        self._write(body)
        self._next_id += len(add.seeds)
        self._streams.update(dict.fromkeys(add.choice_ids, stream))
        return add.choice_ids

    def abort(self, request_ids: Iterable[int]) -> None:
        """The engine forgets the requests before its next step. Fine for finished ones, never raises."""
        held = [request_id for request_id in request_ids if self._streams.pop(request_id, None) is not None]
        if held and self.alive:
            with suppress(EngineDead):
                self._send(Abort(held))

    async def ping(self, number: int, seconds: float) -> bool:
        """Whether the engine's loop answers within that many seconds. Never raises."""
        if not self.alive:
            return False
        pong = self._pongs[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(Ping(number))
            self._asked = time.monotonic()
            async with asyncio.timeout(seconds):
                await pong
        except (TimeoutError, EngineDead):
            return False
        finally:
            self._pongs.pop(number, None)
        return True

    async def wait_dead(self) -> None:
        """Return once nothing more will come from the process."""
        await self._died.wait()

    @property
    def returncode(self) -> int | None:
        """The process's exit code, negative for a signal; None while it runs."""
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
            with suppress(EngineDead):
                self._send(Shutdown())
        elif self.ready is None:
            self.kill()
        self._bury(EngineStopped("the engine was stopped"))
        await self._reap()
        if self._tasks:
            _, unfinished = await asyncio.wait(self._tasks, timeout=1.0)
            for task in unfinished:
                task.cancel()
        if self._writer is not None:
            self._writer.close()

    async def _receive(
        self, reader: asyncio.StreamReader, decoder: msgspec.msgpack.Decoder[FromEngine]
    ) -> None:
        assert self._process is not None
        try:
            while (message := await _read(reader, decoder)) is not None:
                self._handle(message)
        except Exception:
            logger.exception("what the engine process sent cannot be used; it is killed")
            self.kill()
        finally:
            self._bury(EngineDead("the engine process ended while it held this request"))
        await self._reap()

    async def _reap(self) -> None:
        """See the process out: its socket is closed, so it should be gone in a moment."""
        assert self._process is not None
        try:
            async with asyncio.timeout(SHUTDOWN_SECONDS):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()

    def _handle(self, message: FromEngine) -> None:
        if isinstance(message, StepDone):
            self.stats = message.stats
            self._asked = None
            streams = self._streams
            for output in message.outputs:
                stream = (
                    streams.get(output.request_id)
                    if output.finish is None
                    else streams.pop(output.request_id, None)
                )
                if stream is not None:
                    stream.put(output)
                    self.answered = self.answered or bool(output.token_ids)
        elif isinstance(message, Pong):
            self.stats = message.stats
            self._asked = None
            pong = self._pongs.get(message.number)
            if pong is not None and not pong.done():
                pong.set_result(None)

    def _bury(self, error: EngineDead) -> None:
        """Fail everything that still waits. Once."""
        if self._died.is_set():
            return
        self._died.set()
        self._asked = None
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
        try:
            self._writer.writelines((FRAME.pack(len(body)), body))
        except (
            OSError,
            RuntimeError,
        ) as error:  # uvloop raises RuntimeError for a transport that has just closed
            raise EngineDead("the engine process is going away") from error


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
