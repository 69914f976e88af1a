"""TIFF and BigTIFF: directories of entries that describe how and where the pixels are stored (TIFF 6.0).

EXIF, which holds the orientation in other formats, is such a directory as well.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from handlers.images import (
    MAX_PARTS,
    MAX_PARTS_FOR_SIZE,
    ImageProblem,
    Pieces,
    Size,
    check_count,
    check_pixels,
)

MAX_STRIPS = 2**17
"""Greatest number of strips or tiles. libtiff takes about 40 bytes and a microsecond for each."""

_FEW_STRIPS = 64
_FEW_PIECES = 2**12
"""Where Pillow creates an object for each strip or tile, this many are accepted, and one more for each 64 pixels."""

_MAX_VALUES = 64
_MAX_PIXEL_BYTES = 32
_YCBCR = 6
_MAX_TILE_PIXELS = 2**22

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_OFFSETS, _SAMPLES, _ROWS, _SIZES, _PLANAR = 273, 277, 278, 279, 284
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_SIZES = 322, 323, 324, 325
_PALETTE, _JPEG_TABLES = 320, 347

_PIXELS = {
    *range(256, 260), 262, 266, 273, 274, *range(277, 280), 284, 292, 293, 317, *range(320, 326), 332, 334, 338, 339,
    347, *range(512, 522), *range(529, 533),
}  # fmt: skip
"""Tags that describe how pixels are stored, and 274, the orientation (TIFF 6.0, and its technical notes on JPEG)."""

_LONG_VALUES = {_PALETTE: 3 * 2**16, _JPEG_TABLES: 2**16, 519: 2**10, 520: 2**10, 521: 2**10}
"""Tags that may have more than _MAX_VALUES values -> their greatest number. Strips and tiles are counted separately."""

_NUMBERS = {1: "B", 3: "H", 4: "L", 6: "b", 8: "h", 9: "l", 13: "L", 16: "Q"}
"""Types of integers, with their codes for `struct`."""

_SIZE_TYPES = (3, 4, 16)

_ORIENTATION = 0x0112
_IN_XMP = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
MAX_TEXT = 2**20
"""Bytes of one text, unpacked, that are searched for an orientation."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a file stores directories. order: byte order in the notation of `struct`. big: whether it is a BigTIFF."""

    order: str
    big: bool

    @property
    def word(self) -> str:
        return "Q" if self.big else "L"

    @property
    def entry_bytes(self) -> int:
        return 20 if self.big else 12

    @property
    def count(self) -> str:
        return self.order + ("Q" if self.big else "H")

    def entry(self, tag: int, kind: int, count: int, value: bytes) -> bytes:
        return struct.pack(self.order + "HH" + self.word, tag, kind, count) + value.ljust(8 if self.big else 4, b"\0")


def size(data: bytes) -> Size:
    """Read the size from the first directory."""
    layout, start, count = _first_directory(data)
    entries: dict[int, bytes] = {}
    for at in range(start, start + min(count, MAX_PARTS_FOR_SIZE) * layout.entry_bytes, layout.entry_bytes):
        entry = data[at : at + layout.entry_bytes]
        tag, kind = struct.unpack_from(layout.order + "HH", entry)
        if tag in (_WIDTH, _HEIGHT) and kind in _SIZE_TYPES:
            entries.setdefault(tag, entry)
    directory = _Directory(data, layout, entries)
    return directory.single(_WIDTH, 0), directory.single(_HEIGHT, 0)


def _first_directory(data: bytes) -> tuple[_Layout, int, int]:
    """Return the layout, the position of the first entry, and the number of entries."""
    layout = _Layout("<" if data.startswith(b"II") else ">", data[2:4] in (b"+\0", b"\0+"))
    (offset,) = struct.unpack_from(layout.order + layout.word, data, 8 if layout.big else 4)
    (count,) = struct.unpack_from(layout.count, data, offset)
    return layout, offset + struct.calcsize(layout.count), count


def reduced(data: bytes, max_pixels: int) -> Pieces | None:
    """Rewrite the first directory in its place with fewer entries, none longer than necessary.

    Uncompressed strips are joined to one, because Pillow creates an object for each.
    """
    layout, start, count = _first_directory(data)
    if count > MAX_PARTS:
        raise ImageProblem(f"its TIFF data has more than {MAX_PARTS} parts")
    entries: dict[int, bytes] = {}
    for at in range(start, start + count * layout.entry_bytes, layout.entry_bytes):
        entry = data[at : at + layout.entry_bytes]
        if len(entry) < layout.entry_bytes:
            break  # decoders use the entries that are complete
        (tag,) = struct.unpack_from(layout.order + "H", entry)
        if tag in _PIXELS:
            entries.setdefault(tag, entry)
    kept = dict(entries)
    end = start + len(kept) * layout.entry_bytes + struct.calcsize(layout.order + layout.word)
    appended = _Directory(data, layout, kept).shorten(max_pixels, max(len(data), end))
    if len(kept) == count and kept == entries:
        return None
    last = struct.pack(layout.order + layout.word, 0)
    table = b"".join([struct.pack(layout.count, len(kept)), *kept.values(), last])
    view = memoryview(data)
    offset = start - struct.calcsize(layout.count)
    return [view[:offset], table, view[offset + len(table) :], appended]


