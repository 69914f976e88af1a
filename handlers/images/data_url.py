"""Decodes `data:` URLs (RFC 2397)."""

from __future__ import annotations

import string
from collections.abc import Iterator
from urllib.parse import unquote

import numpy as np
import pybase64

from handlers.images import NO_SVG, ImageProblem, too_many_bytes

MAX_HEADER = 1024
ACCEPTED_TYPES = {"", "image", "application/octet-stream", "binary/octet-stream"}
SLICE = 2**18
"""Number of characters of a URL that are decoded in one step."""

_DISCARDED = b" \t\r\n\f\v="
_STANDARD = bytes.maketrans(b"-_", b"+/")
"""Translates the URL-safe alphabet to the standard one."""

_PERCENT = ord("%")
_HEX = np.array([int(chr(code), 16) if chr(code) in string.hexdigits else 255 for code in range(256)], np.uint8)


def is_data_url(url: str) -> bool:
    """Tell whether a URL is a `data:` URL."""
    return url[:5].lower() == "data:"


def decode_data_url(url: str, max_bytes: int, slice_characters: int = SLICE) -> bytes:
    """Decode a `data:` URL. Run it in a thread: it costs a few milliseconds per megabyte.

    The content decides what the image is, but a declared type that is not an image's is refused. Base64 may be wrapped,
    percent-encoded, URL-safe or without padding. It is decoded in slices, between which other threads run, and no
    further than `max_bytes`: at most twice the decoded bytes are held in addition to the URL.

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
    slices = _slices(url, comma + 1, slice_characters)
    pieces: list[bytes] = []
    size = 0
    for piece in _base64(slices) if "base64" in parameters else map(_unquoted, slices):
        size += len(piece)
        if size > max_bytes:
            raise too_many_bytes(max_bytes)
        pieces.append(piece)
    if not size:
        raise ImageProblem("its data URL is empty")
    return b"".join(pieces)


def _check_type(media_type: str) -> None:
    if media_type.startswith("image/svg"):
        raise ImageProblem(NO_SVG)
    if not media_type.startswith("image/") and media_type not in ACCEPTED_TYPES:
        raise ImageProblem("its data URL does not declare an image; write data:image/jpeg;base64,...")


def _base64(slices: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for coded in slices:
        letters = rest + _unquoted(coded).translate(_STANDARD, _DISCARDED)
        whole = len(letters) - len(letters) % 4
        rest = letters[whole:]
        yield _decoded(letters[:whole])
    yield _decoded(rest + b"=" * (-len(rest) % 4))


def _decoded(letters: bytes) -> bytes:
    try:
        return pybase64.b64decode(letters, validate=True)
    except ValueError as error:
        raise ImageProblem("its data URL is not valid base64") from error


def _slices(url: str, start: int, size: int) -> Iterator[bytes]:
    """Yield the text from `start` on; no slice ends within a `%41`."""
    while start < len(url):
        end = start + size
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
