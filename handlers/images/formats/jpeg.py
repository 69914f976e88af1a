"""JPEG: segments, each a marker and its length (ITU-T T.81, annex B)."""

from __future__ import annotations

import re

from handlers.images.formats import orientation
from handlers.images.formats.parts import Pieces, check_count, check_pixels, counted
from handlers.images.problem import PictureProblem

MAX_TABLE_BYTES = 2**16
"""Of quantization, Huffman and other tables before the first scan: four of each kind, in full, take 5 KiB."""

MAX_SEGMENTS = 2**12
"""Before the first scan. Metadata of 20 MiB fill 320 of them."""

MAX_JUNK_BYTES = 2**20
"""Before the first scan, of no segment. Decoders skip them."""

MAX_SCANS = 100
MAX_SCANS_OF_LARGE = 20
_LARGE = 2**22

_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")
"""But those that have no length and that decoders skip: fill bytes, restarts and repeated starts of the image."""

_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_TABLES = {0xC4, 0xCC, 0xDB, 0xDC, 0xDD} | _FRAMES
_END, _SCAN = 0xD9, 0xDA


def reduced(data: bytes, max_pixels: int) -> Pieces | None:
    """Up to the first scan only tables, the frame, how colours are coded and the orientation are left."""
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
            raise ValueError("too much that is no segment")
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
                    in_exif = orientation.in_exif(bytes(content)) or 0
                elif in_xmp is None and bytes(content[:29]) == b"http://ns.adobe.com/xap/1.0/\0":
                    in_xmp = orientation.in_xmp(content)
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
        exif = b"Exif\0\0" + orientation.as_exif(turned)
        pieces.append(b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif)
    pieces.append(view[start:])
    return pieces if dropped else None


def _says_how_colours_are_coded(marker: int, content: memoryview) -> bool:
    """At least as long as libjpeg wants it."""
    if marker == 0xE0:
        return bytes(content[:5]) == b"JFIF\0" and len(content) >= 14
    return marker == 0xEE and bytes(content[:5]) == b"Adobe" and len(content) >= 12


def max_scans(pixels: int) -> int:
    """Each scan is a pass over all pixels, and an empty one takes but a few bytes. Encoders write about ten."""
    return max(MAX_SCANS_OF_LARGE, MAX_SCANS * min(_LARGE, pixels) // max(1, pixels))


def _check_scans(data: bytes, at: int, pixels: int) -> None:
    """Of the image alone: what follows it, or stands within other segments, is none."""
    most = max_scans(pixels)
    if data.count(b"\xff\xda", at) <= most:  # a fast look, which also counts what is no scan
        return
    count = 0
    for _ in counted("JPEG", MAX_SEGMENTS):
        found = _MARKER.search(data, at)
        if found is None or data[found.start() + 1] == _END:
            return
        count += data[found.start() + 1] == _SCAN
        if count > most:
            raise PictureProblem(f"it is a JPEG of {pixels} pixels and more than {most} scans")
        at = found.end() + max(2, int.from_bytes(data[found.end() : found.end() + 2], "big"))
