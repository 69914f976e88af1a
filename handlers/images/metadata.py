"""Image files without the metadata that their pixels do not need, so that none of it can cost the image.

Pillow reads texts, colour profiles, previews and animation tables before it decodes anything, and gives up the whole
file where one of them is damaged or larger than it likes. What says which side is up is kept where it can be read.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator

from handlers.images.problem import PictureProblem

MAX_PARTS = 2**17
"""Chunks, segments or blocks of one file that are looked at. Real files have far fewer, and each costs time."""

_Pieces = list[bytes | bytearray | memoryview]

_MAX_TEXT = 2**20  # what Pillow decompresses of one text of a PNG
_XMP_ORIENTATION = b"tiff:Orientation"


def without_metadata(data: bytes) -> bytes:
    """The same image in the same format; `data` itself where there is nothing to leave out.

    It costs a look at the header of each part and one copy of what is kept. What cannot be followed in a damaged file
    stays as it is. Raises PictureProblem for a file that ends within what its pixels need, or needs parts whose
    checksum is wrong, and for one of more than `MAX_PARTS` parts.
    """
    strip = _STRIPPED.get(kind_of(data) or "")
    try:
        pieces = strip and strip(data)
    except (IndexError, ValueError, struct.error):  # cut short, or with an offset that leads out of the file
        return data
    return data if pieces is None else b"".join(pieces)


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


def _counted(kind: str) -> Iterator[None]:
    for _ in range(MAX_PARTS):
        yield
    raise PictureProblem(f"its {kind} data has more than {MAX_PARTS} parts")


def _jpeg(data: bytes) -> _Pieces | None:
    """Segments up to the first scan: a marker and, after it, its length (ITU-T T.81, annex B)."""
    view = memoryview(data)
    pieces: _Pieces = [view[:2]]
    at, dropped, seen = 2, False, set[bytes]()
    for _ in _counted("JPEG"):
        if data[at] != 0xFF:  # no marker: decoders go on to the next one
            at, dropped = data.index(b"\xff", at), True
            continue
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at, dropped = at + 1, True
            continue
        length = int.from_bytes(view[at + 2 : at + 4], "big")
        end = at + 2 + length
        if marker in (0x00, 0x01, 0xDA) or 0xD0 <= marker <= 0xD9 or length < 2 or end > len(data):
            break
        if 0xE0 <= marker <= 0xEF or marker == 0xFE:
            kind = data[at + 1 : at + 2] + data[at + 4 : at + 8]
            if kind in seen or not _wanted_segment(marker, data[at + 4 : end]):
                at, dropped = end, True
                continue
            seen.add(kind)
        pieces.append(view[at:end])
        at = end
    pieces.append(view[at:])
    return pieces if dropped else None


def _wanted_segment(marker: int, content: bytes) -> bool:
    """The two that say how colours are coded, at least as long as libjpeg wants them, and the orientation."""
    if marker == 0xE0:
        return content.startswith(b"JFIF\0") and len(content) >= 14
    if marker == 0xEE:
        return content.startswith(b"Adobe") and len(content) >= 12
    return marker == 0xE1 and (content.startswith(b"Exif\0\0") or _XMP_ORIENTATION in content)


_MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")
"""But those that have no length and change nothing, as stand between pixels."""


def jpeg_scans(data: bytes, most: int) -> int:
    """How many there are, up to most + 1: what follows the image, or stands within other segments, is none.

    Raises PictureProblem for a file of more than `MAX_PARTS` parts.
    """
    count, at = 0, 2
    for _ in _counted("JPEG"):
        marker = _MARKER.search(data, at)
        if marker is None or marker[0] == b"\xff\xd9":
            break
        count += marker[0] == b"\xff\xda"
        if count > most:
            break
        at = marker.end() + max(2, int.from_bytes(data[marker.end() : marker.end() + 2], "big"))
    return count


_CHUNK = struct.Struct(">I4s")
_TRANSPARENCY_BYTES = {0: 2, 2: 6}
"""PNG's colour type -> the least that its tRNS chunk must hold."""


