"""Image files with only what their pixels need, so that nothing else in them can cost the image or the server.

Pillow reads texts, colour profiles, previews and animation tables before it decodes anything, and gives up the whole
file where one of them is damaged or larger than it likes. What says which side is up is kept where it can be read.
"""

from __future__ import annotations

import re
import struct

from handlers.images.formats import avif, bmp, gif, jpeg, png, tiff, webp
from handlers.images.problem import PictureProblem

_REDUCED = {
    "JPEG": jpeg.reduced,
    "PNG": png.reduced,
    "WEBP": webp.reduced,
    "GIF": gif.reduced,
    "BMP": bmp.reduced,
    "TIFF": tiff.reduced,
    "AVIF": avif.reduced,
}

_MAGIC = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "WEBP": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    "GIF": re.compile(rb"GIF8[79]a"),
    "BMP": re.compile(rb"BM.{12}[\x0c(48@l|]\0\0\0", re.DOTALL),
    "TIFF": re.compile(rb"II(?:[*+]\0|\0\*)|MM(?:\0[*+]|\*\0)"),
    "AVIF": re.compile(rb".{4}ftyp(?:m[is]f1.{4}(?:.{4}){0,16}?)?avi[fs]", re.DOTALL),
}
"""What Pillow reads. A file of AVIF's container names avif among its brands, first or later: others are HEIC."""


def kind_of(data: bytes) -> str | None:
    """The format that a file begins like, by Pillow's name; None for one that is not served."""
    return next((kind for kind, magic in _MAGIC.items() if magic.match(data)), None)


def without_metadata(data: bytes, max_pixels: int) -> bytes:
    """The same image in the same format; `data` itself where there is nothing to leave out.

    It costs a look at the header of each part and one copy of what is kept. Raises PictureProblem for a file in no
    served format, one of more than `max_pixels` that its header tells of, one whose structure is damaged or ends
    within what its pixels need, and one of more parts than its format's module accepts.
    """
    kind = kind_of(data)
    if kind is None:
        return data
    try:
        pieces = _REDUCED[kind](data, max_pixels)
    except (IndexError, ValueError, struct.error) as error:
        raise PictureProblem(f"its {kind} header is truncated or damaged") from error
    return data if pieces is None else b"".join(pieces)
