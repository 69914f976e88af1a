"""The containers of the image formats, built part by part, so that a test can put any part anywhere."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from functools import cache

from PIL import Image

Entry = tuple[int, int, int, bytes]
"""Of a TIFF directory: tag, type, count and the bytes of the value or of its offset."""


def chunk(name: bytes, content: bytes) -> bytes:
    """Of PNG."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(content, zlib.crc32(name)))


def png(
    width: int,
    height: int,
    *before: bytes,
    body: bytes = b"",
    depth: int = 8,
    colour: int = 2,
    interlaced: int = 0,
) -> bytes:
    """body: whole IDAT chunks."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(before) + body + chunk(b"IEND", b"")


def segment(marker: int, content: bytes = b"") -> bytes:
    """Of JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def jpeg(data: bytes, *segments: bytes) -> bytes:
    """The image with more segments behind its first two bytes."""
    return data[:2] + b"".join(segments) + data[2:]


def riff(name: bytes, content: bytes) -> bytes:
    """A chunk of WebP."""
    return struct.pack("<4sL", name, len(content)) + content + b"\0" * (len(content) % 2)


def webp(*chunks: bytes) -> bytes:
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<L", len(body)) + body


def vp8x(width: int, height: int, flags: int) -> bytes:
    return riff(
        b"VP8X",
        struct.pack("<L", flags) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little"),
    )


def gif(width: int, height: int, *parts: bytes, palette: bytes = b"\0\0\0\xff\xff\xff") -> bytes:
    bits = (len(palette) // 3).bit_length() - 2
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80 | bits, 0, 0) + palette + b"".join(parts) + b";"


def gif_frame(width: int, height: int, blocks: bytes, left: int = 0, top: int = 0) -> bytes:
    """blocks: code size, sub-blocks and the empty one at their end."""
    return b"," + struct.pack("<HHHHB", left, top, width, height, 0) + blocks


def sub_blocks(content: bytes, size: int = 255) -> bytes:
    return (
        b"".join(bytes([len(content[i : i + size])]) + content[i : i + size] for i in range(0, len(content), size))
        + b"\0"
    )


def bmp(
    width: int,
    height: int,
    body: bytes,
    bits: int = 24,
    compression: int = 0,
    palette: bytes = b"",
    colours: int = 0,
) -> bytes:
    offset = 54 + len(palette)
    header = struct.pack("<LllHHLLllLL", 40, width, height, 1, bits, compression, len(body), 0, 0, colours, 0)
    return b"BM" + struct.pack("<LLL", offset + len(body), 0, offset) + header + palette + body


def ifd(entries: Sequence[Entry], following: int = 0, order: str = "<", big: bool = False) -> bytes:
    count, offset = ("Q", "Q") if big else ("H", "L")
    return b"".join(
        [
            struct.pack(order + count, len(entries)),
            *(
                struct.pack(order + "HH" + offset, tag, kind, number) + value.ljust(8 if big else 4, b"\0")
                for tag, kind, number, value in entries
            ),
            struct.pack(order + offset, following),
        ]
    )


def tiff(entries: dict[int, tuple[int, Sequence[int]]], *blobs: bytes, big: bool = False) -> bytes:
    """A file of one directory. entries: tag -> (type, values); blobs: follow the header, at `tiff_start(big)`."""
    start = tiff_start(big)
    body = b"".join(blobs)
    place = start + len(body)
    codes = {1: "B", 3: "H", 4: "L", 7: "B", 13: "L", 16: "Q"}
    rows: list[Entry] = []
    outside = b""
    table_bytes = (8 + 20 * len(entries) + 8) if big else (2 + 12 * len(entries) + 4)
    for tag, (kind, values) in sorted(entries.items()):
        packed = struct.pack(f"<{len(values)}{codes[kind]}", *values)
        if len(packed) > (8 if big else 4):
            at = place + table_bytes + len(outside)
            outside += packed
            packed = struct.pack("<Q" if big else "<L", at)
        rows.append((tag, kind, len(values), packed))
    head = struct.pack("<2sHHHQ", b"II", 43, 8, 0, place) if big else struct.pack("<2sHL", b"II", 42, place)
    return head + body + ifd(rows, big=big) + outside


