"""Hostile images, made by code."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Iterator

from PIL import Image

from tests.attack import costly
from tests.attack.target import encoded

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF")


def _saved(form: str) -> bytes:
    return encoded(Image.effect_noise((16, 16), 60).convert("RGB"), form)


def good() -> Iterator[tuple[str, bytes]]:
    """Small images that are answered, by name."""
    for form in FORMATS:
        yield form, _saved(form)


def hostile() -> Iterator[tuple[str, bytes]]:
    """Images that cost more than they look, by name. Each may be answered or refused."""
    yield "JPEG of 400,000 segments", costly.segments(400_000)
    yield "JPEG of 100,000 segments", costly.segments(100_000)
    png = _saved("PNG")
    chunk = struct.pack(">I", 4) + b"tEXta\0bc" + struct.pack(">I", zlib.crc32(b"tEXta\0bc"))
    yield "PNG of 300,000 chunks", png[:33] + chunk * 300_000 + png[33:]
    yield "PNG of 30,000 x 30,000", png[:16] + _size(30_000, 30_000) + png[33:]
    yield "GIF of 100,000 comments", _saved("GIF")[:-1] + b"!\xfe\x01a\x00" * 100_000 + b";"
    yield "TIFF of 200,000 strips", costly.strips(200_000)
    yield "TIFF of a fax", costly.fax(200_000)
    for form in FORMATS:
        yield f"{form}, cut", _saved(form)[: len(_saved(form)) // 2]


def _size(width: int, height: int) -> bytes:
    fields = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return fields[4:] + struct.pack(">I", zlib.crc32(fields))


def mutations(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Small images with a few bytes changed, left out or put in twice, the same for the same seed; and their names."""
    chance = random.Random(seed)
    originals = list(good())
    for number in range(count):
        name, original = originals[number % len(originals)]
        data = bytearray(original)
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
        yield f"{name} #{number}", bytes(data)
