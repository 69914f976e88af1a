"""Starts, calls and replaces the processes of the user's handler, and chooses the one that gets a call."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from pydantic import SecretStr

from handlers.backends.adapters import AdapterStore
from handlers.backends.base import BackendStats, Capabilities, Health
from handlers.custom.find import OwnCode, refuse_unusable
from handlers.custom.messages import Answer, Call, Cancel, End, Failed, FromHandler, LoadFailed, Part, Ready, Start
from handlers.errors import CustomCodeError, EngineFailed, PayloadTooLarge, ServingError, Unavailable, stopping
from processes.child import Child, Connection, Log
from processes.inside import MAX_FRAME_BYTES
from processes.supervisor import Supervisor, why_down
from properties.configuration import Configuration
from properties.field import Level

logger = logging.getLogger(__name__)
handler_log = logging.getLogger("handlers.custom")
"""The log of what the user's handler prints."""

MAX_WAITING_BYTES = 64 * 2**20
"""How much of one streamed answer may wait for its client; beyond that the answer is aborted."""

_STOP_SECONDS = 3.0


class CustomBackend:
    """Implements `handlers.backends.base.Lifecycle`; requests use `call`, since there are no prompts and tokens."""

    adapters: AdapterStore | None = None

    def __init__(self, start: Start, processes: int, retry_threshold: int) -> None:
        """retry_threshold: how often a process is restarted in a row, without an answer in between."""
        self._start = start
        self._supervisors = [
            Supervisor(
                f"process {number} of the model's own handler",
                lambda: HandlerProcess.start(start, self._serve_waiting),
                retry_threshold=retry_threshold,
                changed=self._changed,
            )
            for number in range(processes)
        ]
        self._waiting: deque[tuple[asyncio.Future[HandlerCall], dict[str, str], bytes]] = deque()

    @classmethod
    def from_configuration(cls, configuration: Configuration, model_path: Path, own: OwnCode) -> CustomBackend:
        """model_path: directory of the model's files, which may not be the handler's. Raises InvalidConfiguration."""
        refuse_unusable(own)
        settings = configuration.settings
        directory = str(own.directory.resolve())
        properties = _properties(configuration) | {"model_dir": directory, "model_id": str(model_path.resolve())}
        if own.function is None:
            # The engine would be of no use without formatters, so they are restarted forever.
            return cls(Start(directory, own.file, None, properties), 1, sys.maxsize)
        start = Start(directory, own.file, own.function, properties, own.standard)
        return cls(start, settings.max_workers or 1, settings.retry_threshold)

    async def load(self) -> None:
        starts = [asyncio.ensure_future(supervisor.start()) for supervisor in self._supervisors]
        try:
            await asyncio.gather(*starts)
        except BaseException:
            for start in starts:  # the first failure ends the others
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            await self.close()
            raise
        logger.info("%s runs in %d processes", self._start.file, len(self._supervisors))

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(max_model_len=0, images=False)

    async def call(self, properties: dict[str, str], body: bytes) -> HandlerCall:
        """Begin a call as soon as a process is free; calls are served in their order.

        Raises Unavailable. If cancelled, it leaves nothing behind.
        """
        if self._given_up:
            raise Unavailable("the model's own handler failed too often")
        future: asyncio.Future[HandlerCall] = asyncio.get_running_loop().create_future()
        self._waiting.append((future, properties, body))
        self._serve_waiting()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                future.result().abandon(0.0)
            raise

    def health(self) -> Health:
        if self._alive:
            return Health(True, "ready")
        return Health(False, why_down(self._supervisors, "the model's own handler"), lost=self._given_up)

    def stats(self) -> BackendStats:
        return BackendStats(
            running=sum(process.load for process in self._alive),
            waiting=len(self._waiting),
            engine_restarts=sum(supervisor.restarts for supervisor in self._supervisors),
            replicas=len(self._supervisors),
            replicas_ready=len(self._alive),
        )

    async def close(self) -> None:
        self._fail_waiting(stopping())
        await asyncio.gather(*(supervisor.close() for supervisor in self._supervisors))

    @property
    def _alive(self) -> list[HandlerProcess]:
        processes = [supervisor.current for supervisor in self._supervisors]
        return [process for process in processes if process is not None and not process.died.is_set()]

    @property
    def _given_up(self) -> bool:
        return all(supervisor.given_up for supervisor in self._supervisors)

    def _changed(self) -> None:
        self._serve_waiting()
        if self._given_up:
            self._fail_waiting(Unavailable("the model's own handler failed too often"))

    def _serve_waiting(self) -> None:
        while self._waiting:
            future, properties, body = self._waiting[0]
            free = [process for process in self._alive if process.free]
            if not free and not future.done():
                return
            self._waiting.popleft()
            if future.done():
                continue
            try:
                future.set_result(min(free, key=lambda process: process.load).call(properties, body))
            except ServingError as error:
                future.set_exception(error)

    def _fail_waiting(self, error: ServingError) -> None:
        while self._waiting:
            future = self._waiting.popleft()[0]
            if not future.done():
                future.set_exception(error)


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
        """Return the next message.

        Raises:
            CustomCodeError: The handler raised.
            OutOfMemory: The handler ran out of memory.
            EngineFailed: The process ended, or the reply is too large.
        """
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

    async def rest(self) -> bytes:
        """Return the remaining parts of an answer that is not streamed. Raises what `next` does."""
        parts = []
        while isinstance(message := await self.next(), Part):
            parts.append(message.data)
        return b"".join(parts)

    def abandon(self, grace: float) -> None:
        """Stop waiting for the answer. A handler that does not end it within `grace` seconds is killed."""
        if not self.ended.is_set():
            self._process.cancel(self.number)
            self._process.kill_unless(self.ended, grace)

    def put(self, message: Answer | ServingError) -> None:
        if isinstance(message, Part):
            self._waiting += len(message.data)
            if self._waiting > MAX_WAITING_BYTES:
                message = EngineFailed(
                    f"the stream is aborted: {MAX_WAITING_BYTES} bytes of it wait, because the client reads more slowly"
                )
                self.abandon(0.0)
        self._messages.put_nowait(message)
        if isinstance(message, End | Failed | ServingError):
            self.ended.set()


