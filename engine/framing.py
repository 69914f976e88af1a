"""Length-prefixed frames on a blocking socket."""

from __future__ import annotations

import socket

from engine.errors import EngineError
from engine.messages import FRAME, MAX_FRAME_BYTES


def write_frame(sock: socket.socket, body: bytes) -> None:
    sock.sendall(FRAME.pack(len(body)) + body)


def read_frame(sock: socket.socket) -> bytearray | None:
    """The next frame's body; None once the other end is closed. Raises EngineError for an absurd length."""
    header = _read(sock, FRAME.size)
    if header is None:
        return None
    (size,) = FRAME.unpack(header)
    if size > MAX_FRAME_BYTES:
        raise EngineError(f"a frame of {size} bytes came; allowed: {MAX_FRAME_BYTES}")
    return _read(sock, size)


def _read(sock: socket.socket, size: int) -> bytearray | None:
    data = bytearray(size)
    view, got = memoryview(data), 0
    while got < size:
        count = sock.recv_into(view[got:])
        if count == 0:
            return None
        got += count
    return data