@dataclass(frozen=True, slots=True)
class _Directory:
    data: bytes
    layout: _Layout
    entries: dict[int, bytes]

    def described(self, tag: int) -> tuple[int, int, int]:
        """Return the type, the number of values, and the offset of the value in the entry."""
        kind, count = struct.unpack_from(self.layout.order + "H" + self.layout.word, self.entries[tag], 2)
        return kind, count, 12 if self.layout.big else 8

    def values(self, tag: int, most: int) -> Sequence[int]:
        """Return the first `most` values; none if the tag is missing or does not hold integers."""
        if tag not in self.entries:
            return ()
        kind, count, inside = self.described(tag)
        code = _NUMBERS.get(kind)
        if code is None:
            return ()
        layout = struct.Struct(f"{self.layout.order}{min(count, most)}{code}")
        entry = self.entries[tag]
        if count * struct.calcsize("=" + code) <= len(entry) - inside:
            return layout.unpack_from(entry, inside)
        (place,) = struct.unpack_from(self.layout.order + self.layout.word, entry, inside)
        return layout.unpack_from(self.data, place)

    def single(self, tag: int, default: int) -> int:
        return next(iter(self.values(tag, 1)), default)

    def shorten(self, max_pixels: int, end: int) -> bytes:
        """Shorten the entries, and return what is to be appended to the file, which ends at `end`.

        Raises:
            ImageProblem: The image would cost more than its pixels are worth.
        """
        width, height = self.single(_WIDTH, 0), self.single(_HEIGHT, 0)
        if min(width, height) < 1:
            raise ValueError("no size")
        check_pixels(width, height, max_pixels)
        tile = self.single(_TILE_WIDTH, 0) * self.single(_TILE_HEIGHT, 0)
        check_count("TIFF", "pixels in a tile", tile, max(_MAX_TILE_PIXELS, width * height))
        for tag in self.entries:
            if tag not in (_OFFSETS, _SIZES, _TILE_OFFSETS, _TILE_SIZES):
                _, count, _ = self.described(tag)
                check_count("TIFF", f"values of tag {tag}", count, _LONG_VALUES.get(tag, _MAX_VALUES))
        planes = self.single(_SAMPLES, 1) if self.single(_PLANAR, 1) == 2 else 1
        rows = max(1, min(height, self.single(_ROWS, height)))
        strips = -(-height // rows) * planes
        across = -(-width // max(1, self.single(_TILE_WIDTH, 1)))
        tiles = across * -(-height // max(1, self.single(_TILE_HEIGHT, 1))) * planes
        raw = self.single(_COMPRESSION, 1) == 1
        joined = raw and planes == 1 and self.single(_PHOTOMETRIC, 0) != _YCBCR
        few = min(MAX_STRIPS, _FEW_PIECES + width * height // 64)
        for tag in (_OFFSETS, _SIZES):
            self._cut(tag, "strips", strips, few if raw and not joined else MAX_STRIPS)
        for tag in (_TILE_OFFSETS, _TILE_SIZES):
            self._cut(tag, "tiles", tiles, few if raw else MAX_STRIPS)
        if joined and strips > _FEW_STRIPS and _OFFSETS in self.entries:
            return self._join(width, height, rows, strips, end)
        return b""

    def _cut(self, tag: int, what: str, wanted: int, most: int) -> None:
        """Cut the entry to one value for each strip or tile of the image."""
        if tag not in self.entries:
            return
        kind, count, inside = self.described(tag)
        check_count("TIFF", what, count if kind not in _NUMBERS else min(count, wanted), most)
        if count > max(wanted, _FEW_STRIPS):
            value = self.entries[tag][inside:]
            code = f"{self.layout.order}{wanted}{_NUMBERS.get(kind, 'B')}"
            if struct.calcsize(code) <= len(value):
                value = struct.pack(code, *self.values(tag, wanted))
            self.entries[tag] = self.layout.entry(tag, kind, wanted, value)

    def _join(self, width: int, height: int, rows: int, count: int, end: int) -> bytes:
        """Join the strips: where they are, if they are adjacent, else in a copy at `end`."""
        offsets = self.values(_OFFSETS, count)
        bits = self.values(_BITS, _MAX_VALUES) or (1,)
        row_bits = width * (sum(bits) if len(bits) > 1 else bits[0] * self.single(_SAMPLES, 1))
        row_bytes = -(-row_bits // 8)
        if len(offsets) < count or not 0 < row_bytes <= width * _MAX_PIXEL_BYTES:
            raise ValueError("strips are missing, or pixels are larger than any decoder reads")
        strip_bytes, image_bytes = rows * row_bytes, height * row_bytes
        first, joined = offsets[0], b""
        if offsets != tuple(range(first, first + count * strip_bytes, strip_bytes)):
            last_bytes = image_bytes - (count - 1) * strip_bytes
            if max(*offsets[:-1], offsets[-1] + last_bytes - strip_bytes) + strip_bytes > len(self.data):
                raise ValueError("strips are cut short")
            view = memoryview(self.data)
            joined = b"".join(view[place : place + strip_bytes] for place in offsets)[:image_bytes]
            first = end
        for tag, value in ((_OFFSETS, first), (_ROWS, height), (_SIZES, image_bytes)):
            if tag in self.entries:
                number = struct.pack(self.layout.order + self.layout.word, value)
                self.entries[tag] = self.layout.entry(tag, 16 if self.layout.big else 4, 1, number)
        return joined


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
    table = exif[offset + 2 : offset + 2 + count * 12]
    whole = table[: len(table) // 12 * 12]
    for tag, kind, number, value in struct.iter_unpack(order + "HHL4s", whole):
        if tag == _ORIENTATION:
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
    return struct.pack(">2sHLHHHLHHL", b"MM", 42, 8, 1, _ORIENTATION, 3, 1, orientation, 0, 0)
