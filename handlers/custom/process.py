"""The front's end of one process of the user's handler: start it, call it, notice at once when it is gone."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import msgspec

from engine.messages import FRAME, MAX_FRAME_BYTES
from handlers.custom.messages import (
    Answer,
    Call,
    Cancel,
    End,
    Failed,
    FromHandler,
    LoadFailed,
    Part,
    Ready,
    Start,
    ToHandler,
)
from handlers.errors import CustomCodeError, EngineFailed, PayloadTooLarge, ServingError, Unavailable
from processes.environment import child_environment

logger = logging.getLogger(__name__)
handler_log = logging.getLogger("handlers.custom")
"""What the user's handler prints."""

MOST_WAITING = 64 * 2**20
"""Bytes of one streamed answer that may wait for its client; more, and it is given up."""

_STOP_SECONDS = 3.0


class OutOfMemory(ServingError):
    """The user's handler ran out of memory."""

    status = 507
    kind = "out_of_memory"


class HandlerCall:
    """The messages of one answer, in order. Read it to its End, or `abandon` it."""

    def __init__(self, process: HandlerProcess, number: int) -> None:
        self.number = number
        self.ended = asyncio.Event()
        self._process = process
        self._messages: asyncio.Queue[Answer | ServingError] = asyncio.Queue()
        self._waiting = 0

    async def next(self) -> Answer:
        """Raises CustomCodeError, OutOfMemory, and EngineFailed when the process ends or its reply is too large."""
        message = await self._messages.get()
        if isinstance(message, ServingError):
            raise message
        if isinstance(message, Part):
            self._waiting -= len(message.data)
        if isinstance(message, Failed):
            if message.status == 500:
                raise EngineFailed(f"the model's own handler failed: {message.error}")
            text = f"the model's own handler failed ({message.error}); the log has more"
            raise OutOfMemory(text) if message.status == 507 else CustomCodeError(text)
        return message

    def abandon(self, grace: float) -> None:
        """Nobody waits for the answer any more. A handler that does not end it in `grace` seconds is killed."""
        if not self.ended.is_set():
            self._process.cancel(self.number)
            self._process.kill_unless(self.ended, grace)

    def put(self, message: Answer | ServingError) -> None:
        if isinstance(message, Part):
            self._waiting += len(message.data)
            if self._waiting > MOST_WAITING:
                message = EngineFailed(
                    f"the stream is ended: {MOST_WAITING} bytes of it wait, it comes faster than its client reads it"
                )
                self.abandon(0.0)
        self._messages.put_nowait(message)
        if isinstance(message, End | Failed | ServingError):
            self.ended.set()


