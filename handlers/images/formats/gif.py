"""GIF: extensions and frames, each a list of short blocks (https://www.w3.org/Graphics/GIF/spec-gif89a.txt)."""

from __future__ import annotations

import re
import struct

from handlers.images.formats.parts import Pieces, check_pixels, counted

_EXTENSION, _FRAME, _TRAILER = b"!,;"
_NEXT = re.compile(rb"[!,;]")
_TRANSPARENCY = 0xF9


def reduced(data: bytes, max_pixels: int) -> Pieces | None:
    """Before the first frame only what says which colour is transparent, once; what follows it no decoder reads."""
    view = memoryview(data)
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    pieces: Pieces = [view[:at]]
    start, transparency = at, view[:0]
    parts = counted("GIF")
    for _ in parts:
        found = _NEXT.search(data, at)  # decoders skip what is between
        if found is None or data[found.start()] == _TRAILER:
            raise ValueError("no frame")
        at = found.start()
        if data[at] == _FRAME:
            break
        first, at = at, at + 2
        for _ in parts:
            length = data[at]
            at += 1 + length
            if not length:
                break
        if data[first + 1] == _TRANSPARENCY:
            transparency = view[first:at]
    width, height = struct.unpack_from("<HH", data, 6)
    left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, at + 1)
    check_pixels(max(width, left + frame_width), max(height, top + frame_height), max_pixels)
    if at == start + len(transparency):
        return None
    return [*pieces, transparency, view[at:]]
