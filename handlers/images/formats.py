"""What an image file says about itself, and the file without the parts that its pixels do not need.

Pillow reads texts, colour profiles, previews and animation tables before it decodes anything, and rejects the whole
file if one of them is damaged or larger than it accepts. The orientation is kept where Pillow can read it.

Pillow alone is not enough: the limits of the decoder's process would end a hostile file, but only after seconds.
Measured with Pillow 13 and the files of `tests/attack`, of at most 64 x 64 pixels or of one column, Pillow takes 14 s
for a JPEG of 400,000 segments, 2 s for a PNG of a million empty chunks, and 7 s and 680 MB for a TIFF of two million
strips; and it rejects a PNG with a large text, and an AVIF whose sequence is damaged behind a good still image.

JPEG, PNG, TIFF and AVIF have modules of their own, with `size` and `reduced` (see `_Format`); WebP, GIF and BMP are
here.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from handlers.images import (
    MAX_PARTS_FOR_SIZE,
    ImageProblem,
    Pieces,
    Size,
    avif,
    check_count,
    check_pixels,
    counted,
    jpeg,
    png,
    tiff,
)
from handlers.images.tiff import exif_orientation, orientation_exif, xmp_orientation


@dataclass(frozen=True, slots=True)
class _Format:
    """How files of a format are read before a decoder sees them.

    Both functions raise IndexError, ValueError or struct.error for a file that is damaged or cut short.

    Attributes:
        magic: First bytes of a file.
        working_bytes: Bytes per pixel that decoding uses in the decoder, without the resulting pixels: the samples as
            stored, as decoded, turned upright and converted to RGB, as far as they exist at the same time. Measured,
            and rounded up.
        size: Returns the size after a quick look.
        reduced: Returns the pieces of a file that decodes to the same image, or None if that is the file itself. It
            raises ImageProblem for a structure that would cost more than its pixels are worth.
    """

    magic: re.Pattern[bytes]
    working_bytes: int
    size: Callable[[bytes], Size]
    reduced: Callable[[bytes, int], Pieces | None]


@dataclass(frozen=True, slots=True)
class Header:
    """What a file's header says.

    It only determines how much memory is requested first: a decoder refuses a file that turns out to be larger.

    Attributes:
        pixels: Width times height.
        working_bytes: Memory that decoding uses (see `_Format`).
    """

    pixels: int
    working_bytes: int


def read_header(data: bytes) -> Header | None:
    """Find the size of an image with a quick look, before a decoder opens it. Every loop is bounded.

    Returns:
        None if a quick look does not find it.
    """
    kind = kind_of(data)
    if kind is None:
        return None
    try:
        found = _FORMATS[kind].size(data)
    except (IndexError, ValueError, OverflowError, struct.error, ImageProblem):  # an offset may have 64 bits
        return None
    pixels = 0 if found is None else found[0] * found[1]
    if found is None or pixels <= 0:
        return None
    per_pixel = _FORMATS[kind].working_bytes + (jpeg.PROGRESSIVE_BYTES if len(found) > 2 else 0)
    return Header(pixels, per_pixel * pixels)


def unknown_header(pixels: int) -> Header:
    """Make a header for a size that a decoder has measured, whatever the format."""
    return Header(pixels, max(one.working_bytes for one in _FORMATS.values()) * pixels)


def kind_of(data: bytes) -> str | None:
    """Return the format that a file begins like, by Pillow's name; None for one that is not supported."""
    return next((kind for kind, one in _FORMATS.items() if one.magic.match(data)), None)


def without_metadata(data: bytes, max_pixels: int) -> bytes:
    """Return the same image in the same format; `data` itself if there is nothing to leave out.

    It costs a look at the header of each part, and one copy of what is kept.

    Raises:
        ImageProblem: The header announces more than `max_pixels`; the structure is damaged, or ends within what the
            pixels need; or the file has more parts than are accepted of its format.
    """
    kind = kind_of(data)
    if kind is None:
        return data
    try:
        pieces = _FORMATS[kind].reduced(data, max_pixels)
    except (IndexError, ValueError, struct.error) as error:
        raise ImageProblem(f"its {kind} header is truncated or damaged") from error
    return data if pieces is None else b"".join(pieces)


