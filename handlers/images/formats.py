"""What an image file says about itself, and the file without the parts that its pixels do not need.

Pillow reads texts, colour profiles, previews and animation tables before it decodes anything, and rejects the whole
file if one of them is damaged or larger than it accepts. The orientation is kept where Pillow can read it.

Pillow alone is not enough: the limits of the decoder's process would end a hostile file, but only after seconds.
Measured with files like those of `tests/attack`, of at most 64 x 64 pixels or of one column, Pillow takes 15 s for a
JPEG of 400,000 segments, 8 s and 580 MB for a TIFF of two million strips, and 10 s for an AVIF of 400,000 frames.

PNG, TIFF and AVIF have modules of their own, with `size` and `reduced` (see `_Format`); the other formats are here.
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
    png,
    tiff,
)
from handlers.images.tiff import exif_orientation, orientation_exif, xmp_orientation

_PROGRESSIVE_BYTES = 12
"""Additional working bytes per pixel for a progressive JPEG: the coefficients of up to four components, two bytes each,
and padding."""


@dataclass(frozen=True, slots=True)
class _Format:
    """How files of a format are read, before a decoder sees them.

    Both functions raise IndexError, ValueError or struct.error for a file that is damaged or cut short.

    Attributes:
        magic: First bytes of a file.
        working_bytes: Bytes per pixel that decoding uses in the decoder, without the resulting pixels: the samples as
            stored, as decoded, turned upright and converted to RGB, as far as they exist at the same time. Measured,
            and rounded up.
        size: Returns the size, after a quick look.
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
    except (IndexError, ValueError, OverflowError, struct.error):  # an offset may have 64 bits
        return None
    if found is None or found[0] * found[1] <= 0:
        return None
    pixels = found[0] * found[1]
    per_pixel = _FORMATS[kind].working_bytes + (_PROGRESSIVE_BYTES if len(found) > 2 else 0)
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


MAX_TABLE_BYTES = 2**16
"""Greatest size of quantization, Huffman and other tables before the first scan; four full ones of each kind
take 5 KiB."""

MAX_SEGMENTS = 2**12
"""Greatest number of segments before the first scan. Metadata of 20 MiB fill 320 of them."""

MAX_JUNK_BYTES = 2**20
"""Greatest number of bytes before the first scan that belong to no segment. Decoders skip them."""

MAX_SCANS = 100
MAX_SCANS_OF_LARGE = 20
_LARGE_PIXELS = 2**22

_JPEG_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")
"""A marker with a length. Others are skipped by decoders: fill bytes, restarts and repeated starts of the
image."""

_PROGRESSIVE_FRAMES = {0xC2, 0xC6, 0xCA, 0xCE}
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_JPEG_TABLES = {0xC4, 0xCC, 0xDB, 0xDC, 0xDD} | _JPEG_FRAMES
_JPEG_END, _JPEG_SCAN = 0xD9, 0xDA


