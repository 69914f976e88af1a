"""A child process's own end: its frames to and from the parent, and its end with the parent's.

Imports little, since a child that needs little should stay small.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import struct
import sys

FRAME = struct.Struct("<I")
"""Before each message, in either direction: its length in bytes."""

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask Linux to end this process when its parent dies, even in the middle of work; elsewhere the closed
    socket or pipe does it after that work."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Parent:
    """The connection to whoever started this process; blocking, for one thread."""

    def __init__(self) -> None:
        """The socket's descriptor is the process's last argument. From here on Linux ends the process when its parent
        dies, even in the middle of work; elsewhere the closed connection does, after that work."""
        die_with_parent()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's to answer
        self._socket = socket.socket(fileno=int(sys.argv[-1]))

    def receive(self) -> tuple[bytes, int | None] | None:
        """A message and the descriptor that came with it, which is the caller's to close. None: the parent is gone."""
        head, descriptors, _, _ = socket.recv_fds(self._socket, FRAME.size, 1)
        rest = self._read(FRAME.size - len(head)) if head else None
        if rest is None:
            return None
        (size,) = FRAME.unpack(head + rest)
        body = self._read(size)
        if body is None:
            return None
        return body, descriptors[0] if descriptors else None

    def send(self, body: bytes) -> None:
        self._socket.sendall(FRAME.pack(len(body)) + body)

    def _read(self, size: int) -> bytes | None:
        data = b""
        while len(data) < size:  # once, but for a signal that stopped the process
            more = self._socket.recv(size - len(data), socket.MSG_WAITALL)
            if not more:
                return None
            data += more
        return data


def data_bytes() -> int | None:
    """What counts against RLIMIT_DATA: private writable memory. None where /proc does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[5]) * os.sysconf("SC_PAGESIZE")
    except (OSError, IndexError):
        return None
