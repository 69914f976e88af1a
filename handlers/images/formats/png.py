"""PNG: chunks of length, name, content and checksum (https://www.w3.org/TR/png-3/, chapter 5)."""

from __future__ import annotations

import struct
import zlib

from handlers.images.formats import orientation
from handlers.images.formats.parts import Pieces, check_pixels, counted
from handlers.images.problem import PictureProblem

_CHUNK = struct.Struct(">I4s")
_FEW = 64  # chunks of pixels that are left apart: decoders take two microseconds for each
_ORIENTATION = (b"eXIf", b"zTXt", b"tEXt", b"iTXt")  # the first that has one counts
_TRANSPARENCY_BYTES = {0: (2, 2), 2: (6, 6), 3: (0, 256)}
"""Colour type -> the least and the most that its tRNS chunk may hold."""


def reduced(data: bytes, max_pixels: int) -> Pieces | None:
    """Header, palette, transparency, orientation and pixels; very many chunks of pixels become one.

    A transparency or an orientation whose checksum is wrong is left out, as libpng does.
    """
    view = memoryview(data)
    colour = data[25]
    width, height = struct.unpack_from(">LL", data, 16)
    check_pixels(width, height, max_pixels)
    pieces: Pieces = [view[:8]]
    pixels: list[memoryview] = []
    rest: memoryview = view[:0]
    at = 8
    turns: dict[bytes, int] = {}
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
                raise PictureProblem(
                    f"its PNG data is damaged: the checksum of its {name.decode()} chunk is wrong"
                )
            if name not in seen:
                pieces.append(chunk)
            seen.add(name)
        elif name == b"tRNS":
            least, most = _TRANSPARENCY_BYTES.get(colour, (1, 0))
            if name not in seen and least <= length <= most and _intact(chunk):
                pieces.append(chunk)
            seen.add(name)
        elif name in _ORIENTATION and name not in turns:
            turned = _turned(name, content)
            if turned is not None and _intact(chunk):
                turns[name] = turned
    if sum(map(len, pieces)) + sum(map(len, pixels)) + len(rest) == len(data) and len(pixels) <= _FEW:
        return None
    turned = next((turns[name] for name in _ORIENTATION if turns.get(name)), 1)
    if turned != 1:
        pieces.append(_chunk(b"eXIf", orientation.as_exif(turned)))
    if len(pixels) > _FEW:
        pieces.append(_chunk(b"IDAT", b"".join(chunk[8:-4] for chunk in pixels)))
    else:
        pieces += pixels
    return [*pieces, rest]


def _intact(chunk: memoryview) -> bool:
    return zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def _chunk(name: bytes, content: bytes) -> bytes:
    return (
        _CHUNK.pack(len(content), name) + content + zlib.crc32(content, zlib.crc32(name)).to_bytes(4, "big")
    )


def _turned(name: bytes, content: memoryview) -> int | None:
    """As EXIF, as ImageMagick wrote that once, or in XMP: 0 where it says nothing, None where it is another text."""
    if name == b"eXIf":
        return orientation.in_exif(bytes(content)) or 0
    if name == b"iTXt":
        return orientation.in_xmp(content) or 0 if bytes(content[:19]) == b"XML:com.adobe.xmp\0\0" else None
    if bytes(content[:22]) != b"Raw profile type exif\0":
        return None
    text = bytes(content[22 : 23 + orientation.MAX_TEXT])
    if name == b"zTXt":
        text = _inflated(text)
    lines = text[: orientation.MAX_TEXT].split(b"\n", 3)  # an empty one, what it is, how long it is
    try:
        return orientation.in_exif(bytes.fromhex(lines[3].decode())) or 0
    except (IndexError, ValueError):
        return 0


def _inflated(packed: bytes) -> bytes:
    """Behind the byte that names the method, up to MAX_TEXT; empty where it is damaged."""
    try:
        return zlib.decompressobj().decompress(packed[1:], orientation.MAX_TEXT)
    except zlib.error:
        return b""
