"""AVIF: boxes within boxes (ISO/IEC 14496-12), items that are images (23008-12) and AV1 data (AOM's AVIF 1.1)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from handlers.images import (
    MAX_PARTS_FOR_SIZE,
    ImageProblem,
    Pieces,
    Size,
    check_count,
    check_pixels,
    counted,
    too_many_pixels,
)

MAX_ITEMS = 2**12
"""Greatest number of images, tiles and metadata; libavif searches all of them for each."""

MAX_FRAMES = 2**14
"""Greatest number of frames of a sequence without a still image; libavif creates an object for each."""

_MAX_ITEM_FRAMES = 8  # an image is coded in up to four layers
_MAX_REFERENCE_BYTES = 2**16
_SPARE_PIXELS = 2**22

_SEQUENCE_HEADER, _FRAME_HEADER, _FRAME = 1, 3, 6

_Box = tuple[bytes, int, int]
"""Name, start and end of the content."""


def size(data: bytes) -> Size:
    """Return the largest of the items' sizes (`ispe`: ISO/IEC 23008-12, section 6.5.3)."""
    largest: Size = None
    at = 0
    for _ in range(MAX_PARTS_FOR_SIZE):
        at = data.find(b"ispe", at, 2**16)
        if at < 0:
            break
        width, height = struct.unpack_from(">II", data, at + 8)
        if largest is None or width * height > largest[0] * largest[1]:
            largest = width, height
        at += 4
    return largest


def reduced(data: bytes, max_pixels: int) -> Pieces | None:
    """Keep only the still image, if there is one, without EXIF and XMP: AVIF's own boxes contain the orientation.

    Boxes refer to each other by position, so nothing is moved: what is not needed is renamed to a name that no decoder
    reads. The decoder allocates what the coded data says, not what the boxes say, so both are checked.
    """
    parts = counted("AVIF")
    renamed: dict[int, bytes] = {}
    moov: _Box | None = None
    for name, start, end in _boxes(data, 0, len(data), parts):
        if name == b"ftyp":
            for at in (start, *range(start + 8, min(end, start + 1024) - 3, 4)):
                if data[at : at + 4] == b"avis":  # the brand of a sequence
                    renamed[at] = b"avif"
        elif name == b"moov" and moov is None:
            moov = (name, start, end)
        elif name == b"meta":
            inner = {box[0]: box for box in _boxes(data, start + 4, end, parts)}
            if inner.keys() >= {b"pitm", b"iinf", b"iloc", b"iprp"}:
                _check_items(data, inner, renamed, max_pixels, parts)
                if moov:
                    renamed[moov[1] - 4] = b"free"
                if not renamed:
                    return None
                copy = bytearray(data)
                for at, name in renamed.items():
                    copy[at : at + 4] = name
                return [copy]
    if moov is None:
        raise ValueError("no image")
    _check_tracks(data, moov, max_pixels, parts)
    return None


def _boxes(data: bytes, at: int, end: int, parts: Iterator[None]) -> Iterator[_Box]:
    for _ in parts:
        if at + 8 > end:
            return
        size, name = struct.unpack_from(">L4s", data, at)
        start = at + 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, start)
            start += 8
        at = at + size if size else end
        if at < start:
            raise ValueError("a box that is smaller than its header")
        yield name, start, min(at, end)


