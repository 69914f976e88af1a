"""Sound images of every format, made by code."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from tests.attack.containers import (
    Entry,
    av1_image,
    avif,
    bmp,
    chunk,
    gif,
    gif_frame,
    grey_tiff,
    grid,
    ifd,
    jpeg,
    png,
    segment,
    sub_blocks,
    tiff,
    tiff_start,
)

MEGA = 2**20


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.copy().save(buffer, kind, **options)  # which leaves its options in the image
    return buffer.getvalue()


@cache
def photo(width: int, height: int) -> Image.Image:
    """Noise over a gradient, which no codec makes very small."""
    rows, columns = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(7).integers(0, 48, (height, width, 3))
    base = [rows * 160 // height, columns * 160 // width, (rows + columns) * 80 // (height + width)]
    return Image.fromarray((np.stack(base, 2) + noise).astype(np.uint8))


def small() -> Iterator[tuple[str, bytes]]:
    """Small valid images of every format and of its common variants."""
    image = photo(40, 24)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    palette = image.quantize(16)
    clear = image.convert("RGBA")
    clear.putalpha(image.convert("L"))
    yield "JPEG", encoded(image, "JPEG", exif=exif, comment="k")
    yield "progressive JPEG", encoded(image, "JPEG", progressive=True, icc_profile=b"p" * 70_000)
    yield "CMYK JPEG", encoded(image.convert("CMYK"), "JPEG")
    yield "MPO", encoded(image, "MPO", **_more_frames(image))
    yield "PNG", encoded(image, "PNG", exif=exif)
    yield "transparent PNG", encoded(clear, "PNG")
    yield "PNG with a palette", encoded(palette, "PNG", transparency=3)
    yield "APNG", encoded(image, "PNG", **_more_frames(image))
    yield "WebP", encoded(image, "WEBP", exif=exif)
    yield "lossless WebP", encoded(clear, "WEBP", lossless=True)
    yield "transparent WebP", encoded(clear, "WEBP")
    yield "animated WebP", encoded(image, "WEBP", **_more_frames(image))
    yield "GIF", encoded(palette, "GIF", comment=b"k", transparency=3)
    yield "animated GIF", encoded(image, "GIF", **_more_frames(image))
    yield "BMP", encoded(image, "BMP")
    yield "BMP with a palette", encoded(palette, "BMP")
    yield "RLE BMP", rle_bmp(40, 24)
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd", "lzma"):
        yield f"TIFF ({compression})", encoded(image, "TIFF", compression=compression, exif=exif)
    for compression in ("group3", "group4", "tiff_ccitt"):
        yield f"TIFF ({compression})", encoded(image.convert("1"), "TIFF", compression=compression)
    yield "BigTIFF", encoded(image, "TIFF", big_tiff=True)
    yield "tiled TIFF", tiled_tiff(100, 80, 16)
    yield "TIFF of several pages", encoded(image, "TIFF", compression="packbits", **_more_frames(image))
    yield "AVIF", encoded(image, "AVIF", exif=exif.tobytes())
    yield "transparent AVIF", encoded(clear, "AVIF")
    yield "animated AVIF", encoded(image, "AVIF", **_more_frames(image))
    yield "AVIF sequence alone", tracks_alone(encoded(image, "AVIF", **_more_frames(image)))
    yield "AVIF grid", avif_grid(3, 2)


def _more_frames(image: Image.Image) -> dict[str, Any]:
    return {"save_all": True, "append_images": [ImageOps.mirror(image), ImageOps.flip(image)]}


def good() -> Iterator[tuple[str, bytes]]:
    """Images that must be served: the small ones and those that ordinary cameras, scanners and tools make."""
    yield from small()
    camera = photo(3000, 2000)
    exif = Image.Exif()
    exif[0x0112] = 1
    maker_note = segment(0xE1, b"Exif\0\0" + exif_with_maker_note())
    xmp = [segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(65_000)) for _ in range(80)]
    icc = [segment(0xE2, b"ICC_PROFILE\0" + bytes([i + 1, 40]) + bytes(65_000)) for i in range(40)]
    mpf = segment(0xE2, b"MPF\0MM\0*\0\0\0\x08\0\1\xb0\1\0\4\0\0\0\1\0\0\0\2\0\0\0\0")
    plain = encoded(camera, "JPEG", quality=90)
    yield "a camera's JPEG", jpeg(plain, maker_note, *xmp, *icc, mpf) + plain
    yield "a JPEG with a film behind it", plain + random.Random(5).randbytes(2 * MEGA)
    yield "a JPEG with restart markers", encoded(photo(1000, 700), "JPEG", restart_marker_blocks=1)
    yield "a GIF of 3,000 frames", gif(64, 64, *[gif_frame(64, 64, lzw_zeros(64 * 64))] * 3000)
    yield "a PNG of many small IDAT chunks", small_chunks_png(1000, 800, 256)
    yield "a TIFF of one strip per row", strips_tiff(300, 40_000, 1)
    yield "a compressed TIFF of one strip per row", strips_tiff(200, 20_000, 8)
    yield "a tiled TIFF", tiled_tiff(6000, 5000, 64)
    yield "a TIFF whose strips are not in order", strips_tiff(500, 3000, 1, shuffled=True)
    yield "a scanned page", encoded(Image.new("1", (2480, 3508), 1), "TIFF", compression="group4")
    yield "a large AVIF", encoded(photo(1500, 1000), "AVIF", speed=10)
    yield "an AVIF grid of many tiles", avif_grid(8, 8)


def exif_with_maker_note() -> bytes:
    note: list[Entry] = [(0x927C, 7, 30_000, struct.pack("<L", 200))]
    main: list[Entry] = [(0x0112, 3, 1, b"\1\0"), (0x8769, 4, 1, struct.pack("<L", 60))]
    return (struct.pack("<2sHL", b"II", 42, 8) + ifd(main)).ljust(60, b"\0") + ifd(note) + bytes(31_000)


def rle_bmp(width: int, height: int) -> bytes:
    rows = b"".join(bytes([width % 256 or 255, row % 256, 0, 0]) for row in range(height))
    return bmp(width, height, rows + b"\0\1", 8, 1, b"".join(bytes([i, 255 - i, i, 0]) for i in range(256)))


def strips_tiff(width: int, rows: int, compression: int, *, shuffled: bool = False) -> bytes:
    """8-bit grey with one strip for each row, whose samples are the row's number."""
    body = [bytes([row % 256]) * width for row in range(256)]
    body = [zlib.compress(row) for row in body] if compression == 8 else body
    sizes = [len(body[row % 256]) for row in range(rows)]
    order = list(range(rows))
    if shuffled:
        random.Random(3).shuffle(order)
    offsets, at = [0] * rows, tiff_start()
    for row in order:
        offsets[row] = at
        at += sizes[row]
    entries = grey_tiff(width, rows, compression) | {273: (4, offsets), 278: (3, [1]), 279: (4, sizes)}
    return tiff(entries, *(body[row % 256] for row in order))


