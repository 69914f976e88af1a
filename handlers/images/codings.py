"""Undoes the content codings of fetched images (RFC 9110, section 8.4.1).

Object stores send the `Content-Encoding` that was stored with an object, whatever the request asked for. Often it is
wrong: `base64` or `aws-chunked` for plain bytes, `deflate` for gzip. So the bytes decide what is undone.
"""

from __future__ import annotations

import io
import re
import zlib

from handlers.errors import ImageFetchFailed, ImageTooLarge
from handlers.images import ImageProblem
from handlers.images.formats import kind_of

MAX_CODINGS = 4
_DECODED = {"gzip", "deflate"}
_STEP = 2**18
_MEMBER_BYTES = 1024  # smallest average member of a gzip file; smaller ones would only cost time

_GZIP, _ZLIB, _RAW = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS


def codings_of(header: bytes) -> tuple[str, ...]:
    """Return the codings in a `Content-Encoding` header, in the order in which they were applied."""
    names = (name.strip().lower() for name in header.decode("latin-1").split(","))
    return tuple(name.removeprefix("x-") for name in names if name not in ("", "identity"))


def without_codings(data: bytes, codings: tuple[str, ...], max_bytes: int) -> bytes:
    """Undo the codings of an image. Run it in a thread.

    gzip and deflate are supported, the latter with or without zlib's header. Data that begins like gzip is decoded even
    if the header does not say so. No step produces more than `max_bytes`.

    Raises:
        ImageProblem: The data cannot be decoded.
    """
    left = list(codings)
    for _ in range(MAX_CODINGS):
        if not data or kind_of(data):
            break  # the header names codings that were not applied
        if len(codings) > MAX_CODINGS:
            raise _problem(codings[0], f"and {len(codings) - 1} more on top of it, which is refused")
        gzipped, has_zlib_header = data.startswith(b"\x1f\x8b"), _has_zlib_header(data)
        if gzipped or (has_zlib_header and _DECODED & {*left}):
            while left and left[-1] not in _DECODED:  # such as aws-chunked: how an upload was sent
                left.pop()
        if not left and not gzipped:
            break
        coding = left.pop() if left else ""
        if gzipped:
            window = _GZIP
        elif coding not in _DECODED:
            raise _problem(coding, "which is not decoded here: gzip and deflate are")
        elif has_zlib_header:
            window = _ZLIB
        else:
            window = _GZIP if coding == "gzip" else _RAW
        data = _inflated(data, coding, window, max_bytes)
    return data


def _inflated(data: bytes, coding: str, window: int, max_bytes: int) -> bytes:
    view = memoryview(data)
    whole = io.BytesIO()  # hands over its memory in the end; a list of pieces would be copied
    at = size = members = 0
    while at < len(view):
        members += 1
        stream = zlib.decompressobj(window)
        given: bytes | memoryview = b""
        more = False  # whether zlib may hold back output that exceeded the limit
        while not stream.eof:
            if not given and not more:
                if at == len(view):
                    raise _problem(coding, "but its data ends too early")
                given = view[at : at + _STEP]
                at += len(given)
            limit = min(_STEP, max_bytes + 1 - size)
            try:
                piece = stream.decompress(given, limit)
            except zlib.error as error:
                raise _problem(coding, "but its data is not encoded in this way, or is damaged") from error
            given, more = stream.unconsumed_tail, len(piece) == limit
            whole.write(piece)
            size += len(piece)
            if size > max_bytes:
                raise ImageProblem(
                    f"it has more than {max_bytes} bytes when decompressed (option.max_image_bytes)",
                    ImageTooLarge,
                )
        at -= len(stream.unused_data)
        if window != _GZIP or data[at : at + 2] != b"\x1f\x8b":
            break  # what follows is padding, if anything
        if members > 64 + at // _MEMBER_BYTES:
            raise _problem(coding, "but in absurdly many small members")
    return whole.getvalue()


def _has_zlib_header(data: bytes) -> bool:
    """RFC 1950: method 8, and a checksum over the first two bytes. Some servers leave the header out."""
    return len(data) >= 2 and data[0] & 0x0F == 8 and int.from_bytes(data[:2], "big") % 31 == 0


def _problem(coding: str, what: str) -> ImageProblem:
    if not coding:
        return ImageProblem(f"it begins like a gzip file, {what}", ImageFetchFailed)
    name = coding if re.fullmatch("[a-z0-9_-]{1,20}", coding) else "of an unknown name"
    return ImageProblem(f"its host sent it with the Content-Encoding {name}, {what}", ImageFetchFailed)