def _check_items(
    data: bytes, meta: dict[bytes, _Box], renamed: dict[int, bytes], max_pixels: int, parts: Iterator[None]
) -> None:
    """Check the items, and add those that no decoder needs to `renamed`: position -> the name to write there."""
    kinds: dict[int, bytes] = {}
    _, start, end = meta[b"iinf"]
    for name, at, stop in _boxes(data, start + (8 if data[start] else 6), end, parts):
        if name == b"infe" and stop - at >= 12:
            wide = data[at] > 2
            number = int.from_bytes(data[at + 4 : at + (8 if wide else 6)], "big")
            place = at + (10 if wide else 8)
            kinds[number] = data[place : place + 4]
            check_count("AVIF", "items", len(kinds), MAX_ITEMS)
            if kinds[number] in (b"Exif", b"mime"):
                renamed[place] = b"skip"
    if b"iref" in meta:
        _, start, end = meta[b"iref"]
        check_count("AVIF", "bytes of references", end - start, _MAX_REFERENCE_BYTES)
    pixels = _check_properties(data, meta, max_pixels, parts)
    most = 4 * pixels + _SPARE_PIXELS
    coded = 0
    for number, content in _contents(data, meta, parts):
        if kinds.get(number) != b"av01":
            continue
        coded += _coded_pixels(content, max_pixels, parts)
        check_count("AVIF", f"coded pixels for an image of {pixels}", coded, most)


def _check_properties(data: bytes, meta: dict[bytes, _Box], max_pixels: int, parts: Iterator[None]) -> int:
    """Return the pixels of the largest image that the properties mention."""
    largest = associated = 0
    _, start, end = meta[b"iprp"]
    for name, at, stop in _boxes(data, start, end, parts):
        if name == b"ipco":
            for kind, place, _ in _boxes(data, at, stop, parts):
                if kind == b"ispe":
                    width, height = struct.unpack_from(">LL", data, place + 4)
                    check_pixels(width, height, max_pixels)
                    largest = max(largest, width * height)
        elif name == b"ipma":
            associated += struct.unpack_from(">L", data, at + 4)[0]
            check_count("AVIF", "items with properties", associated, MAX_ITEMS)
    return largest


def _contents(data: bytes, meta: dict[bytes, _Box], parts: Iterator[None]) -> Iterator[tuple[int, memoryview]]:
    """Yield (number, content) of each item whose position is known."""
    reader = _Reader(data, *meta[b"iloc"][1:])
    version = reader.number(1)
    reader.number(3)
    sizes, more = reader.number(1), reader.number(1)
    count = reader.number(2 if version < 2 else 4)
    check_count("AVIF", "items", count, MAX_ITEMS)
    view, copied = memoryview(data), 0
    for _ in range(count):
        number = reader.number(2 if version < 2 else 4)
        method = reader.number(2) & 15 if version else 0
        reader.number(2)
        base = reader.number(more >> 4)
        if method == 1 and b"idat" in meta:
            base += meta[b"idat"][1]
        pieces = []
        for _ in range(reader.number(2)):
            if next(parts, 0) == 0:
                break
            if version:
                reader.number(more & 15)
            start, length = base + reader.number(sizes >> 4), reader.number(sizes & 15)
            if start + length > len(data):
                raise ImageProblem("its AVIF data is truncated: the image is not complete")
            pieces.append(view[start : start + length])
        if len(pieces) > 1:
            copied += sum(map(len, pieces))
            check_count("AVIF", "bytes in items of several pieces", copied, len(data))
            yield number, memoryview(b"".join(pieces))
        elif pieces:
            yield number, pieces[0]


@dataclass(slots=True)
class _Reader:
    data: bytes
    at: int
    end: int

    def number(self, size: int) -> int:
        """Read the next `size` bytes, big-endian."""
        if self.at + size > self.end:
            raise ValueError("a box is cut short")
        self.at += size
        return int.from_bytes(self.data[self.at - size : self.at], "big")


