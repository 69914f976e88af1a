"""The child's end of the connection to its parent.

It imports little, so that a child that needs little stays small. `processes.child` is the parent's end.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import struct
import sys
import threading

FRAME = struct.Struct("<I")
"""The length of a message in bytes, which precedes each message in either direction."""

MAX_FRAME_BYTES = 1 << 30

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask Linux to end this process when its parent dies, even in the middle of work.

    On other systems the closed socket or pipe ends it after that work.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Frames:
    """Messages over a connected, blocking socket. Any thread may send; one thread receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._sending = threading.Lock()

    def send(self, body: bytes) -> None:
        """Send a message. Raises OSError when the other end is closed."""
        with self._sending:
            self._socket.sendall(FRAME.pack(len(body)) + body)

    def receive(self) -> bytes | None:
        """The next message; None once the other end is closed. Raises OSError for an absurd length."""
        head = self._read(FRAME.size)
        return None if head is None else self._body(head)

    def receive_with_descriptor(self) -> tuple[bytes, int | None] | None:
        """Return the next message and the file descriptor sent with it, if any, which the caller must close.

        Returns:
            None once the other end is closed.

        Raises:
            OSError: The length is absurd.
        """
        head, descriptors, _, _ = socket.recv_fds(self._socket, FRAME.size, 1)
        rest = self._read(FRAME.size - len(head)) if head else None
        body = None if rest is None else self._body(head + rest)
        return None if body is None else (body, descriptors[0] if descriptors else None)

    def close(self) -> None:
        self._socket.close()

    def _body(self, head: bytes) -> bytes | None:
        (size,) = FRAME.unpack(head)
        if size > MAX_FRAME_BYTES:
            raise OSError(f"a message of {size} bytes came; allowed: {MAX_FRAME_BYTES}")
        return self._read(size)

    def _read(self, size: int) -> bytes | None:
        data = b""
        while len(data) < size:  # a single pass, unless a signal has stopped the process
            more = self._socket.recv(size - len(data), socket.MSG_WAITALL)
            if not more:
                return None
            data += more
        return data


class Parent(Frames):
    """The connection to the process that started this one."""

    def __init__(self, *, die_with_it: bool = True) -> None:
        """Connect through the socket whose descriptor is the process's last argument.

        Args:
            die_with_it: Linux ends this process when its parent dies, even in the middle of work. Otherwise, and on
                other systems, the closed connection tells it to end.
        """
        if die_with_it:
            die_with_parent()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles a terminal's Ctrl-C
        super().__init__(socket.socket(fileno=int(sys.argv[-1])))


def data_bytes() -> int | None:
    """Return what counts against RLIMIT_DATA: private writable memory, in bytes. None without /proc."""
    return _pages(5)


def resident_bytes() -> int | None:
    """Return the resident memory, in bytes. None without /proc."""
    return _pages(1)


def _pages(column: int) -> int | None:
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[column]) * os.sysconf("SC_PAGESIZE")
    except (OSError, IndexError):
        return None