def tiled_tiff(width: int, height: int, side: int, tile_side: int | None = None, *, big: bool = False) -> bytes:
    """Uncompressed 8-bit grey in tiles, all of which are the same bytes."""
    count = -(-width // side) * -(-height // side)
    entries = grey_tiff(width, height) | {
        322: (4, [tile_side or side]), 323: (4, [tile_side or side]),
        324: (4, [tiff_start(big)] * count), 325: (4, [side * side] * count),
    }  # fmt: skip
    return tiff(entries, bytes(range(256)) * (side * side // 256), big=big)


def small_chunks_png(width: int, height: int, size: int) -> bytes:
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in np.asarray(photo(width, height))), 1)
    body = b"".join(chunk(b"IDAT", packed[at : at + size]) for at in range(0, len(packed), size))
    return png(width, height, body=body)


def avif_grid(rows: int, columns: int) -> bytes:
    _, frame = av1_image(64, 64)
    tiles = range(2, 2 + rows * columns)
    items = [
        (1, b"grid", grid(rows, columns, columns * 64, rows * 64)),
        *((tile, b"av01", frame) for tile in tiles),
    ]
    return avif(columns * 64, rows * 64, items, tiles=tiles, tile_size=(64, 64))


def lzw_zeros(count: int) -> bytes:
    """A GIF's image data of that many zeros at two bits each: the table is cleared before codes grow."""
    bits = "".join("100" + "000" * min(2, count - at) for at in range(0, count, 2)) + "101"
    packed = bytearray()
    for at in range(0, len(bits), 24):
        triples = [bits[i : i + 3] for i in range(at, min(at + 24, len(bits)), 3)]
        value = sum(int(triple, 2) << 3 * i for i, triple in enumerate(triples))
        packed += value.to_bytes(3, "little")
    return b"\2" + sub_blocks(bytes(packed))


@cache
def deflated_zeros(size: int) -> bytes:
    """That many, a thousand for each byte, made of one block over and over."""
    stream = zlib.compressobj(9, wbits=-15)
    block = stream.compress(bytes(MEGA)) + stream.flush(zlib.Z_FULL_FLUSH)
    rest = zlib.compressobj(9, wbits=-15)
    end = rest.compress(bytes(size % MEGA)) + rest.flush()
    checksum = struct.pack(">HH", size % 65_521, 1)  # Adler-32
    return b"\x78\xda" + block * (size // MEGA) + end + checksum


def progressive(scans: int, side: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = encoded(Image.new("L", (side, side)), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * scans + b"\xff\xd9"


def resized_jpeg(width: int, height: int, **options: Any) -> bytes:
    """The header says that it is larger than it is."""
    data = encoded(photo(64, 64), "JPEG", **options)
    at = frame_header(data)
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def frame_header(data: bytes) -> int:
    return max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"), data.find(b"\xff\xc9"))


def tracks_alone(data: bytes) -> bytes:
    """An AVIF sequence without the still image that most have."""
    at = data.index(b"meta")
    brands = data[:at].replace(b"avif", b"msf1")
    return brands + b"free" + data[at + 4 :]