_WEBP_IMAGES = (b"VP8 ", b"VP8L", b"ANMF")
_WEBP_KEPT = (b"VP8X", b"ALPH", b"ANIM", *_WEBP_IMAGES)
_WEBP_EXIF, _WEBP_OTHERS = 0x08, 0x24
"""Bits of the VP8X chunk: the file has EXIF; it has a colour profile or XMP."""


def _webp_size(data: bytes) -> Size:
    """WebP: chunks of name, length and content, padded to even (RFC 9649). The first one has the size."""
    kind = data[12:16]
    if kind not in (b"VP8X", b"VP8L", b"VP8 ") or (kind == b"VP8 " and len(data) < 30):
        return None
    return _webp_sides(kind, memoryview(data)[20:])


def _reduced_webp(data: bytes, max_pixels: int) -> Pieces | None:
    """Keep the first image or frame, and the orientation.

    libwebp allocates the whole canvas when it reads the header, so its size is checked here.
    """
    view = memoryview(data)
    file_end = min(8 + int.from_bytes(view[4:8], "little"), len(data))
    chunks: list[tuple[bytes, memoryview]] = []
    at, size, found, in_exif, in_xmp = 12, 12, False, None, None
    for _ in counted("WEBP"):
        if at + 8 > file_end:
            break
        name, length = struct.unpack_from("<4sL", data, at)
        content = view[at + 8 : at + 8 + length]
        at += 8 + length + length % 2
        whole = len(content) == length
        if name in _WEBP_KEPT and not found:
            if not whole:
                raise ImageProblem("its WEBP data is truncated: the image is not complete")
            if name not in (b"ALPH", b"ANIM"):
                check_pixels(*_webp_sides(name, content), max_pixels)
            if name in _WEBP_IMAGES or name not in dict(chunks):
                chunks.append((name, content))
                size += 8 + length + length % 2
            found = name in _WEBP_IMAGES
        elif name == b"EXIF" and whole and in_exif is None:
            in_exif = exif_orientation(bytes(content)) or 0
        elif name == b"XMP " and whole and in_xmp is None:
            in_xmp = xmp_orientation(content) or 0
    if size == len(data) == 8 + int.from_bytes(view[4:8], "little"):
        return None
    orientation = in_exif or in_xmp or 1
    exif = orientation_exif(orientation) if orientation != 1 and chunks and chunks[0][0] == b"VP8X" else b""
    pieces: Pieces = [b"WEBP"]
    for name, content in [*chunks, *([(b"EXIF", memoryview(exif))] if exif else [])]:
        kept: bytes | memoryview = content
        if name == b"VP8X":
            flags = content[0] & ~(_WEBP_EXIF | _WEBP_OTHERS) | (_WEBP_EXIF if exif else 0)
            kept = bytes([flags]) + content[1:]
        pieces += [struct.pack("<4sL", name, len(kept)), kept, b"\0" * (len(kept) % 2)]
    return [struct.pack("<4sL", b"RIFF", sum(map(len, pieces))), *pieces]