def _jpeg_size(data: bytes) -> Size:
    """JPEG: segments, each a marker and its length (ITU-T T.81, annex B)."""
    at = 2
    for _ in range(MAX_PARTS_FOR_SIZE):
        at = data.find(b"\xff", at)
        if at < 0:
            return None
        marker = data[at + 1]
        if marker in (0xFF, 0x00, 0x01) or 0xD0 <= marker <= 0xD8:
            at += 1 if marker == 0xFF else 2
            continue
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return (width, height, 1) if marker in _PROGRESSIVE_FRAMES else (width, height)
        if marker in (_JPEG_END, _JPEG_SCAN):
            return None
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _reduced_jpeg(data: bytes, max_pixels: int) -> Pieces | None:
    """Before the first scan, keep only tables, the frame, how colours are coded, and the orientation."""
    view = memoryview(data)
    pieces: Pieces = [view[:2]]
    at, dropped, table_bytes, junk_bytes = 2, False, 0, 0
    pixels, scans_matter, components = 0, False, 0
    seen = set[int]()
    in_exif = in_xmp = None
    for _ in counted("JPEG", MAX_SEGMENTS):
        found = _JPEG_MARKER.search(data, at, at + MAX_JUNK_BYTES + 2)
        if found is None or data[found.start() + 1] == _JPEG_END:
            raise ValueError("no scan")
        start = found.start()
        marker = data[start + 1]
        junk_bytes += start - at
        if junk_bytes > MAX_JUNK_BYTES:
            raise ValueError("too many bytes outside of segments")
        dropped = dropped or start > at
        if marker == _JPEG_SCAN:
            break
        at = start + 2 + int.from_bytes(view[start + 2 : start + 4], "big")
        if at < start + 4 or at > len(data):
            raise ValueError("a segment is cut short")
        if marker in _JPEG_TABLES:
            table_bytes += at - start
            check_count("JPEG", "bytes of tables before its pixels", table_bytes, MAX_TABLE_BYTES)
            if marker in _JPEG_FRAMES:
                height, width = (int.from_bytes(view[i : i + 2], "big") for i in (start + 5, start + 7))
                check_pixels(width, height, max_pixels)
                pixels = max(pixels, width * height)
                scans_matter = scans_matter or marker in _PROGRESSIVE_FRAMES
                components = max(components, data[start + 9])
        elif 0xE0 <= marker <= 0xEF or marker == 0xFE:
            content = view[start + 4 : at]
            if marker == 0xE1:
                if in_exif is None and bytes(content[:6]) == b"Exif\0\0":
                    in_exif = exif_orientation(bytes(content)) or 0
                elif in_xmp is None and bytes(content[:29]) == b"http://ns.adobe.com/xap/1.0/\0":
                    in_xmp = xmp_orientation(content)
            if marker in seen or not _says_how_colours_are_coded(marker, content):
                dropped = True
                continue
            seen.add(marker)
        else:
            raise ValueError("a marker that no decoder reads")
        pieces.append(view[start:at])
    if scans_matter or data[start + 4] < components:  # else the first scan is the whole image
        _check_scans(data, start, pixels)
    orientation = in_exif or in_xmp or 1
    if orientation != 1:
        exif = b"Exif\0\0" + orientation_exif(orientation)
        pieces.append(b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif)
    pieces.append(view[start:])
    return pieces if dropped else None


def _says_how_colours_are_coded(marker: int, content: memoryview) -> bool:
    """Whether the segment describes colours, and is at least as long as libjpeg requires."""
    if marker == 0xE0:
        return bytes(content[:5]) == b"JFIF\0" and len(content) >= 14
    return marker == 0xEE and bytes(content[:5]) == b"Adobe" and len(content) >= 12


def _max_scans(pixels: int) -> int:
    """Return the greatest number of scans. Each is a pass over all pixels, but an empty one takes only a few bytes.

    Encoders write about ten.
    """
    return max(MAX_SCANS_OF_LARGE, MAX_SCANS * min(_LARGE_PIXELS, pixels) // max(1, pixels))


def _check_scans(data: bytes, at: int, pixels: int) -> None:
    """Count the scans of the image only, not what follows it or stands within other segments."""
    most = _max_scans(pixels)
    if data.count(b"\xff\xda", at) <= most:  # fast, but also counts bytes that are not scans
        return
    count = 0
    for _ in counted("JPEG", MAX_SEGMENTS):
        found = _JPEG_MARKER.search(data, at)
        if found is None or data[found.start() + 1] == _JPEG_END:
            return
        count += data[found.start() + 1] == _JPEG_SCAN
        if count > most:
            raise ImageProblem(f"it is a JPEG of {pixels} pixels and more than {most} scans")
        at = found.end() + max(2, int.from_bytes(data[found.end() : found.end() + 2], "big"))


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
    """Leave nothing out, but limit what takes long to unpack."""
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
    "JPEG": _Format(re.compile(rb"\xff\xd8\xff"), 12, _jpeg_size, _reduced_jpeg),
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
