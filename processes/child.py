"""A Python child process, seen from its parent: started with what it needs and no more, bounded, killable.

It talks in frames over a socket pair (`processes.inside` is the other end). What it or its libraries print goes to
`logging`, line by line and within a rate.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from processes.inside import FRAME

_LOG_BURST = 16 * 2**10
_LOG_BYTES_PER_SECOND = 2 * 2**10
"""What one child may add to the log at once, and for each second."""

_LONGEST_LINE = 2**10
_LAST_WORDS = 400


_own_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one child; it may lower them for itself. Enforced on Linux. A child never leaves a core dump.

    data_bytes: private writable memory (RLIMIT_DATA). open_files: descriptors.
    """

    data_bytes: int | None = None
    open_files: int | None = None


class Child:
    """One process from start to end, used on one event loop. `send` and `receive` each by one task at a time."""

    def __init__(
        self, process: asyncio.subprocess.Process, sock: socket.socket, logger: logging.Logger, level: int
    ) -> None:
        """Use `start`."""
        self._process = process
        self._socket = sock
        assert process.stdout is not None
        self._log = _Log(logger, level)
        self._relay = asyncio.create_task(self._log.relay(process.stdout), name="child-log")

    @classmethod
    async def start(
        cls,
        module: str,
        *,
        env: Mapping[str, str],
        logger: logging.Logger,
        level: int = logging.INFO,
        limits: Limits | None = None,
    ) -> Child:
        """`python -m module DESCRIPTOR`, in a session of its own. Raises OSError; nothing is left running then.

        env: all of it (see `processes.environment`). level: of lines that do not begin with a level's name.
        """
        ours, theirs = socket.socketpair()
        try:
            ours.setblocking(False)
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-P", "-m", module, str(theirs.fileno()),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.STDOUT,
                    pass_fds=(theirs.fileno(),),
                    env=env,
                    start_new_session=True,
                )  # fmt: skip
        except BaseException:
            ours.close()
            raise
        child = cls(process, ours, logger, level)
        try:
            _limit(process.pid, limits or Limits())
        except (
            PermissionError
        ) as error:  # a sandbox may refuse it, and a child without limits still does its work
            _own_log.warning("the limits of a child process could not be set: %s", error.strerror)
        except BaseException:
            child.kill()
            await child.wait()
            raise
        return child

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while it runs, or until its end has been noticed."""
        return self._process.returncode

    @property
    def last_words(self) -> str:
        """The end of what it printed, in one line: for the operator's log, after a death that nobody expected."""
        return self._log.last_words

    def has_ended(self) -> bool:
        """Known at once, also before its exit code is. Only between messages: what has come and was not asked for
        counts as an end, too."""
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
        """By a signal (SIGSTOP), so that it does not run. False where /proc does not tell."""
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as file:
                return file.read().rpartition(b") ")[2][:1] in (b"T", b"t")
        except OSError:
            return False

    async def send(self, body: bytes, descriptor: int | None = None) -> None:
        """Raises OSError when the child is gone. Cancelled halfway, it leaves a child of no further use.

        descriptor: one that the child gets a copy of.
        """
        loop = asyncio.get_running_loop()
        head = FRAME.pack(len(body))
        if descriptor is not None:
            while True:
                try:
                    sent = socket.send_fds(self._socket, [head], [descriptor])
                    break
                except BlockingIOError:
                    await self._writable()
            head = head[sent:]
        if len(body) < 2**16:
            await loop.sock_sendall(self._socket, head + body)
        else:
            await loop.sock_sendall(self._socket, head)
            await loop.sock_sendall(self._socket, body)

    async def receive(self, most: int = 2**24) -> bytearray:
        """The next message. Raises EOFError when the child is gone or claims more than `most` bytes."""
        (size,) = FRAME.unpack(await self._read(FRAME.size))
        if size > most:
            raise EOFError(f"the child announced a message of {size} bytes; allowed: {most}")
        return await self._read(size)

    def kill(self) -> None:
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()

    async def wait(self) -> int:
        """See it out: its exit code. Its log is complete then."""
        code = await self._process.wait()
        await asyncio.wait({self._relay})
        self._socket.close()
        return code

    async def stop(self, seconds: float) -> int:
        """Close the connection, at which it ends by itself; killed when it has not after `seconds`."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        try:
            async with asyncio.timeout(seconds):
                return await self.wait()
        except TimeoutError:
            self.kill()
            return await self.wait()

    async def _read(self, size: int) -> bytearray:
        loop = asyncio.get_running_loop()
        data = bytearray(size)
        view, got = memoryview(data), 0
        while got < size:
            try:
                count = await loop.sock_recv_into(self._socket, view[got:])
            except ConnectionError as error:
                raise EOFError("the child is gone") from error
            if count == 0:
                raise EOFError("the child is gone")
            got += count
        return data

    async def _writable(self) -> None:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()

        def wake() -> None:
            loop.remove_writer(self._socket)
            if not ready.done():
                ready.set_result(None)

        loop.add_writer(self._socket, wake)
        await ready


def _limit(pid: int, limits: Limits) -> None:
    if sys.platform != "linux":
        return
    with suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
        for kind, most in (
            (resource.RLIMIT_DATA, limits.data_bytes),
            (resource.RLIMIT_NOFILE, limits.open_files),
        ):
            if most is not None:
                _, hard = resource.prlimit(pid, kind)
                most = most if hard == resource.RLIM_INFINITY else min(most, hard)
                resource.prlimit(pid, kind, (most, most))


class _Log:
    """Puts what a child prints into this process's log, in its form, and drops what is beyond the rate."""

    def __init__(self, logger: logging.Logger, level: int) -> None:
        self._logger = logger
        self._level = level
        self._tail = b""

    @property
    def last_words(self) -> str:
        return " | ".join(self._tail.decode(errors="replace").split("\n")).strip(" |")

    async def relay(self, stream: asyncio.StreamReader) -> None:
        """Until the child has closed its end. Reads on while it drops, so that the child never waits for the log."""
        loop = asyncio.get_running_loop()
        room, dropped, begun, before = float(_LOG_BURST), 0, b"", loop.time()
        while data := await stream.read(2**16):
            self._tail = (self._tail + data)[-_LAST_WORDS:]
            now = loop.time()
            room = min(_LOG_BURST, room + (now - before) * _LOG_BYTES_PER_SECOND)
            before = now
            if (
                dropped and room < _LOG_BURST / 4
            ):  # tells of what is dropped every few seconds, not at each line
                dropped += len(data)
                continue
            if dropped:
                self._tell(dropped)
            taken = data[: int(room)]
            dropped = len(data) - len(taken)
            room -= len(taken)
            *lines, begun = (begun + taken).split(b"\n")
            if dropped or len(begun) > _LONGEST_LINE:
                lines.append(begun)
                begun = b""
            for line in lines:
                self._write(line)
        self._write(begun)
        if dropped:
            self._tell(dropped)

    def _write(self, line: bytes) -> None:
        text = line[:_LONGEST_LINE].decode(errors="replace").rstrip()
        level, _, message = text.partition(" ")
        known = logging.getLevelNamesMapping().get(level)
        if text:
            self._logger.log(known or self._level, "%s", message if known else text)

    def _tell(self, dropped: int) -> None:
        self._logger.log(self._level, "%d bytes that the process printed were not logged", dropped)