class HandlerProcess:
    """One process from start to death; it is not started twice."""

    def __init__(self, start: Start, on_free: Callable[[], None] = lambda: None) -> None:
        """on_free: called when another call can begin."""
        self.concurrent = False
        self.answered = False
        """Whether a call has ended well, or badly, in it."""
        self.died = asyncio.Event()
        self._start = start
        self._on_free = on_free
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._calls: dict[int, HandlerCall] = {}
        self._last = 0
        self._ready = False
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def load(self) -> int:
        """Calls under way."""
        return len(self._calls)

    @property
    def free(self) -> bool:
        """Whether a call can begin now."""
        return self._ready and not self.died.is_set() and (self.concurrent or not self._calls)

    async def start(self) -> None:
        """Spawn it and wait until the handler has answered its first, empty call.

        Raises CustomCodeError with the handler's reason, for the operator. Nothing is left running then.
        """
        try:
            first = await self._begin()
        except BaseException:
            await self.stop()
            raise
        if isinstance(first, Ready):
            self.concurrent, self._ready = first.concurrent, True
            return
        await self.stop()
        reason = first.message if isinstance(first, LoadFailed) else "its process ended; the log says why"
        raise CustomCodeError(f"the model's own handler cannot be loaded: {reason}")

    async def _begin(self) -> FromHandler | None:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, "-P", "-m", "handlers.custom.worker", str(theirs.fileno()),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.STDOUT,
                    pass_fds=(theirs.fileno(),),
                    env={**child_environment("handler"), "PYTHONUNBUFFERED": "1"},
                    start_new_session=True,
                )  # fmt: skip
            assert self._process.stdout is not None
            self._spawn(_relay_log(self._process.stdout))
            reader, self._writer = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            raise
        self._write(msgspec.msgpack.encode(self._start))
        decoder = msgspec.msgpack.Decoder(FromHandler)
        first = await _read(reader, decoder)
        if isinstance(first, Ready):
            self._spawn(self._receive(reader, decoder))
        return first

    def call(self, properties: dict[str, str], body: bytes) -> HandlerCall:
        """Begin a call; the process must be `free`. Raises PayloadTooLarge."""
        if len(body) > MAX_FRAME_BYTES // 2:
            raise PayloadTooLarge(
                f"{len(body)} bytes are more than the model's own handler can be given: {MAX_FRAME_BYTES // 2}"
            )
        self._last += 1
        call = self._calls[self._last] = HandlerCall(self, self._last)
        self._send(Call(self._last, properties, body))
        return call

    def cancel(self, number: int) -> None:
        if number in self._calls and not self.died.is_set():
            with suppress(Unavailable):
                self._send(Cancel(number))

    def kill_unless(self, ended: asyncio.Event, grace: float) -> None:
        async def watch() -> None:
            try:
                async with asyncio.timeout(grace):
                    await ended.wait()
            except TimeoutError:
                handler_log.warning("a call that nobody waits for does not end; its process is restarted")
                self.kill()

        self._spawn(watch())

    def kill(self) -> None:
        """It, or where it has ended already, the processes that the handler has started and left behind."""
        if self._process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def stop(self) -> None:
        """End it, and what it has started. Never raises."""
        self._bury(Unavailable("the server is stopping; send the request again", retry_after=5))
        if self._writer is not None:
            self._writer.close()
        if self._process is not None:
            try:
                async with asyncio.timeout(_STOP_SECONDS):
                    await self._process.wait()
            except TimeoutError:
                self.kill()
                await self._process.wait()
            self.kill()
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        if tasks:
            _, unfinished = await asyncio.wait(tasks, timeout=1.0)
            for task in unfinished:
                task.cancel()

    async def _receive(
        self, reader: asyncio.StreamReader, decoder: msgspec.msgpack.Decoder[FromHandler]
    ) -> None:
        try:
            while (message := await _read(reader, decoder)) is not None:
                if isinstance(message, Ready | LoadFailed):
                    continue
                if (call := self._calls.get(message.id)) is None:
                    continue
                call.put(message)
                if isinstance(message, End | Failed):
                    self.answered = True
                    del self._calls[message.id]
                    self._on_free()
        except Exception:
            logger.exception("what the handler's process sent cannot be used; it is killed")
            self.kill()
        finally:
            self._bury(EngineFailed("the process of the model's own handler ended; try again"))
            self.kill()

    def _bury(self, error: ServingError) -> None:
        self.died.set()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.put(error)

    def _send(self, message: ToHandler) -> None:
        self._write(msgspec.msgpack.encode(message))

    def _write(self, body: bytes) -> None:
        assert self._writer is not None
        if self._writer.is_closing():
            raise Unavailable("the model's own handler is being restarted; try again", retry_after=1)
        try:
            self._writer.write(FRAME.pack(len(body)))
            self._writer.write(body)
        except (OSError, RuntimeError) as error:
            raise Unavailable(
                "the model's own handler is being restarted; try again", retry_after=1
            ) from error

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _read(
    reader: asyncio.StreamReader, decoder: msgspec.msgpack.Decoder[FromHandler]
) -> FromHandler | None:
    """The next message; None once the process has closed its end. Raises ValueError for an absurd length."""
    try:
        (size,) = FRAME.unpack(await reader.readexactly(FRAME.size))
        if size > MAX_FRAME_BYTES:
            raise ValueError(f"a frame of {size} bytes")
        return decoder.decode(await reader.readexactly(size))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


async def _relay_log(lines: asyncio.StreamReader) -> None:
    """Put what the handler prints into this process's log, a line at a time."""
    while True:
        try:
            line = await lines.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            if not error.partial:
                return
            line = error.partial
        except asyncio.LimitOverrunError as error:
            line = await lines.readexactly(max(1, error.consumed))
        handler_log.info("%s", line.decode(errors="replace").rstrip())
