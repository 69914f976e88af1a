"""JPEG: segments, each a marker and its length, then scans of the pixels (ITU-T T.81, annex B)."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from handlers.images import ImageProblem, Pieces, Size, check_count, check_pixels, counted
from handlers.images.tiff import exif_orientation, orientation_exif, xmp_orientation

MAX_TABLE_BYTES = 2**16
"""Greatest size of quantization, Huffman and other tables before the first scan; four full ones of each kind
take 5 KiB."""

MAX_SEGMENTS = 2**12
"""Greatest number of segments before the first scan. Metadata of 20 MiB fill 320 of them."""

MAX_JUNK_BYTES = 2**20
"""Greatest number of bytes before the first scan that belong to no segment. Decoders skip them."""

PROGRESSIVE_BYTES = 12
"""Additional working bytes per pixel for a progressive file: the coefficients of up to four components, two bytes each,
and padding."""

MAX_SCANS = 100
MAX_SCANS_OF_LARGE = 20
_LARGE_PIXELS = 2**22
"""Greatest numbers of scans, and the size from which on the first one shrinks to the second. Each scan is a pass over
all pixels, but an empty one takes only a few bytes. Encoders write about ten."""

_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")
"""A marker with a length. Decoders skip the others: fill bytes, restarts and repeated starts of the image."""

_PROGRESSIVE_FRAMES = {0xC2, 0xC6, 0xCA, 0xCE}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_TABLES = {0xC4, 0xCC, 0xDB, 0xDC, 0xDD} | _FRAMES
_END, _SCAN = 0xD9, 0xDA


def size(data: bytes) -> Size:
    """Read the size from the first frame's header."""
    for marker, start, _ in _segments(data):
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", data, start + 5)
            return (width, height, 1) if marker in _PROGRESSIVE_FRAMES else (width, height)
    return None


def reduced(data: bytes, max_pixels: int) -> Pieces | None:
    """Before the first scan, keep only tables, the frame, how colours are coded, and the orientation."""
    view = memoryview(data)
    pieces: Pieces = [view[:2]]
    end, dropped, table_bytes = 2, False, 0
    pixels, scans_matter, components = 0, False, 0
    seen = set[int]()
    in_exif = in_xmp = None
    for marker, start, at in _segments(data):
        dropped = dropped or start > end
        if marker == _SCAN:
            break
        if not start + 4 <= at <= len(data):
            raise ValueError("a segment is cut short")
        end = at
        if marker in _TABLES:
            table_bytes += at - start
            check_count("JPEG", "bytes of tables before its pixels", table_bytes, MAX_TABLE_BYTES)
            if marker in _FRAMES:
                height, width = (int.from_bytes(view[i : i + 2], "big") for i in (start + 5, start + 7))
                check_pixels(width, height, max_pixels)
                pixels = max(pixels, width * height)
                scans_matter = scans_matter or marker in _PROGRESSIVE_FRAMES
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
    orientation = in_exif or in_xmp or 1
    if orientation != 1:
        exif = b"Exif\0\0" + orientation_exif(orientation)
        pieces.append(b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif)
    pieces.append(view[start:])
    return pieces if dropped else None


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of each segment, up to the first scan's. The end may lie beyond the data."""
    at, junk_bytes = 2, 0
    for _ in counted("JPEG", MAX_SEGMENTS):
        found = _MARKER.search(data, at, at + MAX_JUNK_BYTES + 2)
        if found is None or data[found.start() + 1] == _END:
            raise ValueError("no scan")
        start = found.start()
        junk_bytes += start - at
        if junk_bytes > MAX_JUNK_BYTES:
            raise ValueError("too many bytes outside of segments")
        at = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        yield data[start + 1], start, at
        if data[start + 1] == _SCAN:
            return


def _says_how_colours_are_coded(marker: int, content: memoryview) -> bool:
    """Whether the segment describes colours, and is at least as long as libjpeg requires."""
    if marker == 0xE0:
        return bytes(content[:5]) == b"JFIF\0" and len(content) >= 14
    return marker == 0xEE and bytes(content[:5]) == b"Adobe" and len(content) >= 12


def _check_scans(data: bytes, at: int, pixels: int) -> None:
    """Raise ImageProblem for too many scans of the image; what follows it or is in other segments is not counted."""
    most = max(MAX_SCANS_OF_LARGE, MAX_SCANS * min(_LARGE_PIXELS, pixels) // max(1, pixels))
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
