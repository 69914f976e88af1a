"""What an image file says about itself, and the file without the parts that its pixels do not need.

Pillow reads texts, colour profiles, previews and animation tables before it decodes anything, and rejects the whole
file if one of them is damaged or larger than it accepts. The orientation is kept where Pillow can read it.

Pillow alone is not enough: the limits of the decoder's process would end a hostile file, but only after seconds.
Measured with files like those of `tests/attack`, of at most 64 x 64 pixels or of one column, Pillow takes 15 s for a
JPEG of 400,000 segments, 8 s and 580 MB for a TIFF of two million strips, and 10 s for an AVIF of 400,000 frames.

There is a module for each format, with `size(data)`, which returns a `Size`, and `reduced(data, max_pixels)`: the
pieces of a file that decodes to the same image, or None if that is the file itself. They are called before a decoder
sees the bytes. Both raise IndexError, ValueError or struct.error for a file that is damaged or cut short, and `reduced`
raises ImageProblem for a structure that would cost more than its pixels are worth.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from handlers.images import ImageProblem
from handlers.images.formats import avif, bmp, gif, jpeg, png, tiff, webp

_FORMATS = {"JPEG": jpeg, "PNG": png, "WEBP": webp, "GIF": gif, "BMP": bmp, "TIFF": tiff, "AVIF": avif}

_MAGIC = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "WEBP": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    "GIF": re.compile(rb"GIF8[79]a"),
    "BMP": re.compile(rb"BM.{12}[\x0c(48@l|]\0\0\0", re.DOTALL),
    "TIFF": re.compile(rb"II(?:[*+]\0|\0\*)|MM(?:\0[*+]|\*\0)"),
    "AVIF": re.compile(rb".{4}ftyp(?:m[is]f1.{4}(?:.{4}){0,16}?)?avi[fs]", re.DOTALL),
}
"""First bytes of the formats that Pillow reads. A file in AVIF's container has avif among its brands, first
or later; others are HEIC."""

_WORKING_BYTES = {"JPEG": 12, "PNG": 18, "WEBP": 28, "GIF": 14, "BMP": 14, "TIFF": 18, "AVIF": 30}
"""Format -> bytes per pixel that decoding uses in the decoder, without the resulting pixels.

These are the samples as stored, as decoded, turned upright and converted to RGB, as far as they exist at the
same time. Measured, and rounded up.
"""

_PROGRESSIVE_BYTES = 12
"""Additional bytes per pixel for a progressive JPEG: the coefficients of up to four components, two bytes
each, and padding."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a file's header says.

    It only determines how much memory is requested first: a decoder refuses a file that turns out to be
    larger.

    Attributes:
        pixels: Width times height.
        working_bytes: Memory that decoding uses (see `_WORKING_BYTES`).
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
    per_pixel = _WORKING_BYTES[kind] + (_PROGRESSIVE_BYTES if len(found) > 2 else 0)
    return Header(pixels, per_pixel * pixels)


def unknown_header(pixels: int) -> Header:
    """Make a header for a size that a decoder has measured, whatever the format."""
    return Header(pixels, max(_WORKING_BYTES.values()) * pixels)


def kind_of(data: bytes) -> str | None:
    """Return the format that a file begins like, by Pillow's name; None for one that is not supported."""
    return next((kind for kind, magic in _MAGIC.items() if magic.match(data)), None)


def without_metadata(data: bytes, max_pixels: int) -> bytes:
    """Return the same image in the same format; `data` itself if there is nothing to leave out.

    It costs a look at the header of each part, and one copy of what is kept.

    Raises:
        ImageProblem: The header announces more than `max_pixels`; the structure is damaged, or ends within
            what the pixels need; or the file has more parts than its format's module accepts.
    """
    kind = kind_of(data)
    if kind is None:
        return data
    try:
        pieces = _FORMATS[kind].reduced(data, max_pixels)
    except (IndexError, ValueError, struct.error) as error:
        raise ImageProblem(f"its {kind} header is truncated or damaged") from error
    return data if pieces is None else b"".join(pieces)
