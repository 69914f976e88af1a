"""GIF: extensions and frames, each a list of short blocks (https://www.w3.org/Graphics/GIF/spec-gif89a.txt)."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from handlers.images.formats.parts import LOOKS, Pieces, Size, check_pixels, counted

_EXTENSION, _FRAME, _TRAILER = b"!,;"
_NEXT = re.compile(rb"[!,;]")
_TRANSPARENCY = 0xF9


def size(data: bytes) -> Size:
    """Return the larger of the screen and the area that the first frame covers."""
    at, _ = _first_frame(data, iter(range(LOOKS)))
    return _canvas(data, at)


def reduced(data: bytes, max_pixels: int) -> Pieces | None:
    """Before the first frame keep only which colour is transparent, once; no decoder reads what follows it."""
    view = memoryview(data)
    start = _tables_end(data)
    at, transparency = _first_frame(data, counted("GIF"))
    check_pixels(*_canvas(data, at), max_pixels)
    if at == start + len(transparency):
        return None
    return [view[:start], transparency, view[at:]]


def _tables_end(data: bytes) -> int:
    return 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)


def _first_frame(data: bytes, parts: Iterator[object]) -> tuple[int, memoryview]:
    """Return the position of the first frame, and the last extension about transparency before it."""
    at = _tables_end(data)
    transparency = memoryview(b"")
    for _ in parts:
        found = _NEXT.search(data, at)  # decoders skip what is between
        if found is None or data[found.start()] == _TRAILER:
            break
        at = found.start()
        if data[at] == _FRAME:
            return at, transparency
        first, at = at, at + 2
        for _ in parts:
            length = data[at]
            at += 1 + length
            if not length:
                break
        if data[first + 1] == _TRANSPARENCY:
            transparency = memoryview(data)[first:at]
    raise ValueError("no frame")


def _canvas(data: bytes, frame: int) -> tuple[int, int]:
    width, height = struct.unpack_from("<HH", data, 6)
    left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, frame + 1)
    return max(width, left + frame_width), max(height, top + frame_height)
