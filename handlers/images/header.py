"""How many pixels an image file says that it has: a cheap look, before a decoder opens it.

It is only what memory is asked for first: a decoder refuses a file that turns out to be larger. Every loop is bounded.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from handlers.images.metadata import kind_of

_MOST_PARTS = 512
"""Segments, blocks or entries looked at. Real files say their size within far fewer."""

_WORKING_BYTES = {"JPEG": 12, "PNG": 18, "WEBP": 28, "GIF": 14, "BMP": 14, "TIFF": 18, "AVIF": 30}
"""A format -> bytes per pixel that decoding takes in the decoder, the pixels it answers with not counted: the samples
as stored, as decoded, turned upright and made RGB, as far as they exist at the same time. Measured, and rounded up."""

_PROGRESSIVE_BYTES = 12
"""More of it for a progressive JPEG: the coefficients of up to four components, of two bytes each, and padding."""


@dataclass(frozen=True, slots=True)
class Header:
    """pixels: width times height. working_bytes: what decoding them takes (see `_WORKING_BYTES`)."""

    pixels: int
    working_bytes: int


def read_header(data: bytes) -> Header | None:
    """None where a cheap look does not tell."""
    kind = kind_of(data)
    if kind is None:
        return None
    try:
        found = _SIZES[kind](data)
    except (IndexError, ValueError, OverflowError, struct.error):  # an offset may have 64 bits
        return None
    if found is None or found[0] * found[1] <= 0:
        return None
    pixels = found[0] * found[1]
    per_pixel = _WORKING_BYTES[kind] + (_PROGRESSIVE_BYTES if len(found) > 2 else 0)
    return Header(pixels, per_pixel * pixels)


def unknown_header(pixels: int) -> Header:
    """For a size that a decoder has told, of whatever format."""
    return Header(pixels, max(_WORKING_BYTES.values()) * pixels)


_Size = tuple[int, ...] | None
"""Width and height; a third number for a progressive JPEG."""


def _jpeg(data: bytes) -> _Size:
    at = 2
    for _ in range(_MOST_PARTS):
        at = data.find(b"\xff", at)
        if at < 0:
            return None
        marker = data[at + 1]
        if marker in (0xFF, 0x00, 0x01) or 0xD0 <= marker <= 0xD8:
            at += 1 if marker == 0xFF else 2
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 5)
            return (width, height, 1) if marker & 3 == 2 else (width, height)
        if marker in (0xD9, 0xDA):
            return None
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _png(data: bytes) -> _Size:
    return struct.unpack_from(">II", data, 16) if data[12:16] == b"IHDR" else None


def _gif(data: bytes) -> _Size:
    """The larger of the screen and what the first frame covers."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    for _ in range(_MOST_PARTS):
        if data[at] == 0x2C:
            left, top, own_width, own_height = struct.unpack_from("<4H", data, at + 1)
            return max(width, left + own_width), max(height, top + own_height)
        if data[at] != 0x21:
            at += 1
            continue
        at += 2
        for _ in range(_MOST_PARTS):
            length = data[at]
            at += 1 + length
            if not length:
                break
    return None


def _bmp(data: bytes) -> _Size:
    if data[14] == 12:
        return struct.unpack_from("<HH", data, 18)
    width, height = struct.unpack_from("<ii", data, 18)
    return width, abs(height)


def _webp(data: bytes) -> _Size:
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None


_TIFF_NUMBERS = {3: "H", 4: "L", 16: "Q"}


def _tiff(data: bytes) -> _Size:
    order = "<" if data.startswith(b"II") else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    count_code, offset_code, size, value = ("Q", "Q", 20, 12) if big else ("H", "L", 12, 8)
    (at,) = struct.unpack_from(order + offset_code, data, 8 if big else 4)
    (count,) = struct.unpack_from(order + count_code, data, at)
    at += struct.calcsize(count_code)
    found: dict[int, int] = {}
    for _ in range(min(count, _MOST_PARTS)):
        tag, kind = struct.unpack_from(order + "HH", data, at)
        if tag in (256, 257) and kind in _TIFF_NUMBERS:
            (found[tag],) = struct.unpack_from(order + _TIFF_NUMBERS[kind], data, at + value)
        at += size
    return (found[256], found[257]) if len(found) == 2 else None


def _avif(data: bytes) -> _Size:
    """The largest of the sizes that its items have (`ispe`: ISO/IEC 23008-12, section 6.5.3)."""
    largest: _Size = None
    at = 0
    for _ in range(_MOST_PARTS):
        at = data.find(b"ispe", at, 2**16)
        if at < 0:
            break
        width, height = struct.unpack_from(">II", data, at + 8)
        if largest is None or width * height > largest[0] * largest[1]:
            largest = width, height
        at += 4
    return largest


_SIZES = {"JPEG": _jpeg, "PNG": _png, "WEBP": _webp, "GIF": _gif, "BMP": _bmp, "TIFF": _tiff, "AVIF": _avif}
