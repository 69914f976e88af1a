"""A Python child process, as its parent sees it: with limited resources and environment, and killable.

It exchanges messages with the parent over a socket pair (`processes.inside` is the other end): one question and one
answer after the other (`Child.send`, `Child.receive`), or any number in both directions (`Child.connect`). What it or
its libraries print goes to `logging`, line by line.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import psutil

from processes.environment import Kind, child_command, child_environment
from processes.inside import FRAME, MAX_FRAME_BYTES

_INT = struct.Struct("i")

_LOG_BURST = 16 * 2**10
_LOG_BYTES_PER_SECOND = 2 * 2**10
"""Bytes that a child whose log is bounded may add to it at once, and in each second."""

_SEND_BYTES = 2**20
"""The size of the socket's buffer: most messages fit, and sending them does not wait until the child reads."""

_LONGEST_LINE = 2**16
_LONGEST_BOUNDED_LINE = 2**10
_LAST_OUTPUT_BYTES = 400

_LEFT_OPEN_SECONDS = 1.0
"""How long after a child's end its log counts as complete, even if a process that it started holds it open."""


_own_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """The resource limits of one child, enforced on Linux; the child may lower them. It never leaves a core dump.

    Attributes:
        data_bytes: Private writable memory (RLIMIT_DATA); None for no limit.
        open_files: File descriptors; None for no limit.
    """

    data_bytes: int | None = None
    open_files: int | None = None


@dataclass(frozen=True, slots=True)
class Log:
    """Where the lines that a child prints are logged.

    Attributes:
        logger: The logger that gets them.
        level: The level of lines that do not begin with the name of one.
        levels: Whether a level's name at the beginning of a line sets its level and is removed.
        bounded: Whether lines beyond a rate are dropped, for a child that works on hostile input.
    """

    logger: logging.Logger
    level: int = logging.INFO
    levels: bool = True
    bounded: bool = False


class Connection:
    """Messages in both directions at any time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, body: bytes) -> None:
        """Send a message without waiting. Raises OSError when the child is going away."""
        if self._writer.is_closing():
            raise BrokenPipeError("the connection to the child is closed")
        try:
            self._writer.writelines((FRAME.pack(len(body)), body))
        except RuntimeError as error:  # raised by uvloop for a transport that has just closed
            raise BrokenPipeError("the connection to the child is closed") from error

    async def receive(self) -> bytes | None:
        """Return the next message; None once the child has closed its end. Raises ValueError for an absurd length."""
        try:
            (size,) = FRAME.unpack(await self._reader.readexactly(FRAME.size))
            if size > MAX_FRAME_BYTES:
                raise ValueError(f"a message of {size} bytes came; allowed: {MAX_FRAME_BYTES}")
            return await self._reader.readexactly(size)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    def end(self) -> None:
        """Tell the child that no more messages follow; what it still sends can be received."""
        with suppress(OSError, RuntimeError):
            self._writer.write_eof()

    def close(self) -> None:
        self._writer.close()


class Child:
    """One process from start to end, used on one event loop, with one task sending and one receiving at a time."""

    def __init__(self, process: asyncio.subprocess.Process, sock: socket.socket, log: Log) -> None:
        """Take over a process; use `start` to make one."""
        self._process = process
        self._socket = sock
        self._connection: Connection | None = None
        self._gone = False
        self._unsent: list[memoryview] = []
        self._rights: list[tuple[int, int, bytes]] = []
        self._message = bytearray()
        assert process.stdout is not None
        self._log = _Relay(log)
        self._relay = asyncio.create_task(self._log.relay(process.stdout), name="child-log")

    @classmethod
    async def start(
        cls,
        module: str,
        kind: Kind,
        log: Log,
        *,
        limits: Limits | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> Child:
        """Run `python -m module DESCRIPTOR` in a session of its own. If this fails, nothing is left running.

        The module finds its end of the connection with `processes.inside.Parent`. kind: which environment variables it
        gets (see `processes.environment`), besides `variables`. Raises OSError if the process cannot be started.
        """
        ours, theirs = socket.socketpair()
        try:
            ours.setblocking(False)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *child_command(module, str(theirs.fileno())),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.STDOUT,
                    pass_fds=(theirs.fileno(),),
                    env=child_environment(kind) | dict(variables or {}),
                    start_new_session=True,
                )
        except BaseException:
            ours.close()
            raise
        child = cls(process, ours, log)
        try:
            _limit(process.pid, limits or Limits())
        except PermissionError as error:  # in a sandbox; a child without limits still does its work
            _own_log.warning("the limits of a child process could not be set: %s", error.strerror)
        except BaseException:
            child.kill()
            await child.wait()
            raise
        return child

    async def connect(self) -> Connection:
        """Return a connection for messages at any time, instead of `send` and `receive`. Call it only once."""
        self._connection = Connection(*await asyncio.open_connection(sock=self._socket))
        return self._connection

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while it runs or until its end has been noticed."""
        return self._process.returncode

    @property
    def last_output(self) -> str:
        """The end of its output, in one line: for the operator's log, after an unexpected death."""
        return self._log.last_output

    def has_ended(self) -> bool:
        """Whether the process has ended; known at once, also before its exit code is.

        Call it only between messages: a message that arrives unasked counts as an end, too.
        """
        if self.returncode is not None:
            return True
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def is_stopped(self) -> bool:
        """Whether a signal (SIGSTOP) has suspended it; False if that is not known."""
        try:
            return psutil.Process(self.pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
        except (psutil.Error, OSError):
            return False

    def send(self, *parts: bytes, descriptor: int | None = None) -> None:
        """Send one message, its parts joined. The event loop sends what does not fit into the socket's buffer yet.

        descriptor: the child gets a duplicate of it; the caller may close it at once. Raises OSError if it is gone.
        """
        self._unsent = [memoryview(part) for part in (FRAME.pack(sum(map(len, parts))), *parts) if part]
        if descriptor is not None:
            self._rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _INT.pack(descriptor))]
        self._write()
        if self._rights:
            raise OSError("the child takes no descriptor")
        if self._unsent:
            asyncio.get_running_loop().add_writer(self._socket, self._write_on)

    async def receive(self, most: int = 2**24) -> bytearray:
        """Return the next message, of at most `most` bytes. A cancelled call can be repeated: nothing is lost.

        Raises:
            EOFError: The child is gone, announces more than `most` bytes, or sends more than one message.
        """
        message = self._message
        while True:
            size = FRAME.unpack_from(message)[0] if len(message) >= FRAME.size else 0
            if size > most:
                raise EOFError(f"the child announced a message of {size} bytes; allowed: {most}")
            if len(message) > FRAME.size + size:
                raise EOFError("the child said more than one message")
            if len(message) == FRAME.size + size:
                break
            await self._readable()
            try:
                data = self._socket.recv(2**16)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if not data:
                raise EOFError("the child is gone")
            message += data
        if self._unsent:
            raise EOFError("the child answered before it had the whole message")
        self._message = bytearray()
        return message[FRAME.size :]

    def kill(self) -> None:
        """Kill the process and its process group. Does nothing after `wait`."""
        if not self._gone:  # afterwards the id may belong to another process group
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def wait(self) -> int:
        """Wait for its end, kill what it left behind, and return its exit code. Its log is complete then."""
        code = await self._process.wait()
        self.kill()
        self._gone = True
        await asyncio.wait({self._relay}, timeout=_LEFT_OPEN_SECONDS)
        self._relay.cancel()
        if self._connection is not None:
            self._connection.close()
        elif self._socket.fileno() >= 0:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._socket)
            loop.remove_writer(self._socket)
            self._socket.close()
        return code

    async def stop(self, seconds: float) -> int:
        """Close the connection, which ends the child, and return its exit code. It is killed after `seconds`."""
        if self._connection is not None:
            self._connection.end()
        else:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        try:
            async with asyncio.timeout(seconds):
                return await self.wait()
        except TimeoutError:
            self.kill()
            return await self.wait()

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._socket, lambda: None if ready.done() else ready.set_result(None))
        try:
            await ready
        finally:
            if self._socket.fileno() >= 0:  # not closed by `wait`
                loop.remove_reader(self._socket)

    def _write(self) -> None:
        """Send as much as the socket takes."""
        while self._unsent:
            try:
                sent = self._socket.sendmsg(self._unsent, self._rights)
            except BlockingIOError:
                return
            self._rights = []
            while self._unsent and sent >= len(self._unsent[0]):
                sent -= len(self._unsent.pop(0))
            if self._unsent:
                self._unsent[0] = self._unsent[0][sent:]

    def _write_on(self) -> None:
        try:
            self._write()
        except OSError:  # `receive` will report it
            self._unsent = []
        if not self._unsent:
            asyncio.get_running_loop().remove_writer(self._socket)


