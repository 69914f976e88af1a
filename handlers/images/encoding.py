"""Undoes the encodings of an image, within a limit in bytes: `data:` URLs (RFC 2397), and HTTP's content codings.

Clients write `data:` URLs in many spellings. Object stores send the `Content-Encoding` that was stored with
an object, whatever the request asked for, and often it is wrong: `base64` or `aws-chunked` for plain bytes,
`deflate` for gzip's. So the bytes decide, as everywhere.
"""

from __future__ import annotations

import io
import re
import string
import zlib
from collections.abc import Iterator
from urllib.parse import unquote

import numpy as np
import pybase64

from handlers.errors import ImageFetchFailed, ImageTooLarge
from handlers.images import ImageProblem, too_many_bytes
from handlers.images.formats import kind_of

MAX_HEADER = 1024
ACCEPTED_TYPES = {"", "image", "application/octet-stream", "binary/octet-stream"}
SLICE = 2**18
"""Number of characters of a URL that are decoded in one step."""

_DISCARDED = b" \t\r\n\f\v="
_STANDARD = bytes.maketrans(b"-_", b"+/")
"""Translates the URL-safe alphabet to the standard one."""

_PERCENT = ord("%")
_HEX = np.array(
    [int(chr(code), 16) if chr(code) in string.hexdigits else 255 for code in range(256)], np.uint8
)


def is_data_url(url: str) -> bool:
    """Tell whether a URL is a `data:` URL."""
    return url[:5].lower() == "data:"


def decode_data_url(url: str, max_bytes: int) -> bytes:
    """Decode a `data:` URL. Run it in a thread: it costs a few milliseconds per megabyte.

    The declared type is not trusted (the content decides), but a type that is not an image's is refused.
    Base64 may be wrapped, percent-encoded, URL-safe or without padding. It is decoded in slices, between
    which other threads run, and no further than `max_bytes`: in addition to the URL at most twice the decoded
    bytes are held.

    Raises:
        ImageProblem: The URL cannot be decoded, or holds too much.
    """
    comma = url.find(",", 5, 5 + MAX_HEADER)
    if comma < 0:
        raise ImageProblem("its data URL has no comma; write data:image/jpeg;base64,...")
    media_type, *parameters = (field.strip().lower() for field in unquote(url[5:comma]).split(";"))
    _check_type(media_type)
    if len(url) - comma > 4 * max_bytes + MAX_HEADER:  # 4: base64 and percent-encoding both, at their worst
        raise too_many_bytes(max_bytes)
    decoded = _base64 if "base64" in parameters else _percent
    pieces: list[bytes] = []
    size = 0
    for piece in decoded(url, comma + 1):
        size += len(piece)
        if size > max_bytes:
            raise too_many_bytes(max_bytes)
        pieces.append(piece)
    if not size:
        raise ImageProblem("its data URL is empty")
    return b"".join(pieces)


def _check_type(media_type: str) -> None:
    if media_type.startswith("image/svg"):
        raise ImageProblem("SVG images are not supported; send PNG, JPEG or WebP")
    if not media_type.startswith("image/") and media_type not in ACCEPTED_TYPES:
        raise ImageProblem("its data URL does not declare an image; write data:image/jpeg;base64,...")


def _base64(url: str, start: int) -> Iterator[bytes]:
    rest = b""
    for coded in _slices(url, start):
        letters = rest + _unquoted(coded).translate(_STANDARD, _DISCARDED)
        whole = len(letters) - len(letters) % 4
        letters, rest = letters[:whole], letters[whole:]
        yield _decoded(letters)
    yield _decoded(rest + b"=" * (-len(rest) % 4))


def _decoded(letters: bytes) -> bytes:
    try:
        return pybase64.b64decode(letters, validate=True)
    except ValueError as error:
        raise ImageProblem("its data URL is not valid base64") from error


def _percent(url: str, start: int) -> Iterator[bytes]:
    for coded in _slices(url, start):
        yield _unquoted(coded)


def _slices(url: str, start: int) -> Iterator[bytes]:
    """Yield the text from `start` on; no slice ends within a `%41`."""
    while start < len(url):
        end = start + SLICE
        if end < len(url) and (cut := url.find("%", end - 2, end)) >= 0:
            end = cut
        yield url[start:end].encode("utf-8", "replace")
        start = end


def _unquoted(coded: bytes) -> bytes:
    """Unquote like urllib.parse.unquote_to_bytes, but without an object for each escape."""
    if b"%" not in coded:
        return coded
    letters = np.frombuffer(coded, np.uint8)
    at = np.flatnonzero(letters[:-2] == _PERCENT)
    high, low = _HEX[letters[at + 1]], _HEX[letters[at + 2]]
    escapes = (high | low) < 16
    at = at[escapes]
    out = letters.copy()
    out[at] = (high[escapes] << 4) | low[escapes]
    kept = np.ones(len(out), bool)
    kept[at + 1] = kept[at + 2] = False
    return out[kept].tobytes()


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
    """Undo the codings of an image (RFC 9110, section 8.4.1). Run it in a thread.

    gzip and deflate are supported, the latter with or without zlib's header. What begins like gzip is decoded
    even if the header does not say so. No step produces more than `max_bytes`.

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
