"""Images that cost far more than their bytes, one for each way in which a decoder was held up."""

from __future__ import annotations

import io
import random
import struct

from PIL import Image


def segments(count: int) -> bytes:
    """A JPEG of 16 x 16 pixels with so many EXIF segments of a few bytes."""
    buffer = io.BytesIO()
    Image.effect_noise((16, 16), 60).convert("RGB").save(buffer, "JPEG")
    data = buffer.getvalue()
    return data[:2] + (b"\xff\xe1" + struct.pack(">H", 18) + b"Exif\0\0" + bytes(10)) * count + data[2:]


def strips(rows: int) -> bytes:
    """A TIFF one pixel wide, with a strip for each row."""
    offsets = struct.pack("<I", 8) * rows
    lengths = struct.pack("<I", 1) * rows
    entries = [
        (256, 4, 1, 1), (257, 4, 1, rows), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
        (273, 4, rows, 9), (278, 4, 1, 1), (279, 4, rows, 9 + 4 * rows),
    ]  # fmt: skip
    return _tiff(entries, b"\0" + offsets + lengths)


def fax(size: int) -> bytes:
    """A TIFF with so many bytes that are not the fax they are said to be: libtiff complains about each row."""
    rows = 100_000
    entries = [
        (256, 4, 1, 16), (257, 4, 1, rows), (258, 3, 1, 1), (259, 3, 1, 3), (262, 3, 1, 0),
        (273, 4, 1, 8), (278, 4, 1, rows), (279, 4, 1, size),
    ]  # fmt: skip
    return _tiff(entries, random.Random(1).randbytes(size))


def _tiff(entries: list[tuple[int, int, int, int]], data: bytes) -> bytes:
    """entries: tag, type, count, value."""
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + bytes(4)