def _limit(pid: int, limits: Limits) -> None:
    if sys.platform != "linux":
        return
    with suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
        for kind, most in ((resource.RLIMIT_DATA, limits.data_bytes), (resource.RLIMIT_NOFILE, limits.open_files)):
            if most is not None:
                _, hard = resource.prlimit(pid, kind)
                most = most if hard == resource.RLIM_INFINITY else min(most, hard)
                resource.prlimit(pid, kind, (most, most))


class _Relay:
    """Copies a child's output to this process's log and drops what exceeds the rate."""

    def __init__(self, log: Log) -> None:
        self._to = log
        self._longest = _LONGEST_BOUNDED_LINE if log.bounded else _LONGEST_LINE
        self._tail = b""

    @property
    def last_output(self) -> str:
        return " | ".join(self._tail.decode(errors="replace").split("\n")).strip(" |")

    async def relay(self, stream: asyncio.StreamReader) -> None:
        """Copy the output until the child has closed its end.

        It keeps reading while it drops lines, so that the child never waits for the log.
        """
        loop = asyncio.get_running_loop()
        burst = _LOG_BURST if self._to.bounded else sys.maxsize
        room, dropped, begun, before = float(burst), 0, b"", loop.time()
        while data := await stream.read(2**16):
            self._tail = (self._tail + data)[-_LAST_OUTPUT_BYTES:]
            now = loop.time()
            room = min(burst, room + (now - before) * _LOG_BYTES_PER_SECOND)
            before = now
            if dropped and room < burst / 4:  # reports dropped bytes every few seconds, not for each line
                dropped += len(data)
                continue
            if dropped:
                self._tell(dropped)
            taken = data[: int(room)]
            dropped = len(data) - len(taken)
            room -= len(taken)
            *lines, begun = (begun + taken).split(b"\n")
            if dropped or len(begun) > self._longest:
                lines.append(begun)
                begun = b""
            for line in lines:
                self._write(line)
        self._write(begun)
        if dropped:
            self._tell(dropped)

    def _write(self, line: bytes) -> None:
        text = line[: self._longest].decode(errors="replace").rstrip()
        level, _, message = text.partition(" ")
        known = logging.getLevelNamesMapping().get(level) if self._to.levels else None
        if text:
            self._to.logger.log(known or self._to.level, "%s", message if known else text)

    def _tell(self, dropped: int) -> None:
        self._to.logger.log(self._to.level, "%d bytes that the process printed were not logged", dropped)
