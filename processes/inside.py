"""A child process's own end: its messages to and from the parent, and its end with the parent's.

Imports little, since a child that needs little should stay small. `processes.child` is the parent's end.
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
"""Before each message, in either direction: its length in bytes."""

MAX_FRAME_BYTES = 1 << 30

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask Linux to end this process when its parent dies, even in the middle of work.

    On other systems the closed socket or pipe ends it after that work.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Frames:
    """Messages over a connected, blocking socket: any thread sends, one thread receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._sending = threading.Lock()

    def send(self, body: bytes) -> None:
        """Raises OSError when the other end is closed."""
        with self._sending:
            self._socket.sendall(FRAME.pack(len(body)) + body)

    def receive(self) -> bytes | None:
        """The next message; None once the other end is closed. Raises OSError for an absurd length."""
        head = self._read(FRAME.size)
        return None if head is None else self._body(head)

    def receive_with_descriptor(self) -> tuple[bytes, int | None] | None:
        """The same, and the descriptor that came with it, which is the caller's to close."""
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
        while len(data) < size:  # once, but for a signal that stopped the process
            more = self._socket.recv(size - len(data), socket.MSG_WAITALL)
            if not more:
                return None
            data += more
        return data


class Parent(Frames):
    """The connection to whoever started this process."""

    def __init__(self, *, die_with_it: bool = True) -> None:
        """The socket's descriptor is the process's last argument.

        die_with_it: from here on Linux ends the process when its parent dies, even in the middle of work; elsewhere,
        and without it, the closed connection is the sign.
        """
        if die_with_it:
            die_with_parent()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's to answer
        super().__init__(socket.socket(fileno=int(sys.argv[-1])))


def data_bytes() -> int | None:
    """What counts against RLIMIT_DATA: private writable memory. None where /proc does not tell."""
    return _pages(5)


def resident_bytes() -> int | None:
    """None where /proc does not tell."""
    return _pages(1)


def _pages(column: int) -> int | None:
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[column]) * os.sysconf("SC_PAGESIZE")
    except (OSError, IndexError):
        return None