def _png(data: bytes) -> _Pieces | None:
    """Chunks: length, name, content, checksum (https://www.w3.org/TR/png-3/, chapter 5).

    Those that are not critical are left out where their checksum is wrong, as libpng does.
    """
    view = memoryview(data)
    pieces: _Pieces = [view[:8]]
    at, dropped, pixels, seen, colour = 8, False, False, set[bytes](), data[25]
    for _ in _counted("PNG"):
        length, name = _CHUNK.unpack_from(data, at) if at + 8 <= len(data) else (0, b"")
        end = at + 12 + length
        if not name.isalpha() or end > len(data):
            if name == b"IDAT" or not pixels:
                pieces.append(view[at:])
            else:
                dropped = True  # the pixels are there; what comes after them is damaged
            break
        chunk = view[at:end]
        at = end
        if name == b"IDAT":
            pixels = True
        elif name[0] & 0x20 or (name == b"PLTE" and colour != 3):
            if name in seen or not _wanted_chunk(name, chunk[8:-4], colour) or not _intact(chunk):
                dropped = True
                continue
            seen.add(name)
        elif not _intact(chunk) and not pixels:
            raise PictureProblem(
                f"its PNG data is damaged: the checksum of its {name.decode()} chunk is wrong"
            )
        pieces.append(chunk)
        if name == b"IEND":
            break
    return pieces if dropped else None


def _intact(chunk: memoryview) -> bool:
    return zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def _wanted_chunk(name: bytes, content: memoryview, colour: int) -> bool:
    """Transparency, and the orientation: as EXIF, as ImageMagick wrote that once, or in XMP."""
    if name == b"tRNS":
        return len(content) >= _TRANSPARENCY_BYTES.get(colour, 0)
    if name == b"eXIf":
        return True
    text = bytes(content[: _MAX_TEXT + 1])
    if len(text) > _MAX_TEXT:
        return False
    if name == b"iTXt":
        return text.startswith(b"XML:com.adobe.xmp\0\0") and _XMP_ORIENTATION in text
    keyword, _, packed = text.partition(b"\0")
    if keyword != b"Raw profile type exif":
        return False
    return name == b"tEXt" or (name == b"zTXt" and packed[:1] == b"\0" and _inflates(packed[1:]))


def _inflates(packed: bytes) -> bool:
    stream = zlib.decompressobj()
    try:
        stream.decompress(packed, _MAX_TEXT)
    except zlib.error:
        return False
    return stream.eof


