"""JPEG: segments, each a marker and its length (ITU-T T.81, annex B)."""

from __future__ import annotations

import re
import struct

from handlers.images import ImageProblem
from handlers.images.formats.parts import (
    LOOKS,
    Pieces,
    Size,
    check_count,
    check_pixels,
    counted,
    exif_orientation,
    orientation_exif,
    xmp_orientation,
)

MAX_TABLE_BYTES = 2**16
"""Greatest size of quantization, Huffman and other tables before the first scan; four full ones of each kind
take 5 KiB."""

MAX_SEGMENTS = 2**12
"""Greatest number of segments before the first scan. Metadata of 20 MiB fill 320 of them."""

MAX_JUNK_BYTES = 2**20
"""Greatest number of bytes before the first scan that belong to no segment. Decoders skip them."""

MAX_SCANS = 100
MAX_SCANS_OF_LARGE = 20
_LARGE = 2**22

_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")
"""A marker with a length. Others are skipped by decoders: fill bytes, restarts and repeated starts of the
image."""

_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_TABLES = {0xC4, 0xCC, 0xDB, 0xDC, 0xDD} | _FRAMES
_END, _SCAN = 0xD9, 0xDA


def size(data: bytes) -> Size:
    """Read the size, with a third number if the file is progressive."""
    at = 2
    for _ in range(LOOKS):
        at = data.find(b"\xff", at)
        if at < 0:
            return None
        marker = data[at + 1]
        if marker in (0xFF, 0x00, 0x01) or 0xD0 <= marker <= 0xD8:
            at += 1 if marker == 0xFF else 2
            continue
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return (width, height, 1) if marker in _PROGRESSIVE else (width, height)
        if marker in (_END, _SCAN):
            return None
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def reduced(data: bytes, max_pixels: int) -> Pieces | None:
    """Before the first scan, keep only tables, the frame, how colours are coded, and the orientation."""
    view = memoryview(data)
    pieces: Pieces = [view[:2]]
    at, dropped, table_bytes, junk_bytes = 2, False, 0, 0
    pixels, scans_matter, components = 0, False, 0
    seen = set[int]()
    in_exif = in_xmp = None
    for _ in counted("JPEG", MAX_SEGMENTS):
        found = _MARKER.search(data, at, at + MAX_JUNK_BYTES + 2)
        if found is None or data[found.start() + 1] == _END:
            raise ValueError("no scan")
        start = found.start()
        marker = data[start + 1]
        junk_bytes += start - at
        if junk_bytes > MAX_JUNK_BYTES:
            raise ValueError("too many bytes outside of segments")
        dropped = dropped or start > at
        if marker == _SCAN:
            break
        at = start + 2 + int.from_bytes(view[start + 2 : start + 4], "big")
        if at < start + 4 or at > len(data):
            raise ValueError("a segment is cut short")
        if marker in _TABLES:
            table_bytes += at - start
            check_count("JPEG", "bytes of tables before its pixels", table_bytes, MAX_TABLE_BYTES)
            if marker in _FRAMES:
                height, width = (int.from_bytes(view[i : i + 2], "big") for i in (start + 5, start + 7))
                check_pixels(width, height, max_pixels)
                pixels = max(pixels, width * height)
                scans_matter = scans_matter or marker in _PROGRESSIVE
                components = max(components, data[start + 9])
        elif 0xE0 <= marker <= 0xEF or marker == 0xFE:
            content = view[start + 4 : at]
            if marker == 0xE1:
                if in_exif is None and bytes(content[:6]) == b"Exif\0\0":
                    in_exif = exif_orientation(bytes(content)) or 0
                elif in_xmp is None and bytes(content[:29]) == b"http://ns.adobe.com/xap/1.0/\0":
                    in_xmp = xmp_orientation(content)
            if marker in seen or not _says_how_colours_are_coded(marker, content):
                dropped = True
                continue
            seen.add(marker)
        else:
            raise ValueError("a marker that no decoder reads")
        pieces.append(view[start:at])
    if scans_matter or data[start + 4] < components:  # else the first scan is the whole image
        _check_scans(data, start, pixels)
    turned = in_exif or in_xmp or 1
    if turned != 1:
        exif = b"Exif\0\0" + orientation_exif(turned)
        pieces.append(b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif)
    pieces.append(view[start:])
    return pieces if dropped else None


def _says_how_colours_are_coded(marker: int, content: memoryview) -> bool:
    """Whether the segment describes colours, and is at least as long as libjpeg requires."""
    if marker == 0xE0:
        return bytes(content[:5]) == b"JFIF\0" and len(content) >= 14
    return marker == 0xEE and bytes(content[:5]) == b"Adobe" and len(content) >= 12


def max_scans(pixels: int) -> int:
    """Return the greatest number of scans. Each is a pass over all pixels, but an empty one takes only a few bytes.

    Encoders write about ten.
    """
    return max(MAX_SCANS_OF_LARGE, MAX_SCANS * min(_LARGE, pixels) // max(1, pixels))


def _check_scans(data: bytes, at: int, pixels: int) -> None:
    """Count the scans of the image only, not what follows it or stands within other segments."""
    most = max_scans(pixels)
    if data.count(b"\xff\xda", at) <= most:  # fast, but also counts bytes that are not scans
        return
    count = 0
    for _ in counted("JPEG", MAX_SEGMENTS):
        found = _MARKER.search(data, at)
        if found is None or data[found.start() + 1] == _END:
            return
        count += data[found.start() + 1] == _SCAN
        if count > most:
            raise ImageProblem(f"it is a JPEG of {pixels} pixels and more than {most} scans")
        at = found.end() + max(2, int.from_bytes(data[found.end() : found.end() + 2], "big"))
