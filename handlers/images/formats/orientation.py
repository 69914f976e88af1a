"""Which side of an image is up, from the metadata of any format."""

from __future__ import annotations

import re
import struct

MAX_TEXT = 2**20
"""Bytes of one text, unpacked, that are searched."""

_TAG = 0x0112
_ENTRY_BYTES = 12
_IN_XMP = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


def in_exif(exif: bytes) -> int | None:
    """1 to 8, from the first directory alone; None where it is missing or damaged."""
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


def in_xmp(xmp: bytes | memoryview) -> int | None:
    """1 to 8, of the first MAX_TEXT bytes; None where nothing is said."""
    found = _IN_XMP.search(xmp[:MAX_TEXT])
    return int(found[1]) if found else None


def as_exif(orientation: int) -> bytes:
    """The smallest EXIF that says it."""
    return struct.pack(">2sHLHHHLHHL", b"MM", 42, 8, 1, _TAG, 3, 1, orientation, 0, 0)
