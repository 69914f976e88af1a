"""BMP: headers at fixed positions (https://learn.microsoft.com/windows/win32/gdi/bitmap-storage)."""

from __future__ import annotations

import struct

from handlers.images.formats.parts import Pieces, Size, check_count, check_pixels

_RUN_LENGTHS = (1, 2)
MAX_RUN_LENGTH_PIXELS = 2**24
MAX_RUN_LENGTH_BYTES = 2**22
"""Pillow unpacks run lengths in Python: up to 60 ns for each pixel and 200 ns for each byte."""


def size(data: bytes) -> Size:
    """Read the size from the header."""
    if data[14] == 12:
        return struct.unpack_from("<HH", data, 18)
    width, height = struct.unpack_from("<ii", data, 18)
    return width, abs(height)


def reduced(data: bytes, max_pixels: int) -> Pieces | None:
    """Leave nothing out, but limit what takes long to unpack."""
    header, width, height = struct.unpack_from("<Lll", data, 14)
    if header < 40:
        return None  # 16 bits for each side
    check_pixels(abs(width), abs(height), max_pixels)
    (compression,) = struct.unpack_from("<L", data, 30)
    if compression in _RUN_LENGTHS:
        check_count("BMP", "pixels in run lengths", abs(width * height), MAX_RUN_LENGTH_PIXELS)
        check_count("BMP", "bytes of run lengths", len(data), MAX_RUN_LENGTH_BYTES)
    return None
