"""Shared by the modules of all formats: limits on parts, and the orientation in metadata."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from handlers.images import ImageProblem, too_many_pixels

MAX_PARTS = 2**16
"""Greatest number of chunks, blocks, boxes or directory entries of a file that are looked at. Each costs half
a microsecond."""

LOOKS = 2**10
"""Segments, blocks or entries of a file that are looked at to find its size. Real files need far fewer."""

Pieces = list[bytes | bytearray | memoryview]

Size = tuple[int, ...] | None
"""Width and height, with a third number for a progressive JPEG; None if a quick look does not find them."""

MAX_TEXT = 2**20
"""Bytes of one text, unpacked, that are searched."""

_TAG = 0x0112
_ENTRY_BYTES = 12
_IN_XMP = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


def counted(kind: str, most: int = MAX_PARTS) -> Iterator[None]:
    """Yield once for each part of a file; raise ImageProblem for more than `most`."""
    for _ in range(most):
        yield
    raise ImageProblem(f"its {kind} data has more than {most} parts")


def check_count(kind: str, what: str, count: int, most: int) -> None:
    """Raise ImageProblem for a count above `most`."""
    if count > most:
        raise ImageProblem(f"its {kind} data has {count} {what}; at most {most} are accepted")


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raise ImageProblem for an image with more than `max_pixels`."""
    if width * height > max_pixels:
        raise too_many_pixels(max_pixels)


def exif_orientation(exif: bytes) -> int | None:
    """Return the orientation, 1 to 8, from the first directory only; None if it is missing or damaged."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 10:
        return None
    (offset,) = struct.unpack_from(order + "L", exif, 4)
    if offset + 2 > len(exif):
        return None
    (count,) = struct.unpack_from(order + "H", exif, offset)
    table = exif[offset + 2 : offset + 2 + count * _ENTRY_BYTES]
    whole = table[: len(table) // _ENTRY_BYTES * _ENTRY_BYTES]
    for tag, kind, number, value in struct.iter_unpack(order + "HHL4s", whole):
        if tag == _TAG:
            code = {1: "B", 3: "H", 4: "L"}.get(kind)
            (orientation,) = struct.unpack_from(order + code, value) if code and number else (0,)
            return orientation if 1 <= orientation <= 8 else None
    return None


def xmp_orientation(xmp: bytes | memoryview) -> int | None:
    """Return the orientation, 1 to 8, from the first MAX_TEXT bytes; None if it is missing."""
    found = _IN_XMP.search(xmp[:MAX_TEXT])
    return int(found[1]) if found else None


def orientation_exif(orientation: int) -> bytes:
    """Build the smallest EXIF with that orientation."""
    return struct.pack(">2sHLHHHLHHL", b"MM", 42, 8, 1, _TAG, 3, 1, orientation, 0, 0)