class HandlerProcess:
    """One process that accepts calls, until it dies (see `processes.supervisor.Supervised`)."""

    def __init__(self, child: Child, connection: Connection, concurrent: bool, on_free: Callable[[], None]) -> None:
        """Take over a process; use `start` to start one."""
        self.served = False
        """Whether a call has ended, well or badly."""
        self.died = asyncio.Event()
        self._child = child
        self._connection = connection
        self._concurrent = concurrent
        self._on_free = on_free
        self._calls: dict[int, HandlerCall] = {}
        self._last = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._spawn(self._receive())

    @classmethod
    async def start(cls, start: Start, on_free: Callable[[], None]) -> HandlerProcess:
        """Start a process; returns when the handler has answered its first, empty call.

        If this fails, nothing is left running.

        Args:
            start: Which handler it is.
            on_free: Called when another call can begin.

        Raises:
            CustomCodeError: The handler failed; the message is for the operator.
            OSError: The process cannot be started.
        """
        child = await Child.start(
            "handlers.custom.worker",
            "handler",
            Log(handler_log, levels=False),
            variables={"PYTHONUNBUFFERED": "1"},
        )
        try:
            connection = await child.connect()
            connection.send(msgspec.msgpack.encode(start))
            frame = await connection.receive()
            first = None if frame is None else msgspec.msgpack.decode(frame, type=FromHandler)
            if isinstance(first, Ready):
                return cls(child, connection, first.concurrent, on_free)
        except BaseException:
            await child.stop(_STOP_SECONDS)
            raise
        await child.stop(_STOP_SECONDS)
        reason = first.message if isinstance(first, LoadFailed) else "its process ended; the log says why"
        raise CustomCodeError(f"the model's own handler cannot be loaded: {reason}")

    @property
    def load(self) -> int:
        """The number of calls under way."""
        return len(self._calls)

    @property
    def free(self) -> bool:
        """Whether a call can begin now."""
        return not self.died.is_set() and (self._concurrent or not self._calls)

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
        """Kill the process, and the processes that the handler has started."""
        self._child.kill()

    async def lost(self) -> str:
        await self.died.wait()
        return "ended"

    async def stop(self) -> None:
        """End the process, and what it has started. Never raises."""
        self._fail_calls(stopping())
        await self._child.stop(_STOP_SECONDS)
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        if tasks:
            _, unfinished = await asyncio.wait(tasks, timeout=1.0)
            for task in unfinished:
                task.cancel()

    async def _receive(self) -> None:
        decoder = msgspec.msgpack.Decoder(FromHandler)
        try:
            while (frame := await self._connection.receive()) is not None:
                message = decoder.decode(frame)
                if isinstance(message, Ready | LoadFailed) or (call := self._calls.get(message.id)) is None:
                    continue
                call.put(message)
                if isinstance(message, End | Failed):
                    self.served = True
                    del self._calls[message.id]
                    self._on_free()
        except Exception:
            logger.exception("what the handler's process sent cannot be used; it is killed")
        finally:
            self._fail_calls(EngineFailed("the process of the model's own handler ended; try again"))
            self.kill()

    def _fail_calls(self, error: ServingError) -> None:
        self.died.set()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.put(error)

    def _send(self, message: Call | Cancel) -> None:
        try:
            self._connection.send(msgspec.msgpack.encode(message))
        except OSError as error:
            raise Unavailable("the model's own handler is being restarted; try again", retry_after=1) from error

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _properties(configuration: Configuration) -> dict[str, str]:
    """Return what the first call gets: every option that was given, as it was written, except secrets."""
    told = {
        name: source.raw or ""
        for name, source in configuration.sources.items()
        if source.level < Level.RECOMMENDED and not isinstance(getattr(configuration.settings, name), SecretStr)
    }
    return told | {name: str(item.value) for name, item in configuration.extra.items()}