_WEBP_PIXELS = {b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"}
_WEBP_FLAGS = {b"ICCP": 0x20, b"EXIF": 0x08, b"XMP ": 0x04}
"""Bits of the VP8X chunk that announce the others."""


def _webp(data: bytes) -> _Pieces | None:
    """Chunks: name, length, content, padded to even (https://developers.google.com/speed/webp/docs/riff_container)."""
    view = memoryview(data)
    file_end = 8 + int.from_bytes(view[4:8], "little")
    at, dropped, flags = 12, file_end > len(data), 0
    chunks: list[tuple[bytes, memoryview]] = []
    for _ in _counted("WEBP"):
        if at + 8 > min(file_end, len(data)):
            break
        name, length = struct.unpack_from("<4sL", data, at)
        content = view[at + 8 : at + 8 + length]
        whole = len(content) == length
        if name in _WEBP_PIXELS and not whole:
            raise PictureProblem("its WEBP data is truncated: the image is not complete")
        if whole and (
            name in _WEBP_PIXELS
            or name == b"EXIF"
            or (name == b"XMP " and _XMP_ORIENTATION in bytes(content[:_MAX_TEXT]))
        ):
            chunks.append((name, content))
            flags |= _WEBP_FLAGS.get(name, 0)
        else:
            dropped = True
        at += 8 + length + length % 2
    if not dropped:
        return None
    pieces: _Pieces = [b"WEBP"]
    for name, content in chunks:
        kept: bytes | memoryview = content
        if name == b"VP8X":
            kept = bytes([content[0] & ~sum(_WEBP_FLAGS.values()) | flags]) + content[1:]
        pieces += [struct.pack("<4sL", name, len(kept)), kept, b"\0" * (len(kept) % 2)]
    return [struct.pack("<4sL", b"RIFF", sum(map(len, pieces))), *pieces]


def _gif(data: bytes) -> _Pieces | None:
    """Extensions before the first frame, each a list of short blocks (https://www.w3.org/Graphics/GIF/spec-gif89a.txt)."""
    view = memoryview(data)
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    pieces: _Pieces = [view[:at]]
    dropped, parts = False, _counted("GIF")
    while data[at] == 0x21:
        start, at = at, at + 2
        for _ in parts:
            length = data[at]
            at += 1 + length
            if not length:
                break
        if data[start + 1] == 0xF9:  # which colour is transparent
            pieces.append(view[start:at])
        else:
            dropped = True
    pieces.append(view[at:])
    return pieces if dropped else None


_TIFF_PIXELS = {
    *range(256, 260), 262, 266, 273, 274, *range(277, 280), 284, 292, 293, 317, *range(320, 326), 332, 334, 338, 339,
    347, *range(512, 522), *range(529, 533),
}  # fmt: skip
"""Tags that say how pixels are stored, and 274, the orientation (TIFF 6.0, and its technical notes on JPEG)."""


def _tiff(data: bytes) -> _Pieces | None:
    """The first directory, written anew in its place with fewer entries; also BigTIFF's."""
    order = "<" if data.startswith(b"II") else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    count_code, offset_code, size = ("Q", "Q", 20) if big else ("H", "L", 12)
    (offset,) = struct.unpack_from(order + offset_code, data, 8 if big else 4)
    (count,) = struct.unpack_from(order + count_code, data, offset)
    if count > MAX_PARTS:
        raise PictureProblem(f"its TIFF data has more than {MAX_PARTS} parts")
    first = offset + struct.calcsize(count_code)
    entries = [data[at : at + size] for at in range(first, first + count * size, size)]
    kept = [entry for entry in entries if struct.unpack_from(order + "H", entry)[0] in _TIFF_PIXELS]
    if len(kept) == count:
        return None
    directory = b"".join(
        [struct.pack(order + count_code, len(kept)), *kept, struct.pack(order + offset_code, 0)]
    )
    view = memoryview(data)
    return [view[:offset], directory, view[offset + len(directory) :]]


def _avif(data: bytes) -> _Pieces | None:
    """Items that are no pixels are made ones of a kind that nobody reads (ISO/IEC 14496-12, section 8.11.6).

    Nothing moves, since the places of the others are written as offsets. AVIF's own boxes say which side is up.
    """
    meta = _box(data, b"meta", 0, len(data))
    items = meta and _box(data, b"iinf", meta[0] + 4, meta[1])
    if not items:
        return None
    at, end = items[0] + (8 if data[items[0]] else 6), items[1]
    copy = bytearray(data)
    for _ in _counted("AVIF"):
        entry = _box(data, b"infe", at, end)
        if entry is None:
            break
        kind = entry[0] + 4 + (4 if data[entry[0]] == 2 else 6)
        if data[kind : kind + 4] in (b"Exif", b"mime"):
            copy[kind : kind + 4] = b"skip"
        at = entry[1]
    return None if copy == data else [copy]


def _box(data: bytes, kind: bytes, at: int, end: int) -> tuple[int, int] | None:
    """Where the content of the first box of that kind is."""
    for _ in _counted("AVIF"):
        if at + 8 > min(end, len(data)):
            return None
        size, name = _CHUNK.unpack_from(data, at)
        start = at + 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, start)
            start += 8
        box_end = at + size if size else end
        if name == kind:
            return start, min(box_end, end)
        if box_end < start:
            return None
        at = box_end
    return None


_STRIPPED = {"JPEG": _jpeg, "PNG": _png, "WEBP": _webp, "GIF": _gif, "TIFF": _tiff, "AVIF": _avif}
