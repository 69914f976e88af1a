"""Hostile images of every format, made by code: each costs a careless decoder far more than its bytes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

from PIL import Image

from tests.attack.containers import (
    Entry,
    bmp,
    chunk,
    gif,
    gif_frame,
    ifd,
    jpeg,
    png,
    riff,
    segment,
    sub_blocks,
    vp8x,
    webp,
)
from tests.attack.samples import (
    MEGA,
    deflated_zeros,
    encoded,
    frame_header,
    lzw_zeros,
    photo,
    progressive,
    resized_jpeg,
    small_chunks_png,
)
from tests.attack.tables import TIFF_AND_AVIF


def _exif(count: int, tag: int = 0x2000, size: int = 60_000, following: int = 0) -> bytes:
    """A directory of many entries, all of which point at the same bytes."""
    at = struct.pack("<L", 8 + 2 + 12 * count + 4)
    entries: list[Entry] = [(tag + i, 7, size, at) for i in range(count)]
    return struct.pack("<2sHL", b"II", 42, 8) + ifd(entries, following) + bytes(size)


def _nested_exif(depth: int, cyclic: bool) -> bytes:
    """EXIF, GPS and interoperability directories that point at each other."""
    size = 2 + 12 * 3 + 4
    body = struct.pack("<2sHL", b"II", 42, 8)
    for level in range(depth):
        at = struct.pack("<L", 8 if cyclic else 8 + size * min(level + 1, depth - 1))
        body += ifd([(0x8769, 4, 1, at), (0x8825, 4, 1, at), (0xA005, 4, 1, at)], 8)
    return body


def _png_of(*before: bytes, after: bytes = b"", pixels: bytes = bytes((16 * 3 + 1) * 16)) -> bytes:
    return png(16, 16, *before, body=chunk(b"IDAT", zlib.compress(pixels)) + after)


def _zeros_png(width: int, height: int, depth: int, colour: int, *before: bytes, interlaced: int = 0) -> bytes:
    """All samples zero, which deflate packs a thousand times."""
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    size = (-(-width * depth * samples // 8) + 1) * height
    return png(
        width,
        height,
        *before,
        body=chunk(b"IDAT", deflated_zeros(size)),
        depth=depth,
        colour=colour,
        interlaced=interlaced,
    )


def _lossless_webp(width: int, height: int, alpha: bool = False) -> bytes:
    data = encoded(Image.new("RGBA" if alpha else "RGB", (width, height)), "WEBP", lossless=True, quality=0, method=0)
    return data


def _webp_chunk(data: bytes) -> bytes:
    return data[12:]


def _anmf(width: int, height: int, frame: bytes) -> bytes:
    def three(value: int) -> bytes:
        return value.to_bytes(3, "little")

    return riff(b"ANMF", three(0) + three(0) + three(width - 1) + three(height - 1) + three(1) + b"\0" + frame)


def _animated_webp(canvas: tuple[int, int], frames: int) -> bytes:
    frame = _webp_chunk(_lossless_webp(16, 16))
    return webp(vp8x(*canvas, 0x02), riff(b"ANIM", bytes(6)), *[_anmf(16, 16, frame)] * frames)


def _lzw_bomb_gif(width: int, height: int) -> bytes:
    """Codes that each stand for one byte more than the last."""
    bits, size, following, filled = bytearray(), 3, 6, 0
    value = shift = 0

    def put(code: int) -> None:
        nonlocal value, shift
        value |= code << shift
        shift += size
        while shift >= 8:
            bits.append(value & 255)
            value >>= 8
            shift -= 8

    put(4)
    put(0)
    length = 1
    filled = 1
    while filled < width * height and len(bits) < 200_000:
        if following >= 4095:
            put(4)
            size, following, length = 3, 6, 1
            put(0)
            filled += 1
            continue
        put(following)
        following += 1
        if following > (1 << size) and size < 12:
            size += 1
        length += 1
        filled += length
    put(5)
    bits.append(value & 255)
    return gif(width, height, gif_frame(width, height, b"\2" + sub_blocks(bytes(bits))))


def _polyglot(front: bytes, back: bytes) -> bytes:
    return front + encoded(photo(40, 24), "JPEG") + back


_JPEG = encoded(Image.new("RGB", (16, 16)), "JPEG")
_EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 24\n%%EndComments\n(/etc/passwd) run\n%%EOF\n"
_PDF = b"%PDF-1.4\n1 0 obj<</Type/Catalog/OpenAction<</S/JavaScript/JS(1)>>>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF\n"


GENERATORS: dict[str, Callable[[], bytes]] = {
    # JPEG
    "JPEG of 400,000 EXIF segments": lambda: jpeg(_JPEG, segment(0xE1, b"Exif\0\0" + bytes(10)) * 400_000),
    "JPEG of 500,000 profile segments": lambda: jpeg(_JPEG, segment(0xE2, b"ICC_PROFILE\0\1\xff") * 500_000),
    "JPEG of 250 long profile segments": lambda: jpeg(
        _JPEG, *(segment(0xE2, b"ICC_PROFILE\0" + bytes([i, 250]) + bytes(65_000)) for i in range(1, 251))
    ),
    "JPEG of 120,000 tiny segments": lambda: jpeg(_JPEG, segment(0xE5) * 120_000),
    "JPEG of 120 long comments": lambda: jpeg(_JPEG, segment(0xFE, bytes(65_533)) * 120),
    "JPEG of 100,000 quantization tables": lambda: jpeg(_JPEG, segment(0xDB, b"\0" + b"\1" * 64) * 100_000),
    "JPEG of one segment of quantization tables": lambda: jpeg(_JPEG, segment(0xDB, (b"\0" + b"\1" * 64) * 1000) * 100),
    "JPEG of 300,000 Huffman tables": lambda: jpeg(_JPEG, segment(0xC4, b"\0" + bytes(16)) * 300_000),
    "JPEG of 1,000,000 restart intervals": lambda: jpeg(_JPEG, segment(0xDD, b"\0\1") * 1_000_000),
    "JPEG of 8 MB of padding": lambda: jpeg(_JPEG, b"\xff" * 8 * MEGA),
    "JPEG of 8 MB that are no markers": lambda: jpeg(_JPEG, bytes(8 * MEGA)),
    "JPEG of 8 MB of escaped bytes": lambda: jpeg(_JPEG, b"\xff\0" * 4 * MEGA),
    "JPEG of 8 MB of markers without a length": lambda: jpeg(_JPEG, b"\xff\xd0" * 4 * MEGA),
    "JPEG of 4,000,000 restart markers after its scan": lambda: _JPEG[:-2] + b"\xff\xd0" * 4_000_000,
    "JPEG of 20,000 scans": lambda: progressive(20_000, 64),
    "JPEG of 99 scans at full size": lambda: progressive(85, 4000),
    "JPEG of Photoshop's resources": lambda: jpeg(
        _JPEG, segment(0xED, b"Photoshop 3.0\0" + b"8BIM\3\xed\0\0\0\0\0\0" * 5000) * 100
    ),
    "JPEG of 4,000 EXIF entries": lambda: jpeg(_JPEG, segment(0xE1, b"Exif\0\0" + _exif(4000, size=17_000))),
    "JPEG of EXIF that leads to itself": lambda: jpeg(_JPEG, segment(0xE1, b"Exif\0\0" + _nested_exif(3, True))),
    "JPEG of 1,000 directories in EXIF": lambda: jpeg(_JPEG, segment(0xE1, b"Exif\0\0" + _nested_exif(1000, False))),
    "JPEG of a lying number of MPF images": lambda: jpeg(
        _JPEG,
        segment(
            0xE2,
            b"MPF\0MM\0*\0\0\0\x08\0\2\xb0\1\0\4\0\0\0\1\xff\xff\xff\xff\xb0\2\0\7\xff\xff\xff\0\0\0\0\0",
        ),
    ),
    "JPEG of 65,535 x 65,535 pixels": lambda: resized_jpeg(65_535, 65_535),
    "JPEG that is larger than its data": lambda: resized_jpeg(4000, 4000),
    "progressive JPEG that is larger than its data": lambda: resized_jpeg(4000, 4000, progressive=True),
    "JPEG of 1 x 65,535 pixels": lambda: resized_jpeg(1, 65_535),
    "JPEG of 60,000 frame headers": lambda: jpeg(_JPEG, _JPEG[frame_header(_JPEG) :][:19] * 60_000),
    # PNG
    "PNG of 600,000 texts": lambda: _png_of(chunk(b"tEXt", b"k\0v") * 600_000),
    "PNG of 120,000 empty IDAT chunks": lambda: _png_of(after=chunk(b"IDAT", b"") * 120_000),
    "PNG of 1,000,000 empty IDAT chunks": lambda: _png_of(after=chunk(b"IDAT", b"") * 1_000_000),
    "PNG of 1,000,000 empty chunks before its pixels": lambda: _png_of(chunk(b"IDAT", b"") * 1_000_000),
    "PNG of 200,000 animation frames": lambda: _png_of(
        chunk(b"acTL", b"\0\3\0\0\0\0\0\0"),
        chunk(b"fcTL", bytes(7) + b"\x10\0\0\0\x10" + bytes(14)) * 200_000,
    ),
    "PNG of a profile bomb": lambda: _png_of(chunk(b"iCCP", b"p\0\0" + deflated_zeros(300 * MEGA))),
    "PNG of text bombs": lambda: _png_of(
        *(chunk(b"zTXt", b"k%d\0\0" % i + deflated_zeros(MEGA - 9)) for i in range(2000)),
        *(chunk(b"iTXt", b"k%d\0\1\0\0\0" % i + deflated_zeros(MEGA - 9)) for i in range(2000)),
    ),
    "PNG of profiles of EXIF that are bombs": lambda: _png_of(
        chunk(b"zTXt", b"Raw profile type exif\0\0" + deflated_zeros(MEGA - 9)) * 2000
    ),
    "PNG of pixels that go on": lambda: png(16, 16, body=chunk(b"IDAT", deflated_zeros(1000 * MEGA))),
    "PNG of 4,000 x 4,000 zeros at 16 bits": lambda: _zeros_png(4000, 4000, 16, 6),
    "PNG of 4,000 x 4,000 zeros, interlaced": lambda: _zeros_png(4000, 4000, 1, 0, interlaced=1),
    "PNG of 16,000,000 x 1 pixels": lambda: _zeros_png(16_000_000, 1, 1, 0),
    "PNG of 1 x 2,000,000 pixels": lambda: _zeros_png(1, 2_000_000, 8, 2),
    "PNG of 2,147,483,647 x 2,147,483,647 pixels": lambda: png(2**31 - 1, 2**31 - 1, body=chunk(b"IDAT", b"")),
    "PNG of many palettes": lambda: _png_of(chunk(b"PLTE", bytes(768)) * 10_000),
    "PNG of a long palette": lambda: png(
        16, 16, chunk(b"PLTE", bytes(3 * 2**20)), body=chunk(b"IDAT", deflated_zeros(272)), colour=3
    ),
    "PNG of a long transparency": lambda: _png_of(chunk(b"tRNS", bytes(8 * MEGA))),
    "PNG of 8 MB of EXIF": lambda: _png_of(chunk(b"eXIf", _exif(50_000, size=7_400_000))),
    "PNG of XMP of 900 KB": lambda: _png_of(
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b"tiff:Orientation" * 57_000)
    ),
    # WebP
    "WebP of 900,000 chunks": lambda: webp(
        vp8x(16, 16, 0), riff(b"JUNK", b"") * 900_000, _webp_chunk(_lossless_webp(16, 16))
    ),
    "WebP of 100,000 frames": lambda: _animated_webp((16, 16), 100_000),
    "WebP of a canvas of 16,384 x 16,384": lambda: _animated_webp((16_384, 16_384), 1),
    "WebP of a canvas of 2^24 x 2^24": lambda: _animated_webp((2**24, 2**24), 1),
    "WebP whose frame is larger than its canvas": lambda: webp(
        vp8x(16, 16, 0x02), riff(b"ANIM", bytes(6)), _anmf(16, 16, _webp_chunk(_lossless_webp(3000, 3000)))
    ),
    "lossless WebP of 4,000 x 4,000 pixels": lambda: _lossless_webp(4000, 4000, alpha=True),
    "lossless WebP of 16,383 x 16,383 pixels": lambda: _lying_webp(16_383, 16_383),
    "WebP of nested containers": lambda: webp(*[b"RIFF\xff\xff\xff\x7fWEBP"] * 100_000),
    "WebP of 8 MB of EXIF": lambda: webp(
        vp8x(16, 16, 0x08), _webp_chunk(_lossless_webp(16, 16)), riff(b"EXIF", _exif(50_000, size=7_400_000))
    ),
    "WebP of a lying length": lambda: b"RIFF\xff\xff\xff\xffWEBPVP8L\xff\xff\xff\xff" + bytes(100),
    "WebP of many images": lambda: webp(*[_webp_chunk(_lossless_webp(16, 16))] * 100_000),
    # GIF
    "GIF of 8 MB of comments": lambda: gif(
        16, 16, b"!\xfe" + (b"\xff" + bytes(255)) * 32_000 + b"\0", gif_frame(16, 16, lzw_zeros(256))
    ),
    "GIF of 4,000,000 blocks of a byte": lambda: gif(16, 16, gif_frame(16, 16, b"\2" + b"\1\0" * 4_000_000 + b"\0")),
    "GIF of 1,000,000 extensions": lambda: gif(
        16, 16, b"!\xf9\4\0\0\0\0\0" * 1_000_000, gif_frame(16, 16, lzw_zeros(256))
    ),
    "GIF of 120,000 extensions": lambda: gif(16, 16, b"!\xf9\4\0\0\0\0\0" * 120_000, gif_frame(16, 16, lzw_zeros(256))),
    "GIF of 30,000 frames": lambda: gif(16, 16, gif_frame(16, 16, lzw_zeros(256)) * 30_000),
    "GIF of 65,535 x 65,535 pixels": lambda: gif(65_535, 65_535, gif_frame(1, 1, lzw_zeros(1))),
    "GIF whose frame is far larger than its screen": lambda: gif(
        1, 1, b"!\xf9\4\x08\0\0\0\0", gif_frame(13_000, 13_000, lzw_zeros(256), 65_000, 65_000)
    ),
    "GIF of an LZW bomb": lambda: _lzw_bomb_gif(4000, 4000),
    "GIF of 8 MB that are no blocks": lambda: gif(16, 16, bytes(8 * MEGA)),
    # BMP
    "BMP of a palette of 65,536 colours": lambda: bmp(16, 16, bytes(256), 8, 0, bytes(4 * 65_536), 65_536),
    "BMP of a lying palette": lambda: bmp(16, 16, bytes(256), 8, 0, b"", 2**31),
    "BMP of run lengths and 1,000,000 x 80 pixels": lambda: bmp(
        1_000_000, 80, b"\0\2\0\xff\1\1\0\0" * 40, 8, 1, bytes(1024)
    ),
    "BMP of run lengths, 4,000 x 4,000": lambda: bmp(4000, 4000, b"\0\0" * 4000, 8, 1, bytes(1024)),
    "BMP of run lengths of nothing": lambda: bmp(4000, 4000, b"\0\2\0\0" * 2_000_000, 8, 1, bytes(1024)),
    "BMP of run lengths of four bits": lambda: bmp(4000, 4000, (b"\xff\x12" * 16 + b"\0\0") * 4000, 4, 2, bytes(64)),
    "BMP of a negative height": lambda: bmp(16, -(2**31), bytes(256)),
    "BMP of 2^31 x 2^31 pixels": lambda: bmp(2**31 - 1, 2**31 - 1, bytes(256)),
    "BMP that is larger than its data": lambda: bmp(4000, 4000, bytes(256)),
    "BMP of an offset beyond its end": lambda: (
        bmp(16, 16, b"")[:10] + b"\xff\xff\xff\x7f" + bmp(16, 16, b"")[14:] + bytes(999)
    ),
    # Just within the limits
    "JPEG of 4,000 segments of tables": lambda: jpeg(_JPEG, segment(0xDD, b"\0\0") * 4000),
    "JPEG of 64 KiB of tables": lambda: jpeg(_JPEG, segment(0xDB, (b"\0" + b"\1" * 64) * 1000)),
    "progressive JPEG of 8,000 x 8,000 pixels and 20 scans": lambda: progressive(10, 8000),
    "PNG of 60,000 IDAT chunks of a byte": lambda: small_chunks_png(140, 140, 1),
    "GIF of 65,000 blocks before its frame": lambda: gif(
        16, 16, b"!\xf9" + b"\1\0" * 65_000 + b"\0", gif_frame(16, 16, lzw_zeros(256))
    ),
    "BMP of 4 MiB of run lengths": lambda: bmp(4000, 4000, b"\0\2\0\0" * (2**20 - 300), 8, 1, bytes(1024)),
    # Of two formats
    "JPEG and PDF": lambda: _polyglot(b"", _PDF),
    "PDF and JPEG": lambda: _polyglot(_PDF, b""),
    "JPEG and EPS": lambda: _polyglot(b"", _EPS),
    "EPS and JPEG": lambda: _polyglot(_EPS, b""),
    "EPS in a DOS container": lambda: (
        b"\xc5\xd0\xd3\xc6" + struct.pack("<6LH", 32, len(_EPS), 0, 0, 0, 0, 65_535) + b"\0\0" + _EPS
    ),
    "JPEG and HTML": lambda: _polyglot(b"", b"<html><script>1</script></html>"),
    "HTML and JPEG": lambda: _polyglot(b"<html>", b"</html>"),
    "JPEG and ZIP": lambda: _polyglot(b"", b"PK\5\6" + bytes(18)),
    "GIF and JavaScript": lambda: b"GIF89a=1;/*" + bytes(200) + b"*/alert(1)",
    "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "PNG and SVG": lambda: _png_of() + b"<svg/>",
    **TIFF_AND_AVIF,
}


def _lying_webp(width: int, height: int) -> bytes:
    data = bytearray(_lossless_webp(16, 16))
    data[21:25] = struct.pack("<L", (width - 1) | (height - 1) << 14)
    return bytes(data)