def _check_tracks(data: bytes, moov: _Box, max_pixels: int, parts: Iterator[None]) -> None:
    """Check, for each track with tables of samples, how many there are, and how large the first is."""
    for table in _within(data, moov, (b"trak", b"mdia", b"minf", b"stbl"), parts):
        boxes = {box[0]: box for box in _boxes(data, *table[1:], parts)}
        wide = b"co64" in boxes
        if not {b"stsz", b"stsc"} <= {*boxes} or not (wide or b"stco" in boxes):
            raise ValueError("a table of samples is missing")
        size, count, first_size = struct.unpack_from(">3L", data, boxes[b"stsz"][1] + 4)
        check_count("AVIF", "frames", count, MAX_FRAMES)
        place = boxes[b"co64" if wide else b"stco"][1] + 4
        chunks, first = struct.unpack_from(">LQ" if wide else ">LL", data, place)
        _, start, end = boxes[b"stsc"]
        runs = [*struct.iter_unpack(">3L", data[start + 8 : end - (end - start - 8) % 12])]
        samples = 0
        for i, (chunk, per_chunk, _) in enumerate(runs):
            following = runs[i + 1][0] if i + 1 < len(runs) else chunks + 1
            samples += max(0, following - chunk) * per_chunk
        check_count("AVIF", "frames", samples, MAX_FRAMES)
        _coded_pixels(memoryview(data)[first : first + (size or first_size)], max_pixels, parts)


def _within(data: bytes, box: _Box, path: tuple[bytes, ...], parts: Iterator[None]) -> Iterator[_Box]:
    if not path:
        yield box
        return
    for inner in _boxes(data, *box[1:], parts):
        if inner[0] == path[0]:
            yield from _within(data, inner, path[1:], parts)


def _coded_pixels(data: memoryview, max_pixels: int, parts: Iterator[None]) -> int:
    """Return the pixels of the largest frame that AV1 data allows; `parts` counts the units.

    See the AV1 bitstream specification, sections 5.3 to 5.5.

    Raises:
        ImageProblem: There are too many frames or pixels.
        IndexError or ValueError: The data is cut short.
    """
    at = largest = frames = 0
    for _ in parts:
        if at >= len(data):
            break
        header = data[at]
        kind, at = header >> 3 & 15, at + (2 if header & 4 else 1)
        size = len(data) - at
        if header & 2:
            size, at = _leb128(data, at)
        unit = data[at : at + size]
        at += size
        if kind == _SEQUENCE_HEADER:
            largest = max(largest, _frame_pixels(bytes(unit[:512])))
        frames += kind in (_FRAME_HEADER, _FRAME)
    check_count("AVIF", "frames in an item", frames, _MAX_ITEM_FRAMES)
    if largest > max_pixels:
        raise too_many_pixels(max_pixels)
    return largest


def _leb128(data: memoryview, at: int) -> tuple[int, int]:
    """Return the number, and the position after it."""
    value = 0
    for i in range(8):
        value |= (data[at + i] & 127) << 7 * i
        if not data[at + i] & 128:
            return value, at + i + 1
    raise ValueError("a length of more than eight bytes")


class _Bits:
    def __init__(self, data: bytes) -> None:
        self._value = int.from_bytes(data, "big")
        self._left = 8 * len(data)

    def read(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            raise ValueError("the sequence header is cut short")
        return self._value >> self._left & (1 << count) - 1

    def skip_variable_length(self) -> None:
        zeros = 0
        while not self.read(1):
            zeros += 1
        if zeros < 32:
            self.read(zeros)


def _frame_pixels(header: bytes) -> int:
    """Return the width times the height of the largest frame."""
    bits = _Bits(header)
    bits.read(3 + 1)  # profile, still picture
    if bits.read(1):  # reduced header
        bits.read(5)
    else:
        _skip_operating_points(bits)
    width_bits, height_bits = bits.read(4) + 1, bits.read(4) + 1
    return (bits.read(width_bits) + 1) * (bits.read(height_bits) + 1)


def _skip_operating_points(bits: _Bits) -> None:
    delay_bits = 0
    if bits.read(1):  # timing
        bits.read(32 + 32)
        if bits.read(1):
            bits.skip_variable_length()
        if bits.read(1):  # decoder model
            delay_bits = bits.read(5) + 1
            bits.read(32 + 5 + 5)
    display_delay = bits.read(1)
    for _ in range(bits.read(5) + 1):
        bits.read(12)
        if bits.read(5) > 7:
            bits.read(1)
        if delay_bits and bits.read(1):
            bits.read(2 * delay_bits + 1)
        if display_delay and bits.read(1):
            bits.read(4)
