"""`data:` URLs (RFC 2397), in every spelling that clients are seen to send."""

from __future__ import annotations

from urllib.parse import unquote, unquote_to_bytes

import pybase64

from handlers.errors import ImageTooLarge
from handlers.images.problem import PictureProblem

MAX_HEADER = 1024
ACCEPTED_TYPES = {"", "image", "application/octet-stream", "binary/octet-stream"}
DISCARDED = {ord(character): None for character in " \t\r\n\f\v="}
URL_SAFE = {ord("-"): "+", ord("_"): "/"}


def is_data_url(url: str) -> bool:
    return url[:5].lower() == "data:"


def decode_data_url(url: str, max_bytes: int) -> bytes:
    """The bytes behind a `data:` URL. Run it in a thread: it costs a few milliseconds per megabyte.

    The declared type is not trusted (the content decides), yet one that is no picture's is refused. Base64
    may be wrapped, percent-encoded, URL-safe or without padding. Raises PictureProblem.
    """
    comma = url.find(",", 5, 5 + MAX_HEADER)
    if comma < 0:
        raise PictureProblem("its data URL has no comma; write data:image/jpeg;base64,...")
    media_type, *parameters = (field.strip().lower() for field in unquote(url[5:comma]).split(";"))
    _check_type(media_type)
    if len(url) - comma > 4 * max_bytes + MAX_HEADER:  # 4: base64 and percent-encoding both, at their worst
        raise _too_large(max_bytes)
    payload = url[comma + 1 :]
    data = (
        _base64(payload) if "base64" in parameters else unquote_to_bytes(payload.encode("utf-8", "replace"))
    )
    if not data:
        raise PictureProblem("its data URL is empty")
    if len(data) > max_bytes:
        raise _too_large(max_bytes)
    return data


def _check_type(media_type: str) -> None:
    if media_type.startswith("image/svg"):
        raise PictureProblem("SVG pictures are not supported; send PNG, JPEG or WebP")
    if not media_type.startswith("image/") and media_type not in ACCEPTED_TYPES:
        raise PictureProblem("its data URL does not declare a picture; write data:image/jpeg;base64,...")


def _base64(payload: str) -> bytes:
    try:
        return pybase64.b64decode(payload, validate=True)
    except ValueError:
        pass
    if "%" in payload:
        payload = unquote(payload)
    payload = payload.translate(DISCARDED).translate(URL_SAFE)
    try:
        return pybase64.b64decode(payload + "=" * (-len(payload) % 4), validate=True)
    except ValueError as error:
        raise PictureProblem("its data URL is not valid base64") from error


def _too_large(max_bytes: int) -> PictureProblem:
    return PictureProblem(f"it has more than {max_bytes} bytes (option.max_image_bytes)", ImageTooLarge)