def tiff_start(big: bool = False) -> int:
    return 16 if big else 8


def grey_tiff(width: int, height: int, compression: int = 1) -> dict[int, tuple[int, Sequence[int]]]:
    """The entries that every file of 8-bit grey needs, without those that say where its pixels are."""
    return {
        256: (4, [width]), 257: (4, [height]), 258: (3, [8]), 259: (3, [compression]), 262: (3, [1]), 277: (3, [1]),
    }  # fmt: skip


def box(name: bytes, *content: bytes) -> bytes:
    body = b"".join(content)
    return struct.pack(">L4s", 8 + len(body), name) + body


def full_box(name: bytes, *content: bytes, version: int = 0, flags: int = 0) -> bytes:
    return box(name, struct.pack(">L", version << 24 | flags), *content)


@cache
def av1_image(width: int, height: int) -> tuple[bytes, bytes]:
    """(av1C box, coded frame) of an image that the AVIF encoder made."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(buffer, "AVIF", quality=30, speed=10)
    data = buffer.getvalue()
    at = data.index(b"av1C") - 4
    return data[at : at + struct.unpack_from(">L", data, at)[0]], data[data.index(b"mdat") + 4 :]


def avif(
    width: int,
    height: int,
    items: Sequence[tuple[int, bytes, bytes]],
    *extra_meta: bytes,
    coded: tuple[int, int] = (64, 64),
    tiles: Sequence[int] = (),
    tile_size: tuple[int, int] | None = None,
    properties: bytes = b"",
) -> bytes:
    """A still AVIF file. items: (id, kind, content), the first of which is the image.

    coded: size of the frame whose av1C is used. tiles: ids that the first item, a grid, is made of.
    """
    av1c, _ = av1_image(*coded)
    # Bits of brand, handler, primary item, places, kinds, properties, references.
    ipco = box(
        b"ipco",
        full_box(b"ispe", struct.pack(">LL", width, height)),
        full_box(b"pixi", b"\3\x08\x08\x08"),
        av1c,
        full_box(b"ispe", struct.pack(">LL", *(tile_size or (width, height)))),
        properties,
    )
    associations = b"".join(
        struct.pack(">HB", number, 3) + (b"\1\2\x83" if not index else b"\4\2\x83")
        for index, (number, _, _) in enumerate(items)
    )
    infos = b"".join(
        full_box(b"infe", struct.pack(">HH4s", number, 0, kind), b"\0", version=2) for number, kind, _ in items
    )

    def whole(start: int) -> bytes:
        places = b""
        for number, _, content in items:
            places += struct.pack(">HHHLL", number, 0, 1, start, len(content))
            start += len(content)
        references = (
            full_box(b"iref", box(b"dimg", struct.pack(f">HH{len(tiles)}H", items[0][0], len(tiles), *tiles)))
            if tiles
            else b""
        )
        meta = full_box(
            b"meta",
            full_box(b"hdlr", b"\0\0\0\0pict" + b"\0" * 13),
            full_box(b"pitm", struct.pack(">H", items[0][0])),
            full_box(b"iloc", b"\x44\x00", struct.pack(">H", len(items)), places),
            full_box(b"iinf", struct.pack(">H", len(items)), infos),
            box(b"iprp", ipco, full_box(b"ipma", struct.pack(">L", len(items)), associations)),
            references,
            *extra_meta,
        )
        return box(b"ftyp", b"avif\0\0\0\0avifmif1miaf") + meta

    content = b"".join(content for _, _, content in items)
    return whole(len(whole(0)) + 8) + box(b"mdat", content)


def grid(rows: int, columns: int, width: int, height: int) -> bytes:
    """Content of an AVIF grid item."""
    return struct.pack(">BBBBLL", 0, 1, rows - 1, columns - 1, width, height)
