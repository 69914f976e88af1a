"""Hostile TIFF and AVIF images, whose structure is tables of places and counts."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

from PIL import Image, ImageOps

from tests.attack.containers import (
    Entry,
    av1_image,
    avif,
    box,
    grey_tiff,
    grid,
    ifd,
    tiff,
    tiff_start,
)
from tests.attack.samples import (
    MEGA,
    avif_grid,
    deflated_zeros,
    encoded,
    photo,
    progressive,
    resized_jpeg,
    strips_tiff,
    tiled_tiff,
    tracks_alone,
)

SIDE = 9000
"""An image of this width and height is just within the default limit of pixels."""


def _fax_tiff(compression: int, size: int, rows: int = 60_000) -> bytes:
    body = random.Random(11).randbytes(size)
    entries: dict[int, Any] = {
        256: (4, [1400]), 257: (4, [rows]), 258: (3, [1]), 259: (3, [compression]), 262: (3, [0]),
        273: (4, [tiff_start()]), 277: (3, [1]), 278: (4, [rows]), 279: (4, [size]),
    }  # fmt: skip
    return tiff(entries, body)


def _one_strip_tiff(width: int, height: int, compression: int, body: bytes, **more: Any) -> bytes:
    entries = grey_tiff(width, height, compression) | {
        273: (4, [tiff_start()]), 278: (4, [height]), 279: (4, [len(body)]), **{int(k[1:]): v for k, v in more.items()},
    }  # fmt: skip
    return tiff(entries, body)


_TINY_PAGE: list[Entry] = [
    (256, 4, 1, b"\1"), (257, 4, 1, b"\1"), (258, 3, 1, b"\x08"), (259, 3, 1, b"\1"), (262, 3, 1, b"\1"),
    (273, 4, 1, b"\x08"), (277, 3, 1, b"\1"), (278, 4, 1, b"\1"), (279, 4, 1, b"\1"),
]  # fmt: skip


def _directories(count: int, one: Callable[[int], bytes]) -> bytes:
    """one: a directory that names the place of the next."""
    size = len(one(0))
    places = (8 + size * ((number + 1) % count) for number in range(count))
    return struct.pack("<2sHL", b"II", 42, 8) + b"".join(map(one, places))


def _tiff_chain(count: int) -> bytes:
    """Directories that follow one another, each of them a whole image, and at last the first again."""
    table = ifd(_TINY_PAGE)[:-4]
    return _directories(count, lambda following: table + struct.pack("<L", following))


def _tiff_nested(depth: int) -> bytes:
    """Directories within directories, the last of which leads back to the first."""
    table = ifd([*_TINY_PAGE, (330, 13, 1, b"SUBS"), (34665, 13, 1, b"EXIF")])
    return _directories(
        depth,
        lambda inner: table.replace(b"SUBS", struct.pack("<L", inner)).replace(b"EXIF", struct.pack("<L", inner)),
    )


def _tiff_counts(tag: int, kind: int, count: int) -> bytes:
    """An ordinary image with one entry more, whose value is very long, and within the file."""
    data = zlib.compress(bytes(16 * 16))
    entries: dict[int, Any] = grey_tiff(16, 16, 8) | {
        273: (4, [tiff_start()]), 278: (4, [16]), 279: (4, [len(data)]),
        tag: (kind, range(count) if kind == 4 else bytes(count)),
    }  # fmt: skip
    return tiff(entries, data)


def _one_row_strips(rows: int, *, big: bool = False, compression: int = 1, samples: int = 1) -> bytes:
    """One pixel wide, one strip for each row: all at the same place."""
    entries = grey_tiff(1, rows, compression) | {273: (4, [8] * rows), 278: (3, [1]), 279: (4, [1] * rows)}
    entries |= {258: (3, [8] * samples), 277: (3, [samples])}
    return tiff(entries, bytes(16), big=big)


def _tiles_of_a_pixel(side: int) -> bytes:
    entries = grey_tiff(side, side) | {322: (4, [1]), 323: (4, [1])}
    entries |= {324: (4, [tiff_start()] * side * side), 325: (4, [1] * side * side)}
    return tiff(entries, bytes(16))


def _old_jpeg_tiff() -> bytes:
    data = encoded(photo(64, 64), "JPEG")
    entries: dict[int, Any] = grey_tiff(SIDE, SIDE, 6) | {
        258: (3, [8, 8, 8]), 262: (3, [6]), 277: (3, [3]), 273: (4, [tiff_start()]), 278: (4, [SIDE]),
        279: (4, [len(data)]), 512: (3, [1]), 513: (4, [tiff_start()]), 514: (4, [len(data)]),
    }  # fmt: skip
    return tiff(entries, data)


def _avif_items(count: int, kind: bytes = b"mime") -> bytes:
    _, frame = av1_image(64, 64)
    return avif(64, 64, [(1, b"av01", frame), *((2 + i, kind, b"") for i in range(count))])


def _avif_boxes(depth: int) -> bytes:
    """Boxes within boxes, in a file that is otherwise sound."""
    _, frame = av1_image(64, 64)
    inner = b""
    for _ in range(depth):
        inner = box(b"udta", inner)
    return avif(64, 64, [(1, b"av01", frame)], inner)


def _avif_sequence(changes: Callable[[bytes], bytes]) -> bytes:
    frames = [photo(64, 64), ImageOps.mirror(photo(64, 64))]
    return changes(encoded(frames[0], "AVIF", save_all=True, append_images=frames[1:]))


def _table_count(name: bytes, at: int, value: int) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        place = data.index(name) + at
        return data[:place] + struct.pack(">L", value) + data[place + 4 :]

    return change


def _long_sequence(samples: int) -> bytes:
    """An AVIF sequence whose tables list very many samples in very few bytes."""
    return _avif_sequence(lambda data: _table_count(b"stts", 12, samples)(_table_count(b"stsz", 12, samples)(data)))


def _first_header(data: bytes) -> bytes:
    """The AV1 sequence header at the beginning of the coded data."""
    start = data.index(b"\x0a", data.index(b"mdat"))
    return data[start : start + 2 + data[start + 1]]


_HUGE_HEADER = b"\x0a\x0d" + int("0" * 29 + "1" * 40 + "0" * 35, 2).to_bytes(13, "big")
"""An AV1 sequence header that allows frames of 65,536 x 65,536 pixels."""


def _avif_lying(side: int, size: int = 64) -> bytes:
    """The coded frame is much larger than what the file says."""
    _, frame = av1_image(side, side)
    return avif(size, size, [(1, b"av01", frame)], coded=(side, side))


def _avif_grid_of_one(rows: int, columns: int) -> bytes:
    """Every tile of the grid is the same item."""
    _, frame = av1_image(64, 64)
    size = (min(columns * 64, 2**16), min(rows * 64, 2**16))
    items = [(1, b"grid", grid(rows, columns, *size)), (2, b"av01", frame)]
    return avif(*size, items, tiles=[2] * (rows * columns), tile_size=(64, 64))


TIFF_AND_AVIF: dict[str, Callable[[], bytes]] = {
    # TIFF
    "TIFF of 2,000,000 strips": lambda: _one_row_strips(2_000_000),
    "TIFF of 2,000,000 compressed strips": lambda: _one_row_strips(2_000_000, compression=8),
    "BigTIFF of 1,000,000 strips": lambda: _one_row_strips(1_000_000, big=True),
    "TIFF of 2,000,000 tiles": lambda: tiled_tiff(16 * 2000, 16 * 1000, 16),
    "TIFF of 65,535 tiles of a pixel": lambda: _tiles_of_a_pixel(256),
    "TIFF of 65,535 entries": lambda: (
        struct.pack("<2sHL", b"II", 42, 8) + ifd([(256 + i % 60_000, 4, 1, b"\1") for i in range(65_535)])
    ),
    "BigTIFF of 400,000 entries": lambda: (
        struct.pack("<2sHHHQ", b"II", 43, 8, 0, 16) + ifd([(273, 4, 1, b"\1")] * 400_000, big=True)
    ),
    "TIFF of 70,000 directories": lambda: _tiff_chain(70_000),
    "TIFF of a directory that follows itself": lambda: _tiff_chain(1),
    "TIFF of 60,000 nested directories": lambda: _tiff_nested(60_000),
    "TIFF of directories that lead to themselves": lambda: _tiff_nested(1),
    "TIFF of 2,000,000 numbers in one entry": lambda: _tiff_counts(258, 4, 2_000_000),
    "TIFF of 2,000,000 strips that it does not need": lambda: _tiff_counts(324, 4, 2_000_000),
    "TIFF of a long palette": lambda: _tiff_counts(320, 4, 1_000_000),
    "TIFF of long JPEG tables": lambda: _tiff_counts(347, 7, 8_000_000),
    "TIFF of a lying count": lambda: _one_strip_tiff(16, 16, 1, bytes(256)).replace(
        struct.pack("<HHL", 273, 4, 1), struct.pack("<HHL", 273, 4, 2**32 - 1)
    ),
    "TIFF of a huge tile": lambda: tiled_tiff(16, 16, 16, 65_536),
    "TIFF of 2^32 x 2^32 pixels": lambda: _one_strip_tiff(2**32 - 1, 2**32 - 1, 8, b"x"),
    "TIFF of 60,000 samples": lambda: _one_strip_tiff(16, 16, 8, b"x", t277=(3, [60_000]), t258=(3, [8] * 60_000)),
    "TIFF of a deflate bomb": lambda: _one_strip_tiff(64, 64, 8, deflated_zeros(1000 * MEGA)),
    "TIFF of 4,000 x 4,000 zeros": lambda: _one_strip_tiff(4000, 4000, 8, deflated_zeros(16_000_000)),
    "TIFF of an LZW bomb": lambda: encoded(Image.new("L", (4000, 4000)), "TIFF", compression="tiff_lzw"),
    "TIFF of a ZSTD bomb": lambda: encoded(Image.new("L", (4000, 4000)), "TIFF", compression="zstd"),
    "TIFF of an LZMA bomb": lambda: encoded(Image.new("L", (4000, 4000)), "TIFF", compression="lzma"),
    "TIFF of JPEG strips that are larger than they say": lambda: _one_strip_tiff(
        64, 64, 7, resized_jpeg(65_000, 65_000)
    ),
    "TIFF of a progressive JPEG of 20,000 scans": lambda: _one_strip_tiff(64, 64, 7, progressive(20_000, 64)),
    "TIFF of old JPEG": _old_jpeg_tiff,
    "TIFF of fax group 3": lambda: _fax_tiff(3, 200_000),
    "TIFF of fax group 4": lambda: _fax_tiff(4, 200_000),
    "TIFF of fax run lengths": lambda: _fax_tiff(2, 200_000),
    "TIFF of ThunderScan": lambda: _one_strip_tiff(4000, 4000, 32809, b"\xff" * 200_000, t258=(3, [4])),
    "TIFF of SGI's logarithms": lambda: _one_strip_tiff(
        4000, 4000, 34676, b"\xff" * 200_000, t262=(3, [32844]), t258=(3, [16])
    ),
    # AVIF
    "AVIF of 16,000 items": lambda: _avif_items(16_000),
    "AVIF of 20,000 images": lambda: _avif_items(20_000, b"av01"),
    "AVIF of 500 nested boxes": lambda: _avif_boxes(500),
    "AVIF of 1,000,000 boxes": lambda: avif(64, 64, [(1, b"av01", av1_image(64, 64)[1])], box(b"free") * 1_000_000),
    "AVIF of 500,000 properties": lambda: avif(
        64, 64, [(1, b"av01", av1_image(64, 64)[1])], properties=box(b"clli", b"\0\1\0\1") * 500_000
    ),
    "AVIF of a grid of 65,536 tiles": lambda: _avif_grid_of_one(256, 255),
    "AVIF of a grid of 1,024 tiles": lambda: _avif_grid_of_one(32, 32),
    "AVIF that is larger than it says": lambda: _avif_lying(8192),
    "AVIF of 65,535 x 65,535 pixels": lambda: avif(65_535, 65_535, [(1, b"av01", av1_image(64, 64)[1])]),
    "AVIF that is smaller than it says": lambda: avif(4000, 4000, [(1, b"av01", av1_image(64, 64)[1])]),
    "AVIF of 4,000 x 4,000 pixels": lambda: _avif_lying(4000, 4000),
    "AVIF of a sequence of 2^32 frames": lambda: _long_sequence(2**32 - 1),
    "AVIF of a sequence of 2,500,000 frames": lambda: _long_sequence(2_500_000),
    "AVIF sequence of 2,500,000 frames": lambda: tracks_alone(_table_count(b"stsz", 8, 1)(_long_sequence(2_500_000))),
    "AVIF sequence that is larger than it says": lambda: tracks_alone(
        _avif_sequence(lambda data: data.replace(_first_header(data), _HUGE_HEADER))
    ),
    "AVIF of a lying number of items": lambda: _table_count(b"iinf", 8, 2**32 - 1)(_avif_items(1)),
    "AVIF of a file within its items": lambda: avif(64, 64, [(1, b"av01", av1_image(64, 64)[1] * 10_000)]),
    # Just within the limits
    "TIFF of 130,000 strips": lambda: _one_row_strips(130_000),
    "TIFF of 130,000 strips that follow one another": lambda: strips_tiff(2, 130_000, 1),
    "TIFF of 130,000 compressed strips": lambda: strips_tiff(2, 130_000, 8),
    "TIFF of 4,000 tiles of a pixel": lambda: tiled_tiff(16 * 4000, 16, 16),
    "TIFF of strips as long as the file": lambda: _one_row_strips(100_000, samples=64),
    "AVIF of 4,090 tiles": lambda: avif_grid(62, 66),
    "AVIF of four times its pixels": lambda: _avif_lying(2000, 64),
}
