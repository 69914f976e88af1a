"""WebP: chunks of name, length and content, padded to even (RFC 9649)."""

from __future__ import annotations

import struct

from handlers.images import ImageProblem
from handlers.images.formats.parts import (
    Pieces,
    Size,
    check_pixels,
    counted,
    exif_orientation,
    orientation_exif,
    xmp_orientation,
)

_IMAGES = (b"VP8 ", b"VP8L", b"ANMF")
_KEPT = (b"VP8X", b"ALPH", b"ANIM", *_IMAGES)
_EXIF_FLAG, _OTHER_FLAGS = 0x08, 0x24
"""Bits of the VP8X chunk: the file has EXIF; it has a colour profile or XMP."""


def size(data: bytes) -> Size:
    """Read the size from the first chunk."""
    kind = data[12:16]
    if kind not in (b"VP8X", b"VP8L", b"VP8 ") or (kind == b"VP8 " and len(data) < 30):
        return None
    return _sides(kind, memoryview(data)[20:])


def reduced(data: bytes, max_pixels: int) -> Pieces | None:
    """Keep the first image or frame, and the orientation.

    libwebp allocates the whole canvas when it reads the header, so its size is checked here.
    """
    view = memoryview(data)
    file_end = min(8 + int.from_bytes(view[4:8], "little"), len(data))
    chunks: list[tuple[bytes, memoryview]] = []
    at, size, found, in_exif, in_xmp = 12, 12, False, None, None
    for _ in counted("WEBP"):
        if at + 8 > file_end:
            break
        name, length = struct.unpack_from("<4sL", data, at)
        content = view[at + 8 : at + 8 + length]
        at += 8 + length + length % 2
        whole = len(content) == length
        if name in _KEPT and not found:
            if not whole:
                raise ImageProblem("its WEBP data is truncated: the image is not complete")
            if name not in (b"ALPH", b"ANIM"):
                check_pixels(*_sides(name, content), max_pixels)
            if name in _IMAGES or name not in dict(chunks):
                chunks.append((name, content))
                size += 8 + length + length % 2
            found = name in _IMAGES
        elif name == b"EXIF" and whole and in_exif is None:
            in_exif = exif_orientation(bytes(content)) or 0
        elif name == b"XMP " and whole and in_xmp is None:
            in_xmp = xmp_orientation(content) or 0
    if size == len(data) == 8 + int.from_bytes(view[4:8], "little"):
        return None
    turned = in_exif or in_xmp or 1
    exif = orientation_exif(turned) if turned != 1 and chunks and chunks[0][0] == b"VP8X" else b""
    pieces: Pieces = [b"WEBP"]
    for name, content in [*chunks, *([(b"EXIF", memoryview(exif))] if exif else [])]:
        kept: bytes | memoryview = content
        if name == b"VP8X":
            flags = content[0] & ~(_EXIF_FLAG | _OTHER_FLAGS) | (_EXIF_FLAG if exif else 0)
            kept = bytes([flags]) + content[1:]
        pieces += [struct.pack("<4sL", name, len(kept)), kept, b"\0" * (len(kept) % 2)]
    return [struct.pack("<4sL", b"RIFF", sum(map(len, pieces))), *pieces]


def _sides(name: bytes, content: memoryview) -> tuple[int, int]:
    """Return the width and height that a chunk contains."""
    if name == b"VP8X":
        return 1 + int.from_bytes(content[4:7], "little"), 1 + int.from_bytes(content[7:10], "little")
    if name == b"ANMF":
        return 1 + int.from_bytes(content[6:9], "little"), 1 + int.from_bytes(content[9:12], "little")
    if name == b"VP8L":
        bits = int.from_bytes(content[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return (
        int.from_bytes(content[6:8], "little") & 0x3FFF,
        int.from_bytes(content[8:10], "little") & 0x3FFF,
    )