def _webp_sides(name: bytes, content: memoryview) -> tuple[int, int]:
    """Return the width and height that a chunk contains."""
    if name == b"VP8X":
        return 1 + int.from_bytes(content[4:7], "little"), 1 + int.from_bytes(content[7:10], "little")
    if name == b"ANMF":
        return 1 + int.from_bytes(content[6:9], "little"), 1 + int.from_bytes(content[9:12], "little")
    if name == b"VP8L":
        bits = int.from_bytes(content[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return (
        int.from_bytes(content[6:8], "little") & 0x3FFF,
        int.from_bytes(content[8:10], "little") & 0x3FFF,
    )


_GIF_EXTENSION, _GIF_FRAME, _GIF_TRAILER = b"!,;"
_GIF_NEXT = re.compile(rb"[!,;]")
_GIF_TRANSPARENCY = 0xF9


def _gif_size(data: bytes) -> Size:
    """GIF: extensions and frames, each a list of short blocks (https://www.w3.org/Graphics/GIF/spec-gif89a.txt).

    The size is the larger of the screen and the area that the first frame covers.
    """
    at, _ = _gif_first_frame(data, iter(range(MAX_PARTS_FOR_SIZE)))
    return _gif_canvas(data, at)


def _reduced_gif(data: bytes, max_pixels: int) -> Pieces | None:
    """Before the first frame keep only which colour is transparent, once; no decoder reads what follows it."""
    view = memoryview(data)
    start = _gif_tables_end(data)
    at, transparency = _gif_first_frame(data, counted("GIF"))
    check_pixels(*_gif_canvas(data, at), max_pixels)
    if at == start + len(transparency):
        return None
    return [view[:start], transparency, view[at:]]


def _gif_tables_end(data: bytes) -> int:
    return 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)


def _gif_first_frame(data: bytes, parts: Iterator[object]) -> tuple[int, memoryview]:
    """Return the position of the first frame, and the last extension about transparency before it."""
    at = _gif_tables_end(data)
    transparency = memoryview(b"")
    for _ in parts:
        found = _GIF_NEXT.search(data, at)  # decoders skip what is between
        if found is None or data[found.start()] == _GIF_TRAILER:
            break
        at = found.start()
        if data[at] == _GIF_FRAME:
            return at, transparency
        first, at = at, at + 2
        for _ in parts:
            length = data[at]
            at += 1 + length
            if not length:
                break
        if data[first + 1] == _GIF_TRANSPARENCY:
            transparency = memoryview(data)[first:at]
    raise ValueError("no frame")


def _gif_canvas(data: bytes, frame: int) -> tuple[int, int]:
    width, height = struct.unpack_from("<HH", data, 6)
    left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, frame + 1)
    return max(width, left + frame_width), max(height, top + frame_height)


_BMP_RUN_LENGTHS = (1, 2)
MAX_RUN_LENGTH_PIXELS = 2**24
MAX_RUN_LENGTH_BYTES = 2**22
"""Pillow unpacks run lengths in Python: up to 60 ns for each pixel and 200 ns for each byte."""


def _bmp_size(data: bytes) -> Size:
    """BMP: headers at fixed positions (https://learn.microsoft.com/windows/win32/gdi/bitmap-storage)."""
    if data[14] == 12:
        return struct.unpack_from("<HH", data, 18)
    width, height = struct.unpack_from("<ii", data, 18)
    return width, abs(height)


def _reduced_bmp(data: bytes, max_pixels: int) -> Pieces | None:
    """Check the limits of what takes long to unpack; nothing is left out."""
    header, width, height = struct.unpack_from("<Lll", data, 14)
    if header < 40:
        return None  # 16 bits for each side
    check_pixels(abs(width), abs(height), max_pixels)
    (compression,) = struct.unpack_from("<L", data, 30)
    if compression in _BMP_RUN_LENGTHS:
        check_count("BMP", "pixels in run lengths", abs(width * height), MAX_RUN_LENGTH_PIXELS)
        check_count("BMP", "bytes of run lengths", len(data), MAX_RUN_LENGTH_BYTES)
    return None


_FORMATS = {
    "JPEG": _Format(re.compile(rb"\xff\xd8\xff"), 12, jpeg.size, jpeg.reduced),
    "PNG": _Format(re.compile(rb"\x89PNG\r\n\x1a\n"), 18, png.size, png.reduced),
    "WEBP": _Format(re.compile(rb"RIFF.{4}WEBP", re.DOTALL), 28, _webp_size, _reduced_webp),
    "GIF": _Format(re.compile(rb"GIF8[79]a"), 14, _gif_size, _reduced_gif),
    "BMP": _Format(re.compile(rb"BM.{12}[\x0c(48@l|]\0\0\0", re.DOTALL), 14, _bmp_size, _reduced_bmp),
    "TIFF": _Format(re.compile(rb"II(?:[*+]\0|\0\*)|MM(?:\0[*+]|\*\0)"), 18, tiff.size, tiff.reduced),
    "AVIF": _Format(
        # A file in its container has avif among its brands, first or later; others are HEIC.
        re.compile(rb".{4}ftyp(?:m[is]f1.{4}(?:.{4}){0,16}?)?avi[fs]", re.DOTALL),
        30,
        avif.size,
        avif.reduced,
    ),
}
"""The formats that Pillow reads here, by its names."""
