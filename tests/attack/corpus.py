"""Hostile images, made by code."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Iterator

from PIL import Image

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF")


def _saved(form: str, size: tuple[int, int] = (16, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 60).convert("RGB").save(buffer, form)
    return buffer.getvalue()


def good() -> Iterator[tuple[str, bytes]]:
    """Small images that are answered, by name."""
    for form in FORMATS:
        yield form, _saved(form)


def hostile() -> Iterator[tuple[str, bytes]]:
    """Images that cost more than they look, by name. Each may be answered or refused."""
    jpeg = _saved("JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", 18) + b"Exif\0\0" + bytes(10)
    yield "JPEG of 400,000 segments", jpeg[:2] + segment * 400_000 + jpeg[2:]
    yield "JPEG of 100,000 segments", jpeg[:2] + segment * 100_000 + jpeg[2:]
    png = _saved("PNG")
    chunk = struct.pack(">I", 4) + b"tEXta\0bc" + struct.pack(">I", zlib.crc32(b"tEXta\0bc"))
    yield "PNG of 300,000 chunks", png[:33] + chunk * 300_000 + png[33:]
    yield "PNG of 30,000 x 30,000", png[:16] + _size(30_000, 30_000) + png[33:]
    yield "GIF of 100,000 comments", _saved("GIF")[:-1] + b"!\xfe\x01a\x00" * 100_000 + b";"
    yield "TIFF of 200,000 strips", _strips(200_000)
    yield "TIFF of a fax", _fax(200_000)
    for form in FORMATS:
        yield f"{form}, cut", _saved(form)[: len(_saved(form)) // 2]


def _size(width: int, height: int) -> bytes:
    fields = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return fields[4:] + struct.pack(">I", zlib.crc32(fields))


def _tiff(entries: list[tuple[int, int, int, int]], data: bytes) -> bytes:
    """entries: tag, type, count, value."""
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + bytes(4)


def _strips(rows: int) -> bytes:
    offsets = struct.pack("<I", 8) * rows
    lengths = struct.pack("<I", 1) * rows
    entries = [
        (256, 4, 1, 1), (257, 4, 1, rows), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
        (273, 4, rows, 9), (278, 4, 1, 1), (279, 4, rows, 9 + 4 * rows),
    ]  # fmt: skip
    return _tiff(entries, b"\0" + offsets + lengths)


def _fax(size: int) -> bytes:
    rows = 100_000
    entries = [
        (256, 4, 1, 16), (257, 4, 1, rows), (258, 3, 1, 1), (259, 3, 1, 3), (262, 3, 1, 0),
        (273, 4, 1, 8), (278, 4, 1, rows), (279, 4, 1, size),
    ]  # fmt: skip
    return _tiff(entries, random.Random(1).randbytes(size))


def mutations(seed: int, count: int) -> Iterator[bytes]:
    """Small images with a few bytes changed, left out or put in twice, the same for the same seed."""
    chance = random.Random(seed)
    originals = [data for _, data in good()]
    for number in range(count):
        data = bytearray(originals[number % len(originals)])
        for _ in range(chance.randint(1, 8)):
            place = chance.randrange(len(data))
            match chance.randrange(4):
                case 0:
                    data[place] = chance.randrange(256)
                case 1:
                    data[place : place + 4] = chance.choice(
                        (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff")
                    )
                case 2:
                    del data[place : place + chance.randint(1, 40)]
                case _:
                    data[place:place] = data[place : place + chance.randint(1, 40)]
            data = data or bytearray(b"\0")
        yield bytes(data)
