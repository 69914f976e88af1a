"""PNG: chunks of length, name, content and checksum (https://www.w3.org/TR/png-3/, chapter 5)."""

from __future__ import annotations

import struct
import zlib

from handlers.images import ImageProblem, Pieces, Size, check_pixels, counted
from handlers.images.tiff import MAX_TEXT, exif_orientation, orientation_exif, xmp_orientation

_CHUNK = struct.Struct(">I4s")
_ORIENTATION = (b"eXIf", b"zTXt", b"tEXt", b"iTXt")  # the first that has one counts
_TRANSPARENCY_BYTES = {0: (2, 2), 2: (6, 6), 3: (0, 256)}
"""Colour type -> smallest and greatest size of its tRNS chunk."""


def size(data: bytes) -> Size:
    """Read the size from the header."""
    return struct.unpack_from(">II", data, 16) if data[12:16] == b"IHDR" else None


def reduced(data: bytes, max_pixels: int) -> Pieces | None:
    """Keep header, palette, transparency, orientation and pixels.

    A transparency or an orientation with a wrong checksum is left out, as in libpng.
    """
    view = memoryview(data)
    colour = data[25]
    width, height = struct.unpack_from(">LL", data, 16)
    check_pixels(width, height, max_pixels)
    pieces: Pieces = [view[:8]]
    pixels: list[memoryview] = []
    rest: memoryview = view[:0]
    at = 8
    orientations: dict[bytes, int] = {}
    seen: set[bytes] = set()
    for _ in counted("PNG"):
        length, name = _CHUNK.unpack_from(data, at) if at + 8 <= len(data) else (0, b"")
        chunk, content = view[at : at + 12 + length], view[at + 8 : at + 8 + length]
        if not name.isalpha() or at + 12 + length > len(data):
            if name == b"IDAT" or not pixels:  # else only what comes after the pixels is damaged
                rest = view[at:]
            break
        at += 12 + length
        if name == b"IDAT":
            if length:
                pixels.append(chunk)
        elif name == b"IEND":
            rest = chunk
            break
        elif name == b"IHDR" or (name == b"PLTE" and colour == 3):
            if name not in seen and not _intact(chunk):
                raise ImageProblem(f"its PNG data is damaged: the checksum of its {name.decode()} chunk is wrong")
            if name not in seen:
                pieces.append(chunk)
            seen.add(name)
        elif name == b"tRNS":
            least, most = _TRANSPARENCY_BYTES.get(colour, (1, 0))
            if name not in seen and least <= length <= most and _intact(chunk):
                pieces.append(chunk)
            seen.add(name)
        elif name in _ORIENTATION and name not in orientations:
            orientation = _orientation_in(name, content)
            if orientation is not None and _intact(chunk):
                orientations[name] = orientation
    if sum(map(len, pieces)) + sum(map(len, pixels)) + len(rest) == len(data):
        return None
    orientation = next((orientations[name] for name in _ORIENTATION if orientations.get(name)), 1)
    if orientation != 1:
        exif = orientation_exif(orientation)
        pieces += [_CHUNK.pack(len(exif), b"eXIf"), exif, zlib.crc32(b"eXIf" + exif).to_bytes(4, "big")]
    return [*pieces, *pixels, rest]


def _intact(chunk: memoryview) -> bool:
    return zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def _orientation_in(name: bytes, content: memoryview) -> int | None:
    """Read the orientation from EXIF, from ImageMagick's older form of it, or from XMP.

    Returns:
        0 if there is none; None if the chunk holds another text.
    """
    if name == b"eXIf":
        return exif_orientation(bytes(content)) or 0
    if name == b"iTXt":
        return xmp_orientation(content) or 0 if bytes(content[:19]) == b"XML:com.adobe.xmp\0\0" else None
    if bytes(content[:22]) != b"Raw profile type exif\0":
        return None
    text = bytes(content[22 : 23 + MAX_TEXT])
    if name == b"zTXt":
        text = _inflated(text)
    lines = text[:MAX_TEXT].split(b"\n", 3)  # an empty line, the kind, the length
    try:
        return exif_orientation(bytes.fromhex(lines[3].decode())) or 0
    except (IndexError, ValueError):
        return 0


def _inflated(packed: bytes) -> bytes:
    """Unpack what follows the byte for the method, up to MAX_TEXT; empty if it is damaged."""
    try:
        return zlib.decompressobj().decompress(packed[1:], MAX_TEXT)
    except zlib.error:
        return b""
