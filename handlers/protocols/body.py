"""Parses the body of a request: from bytes to a JSON object and its struct."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import msgspec

from handlers.errors import InvalidRequest, MalformedBody, PayloadTooLarge, UnsupportedMediaType
from handlers.protocols.body_limits import MOST_TEXT_BYTES, MOST_WIDE_BYTES, check_body, with_plain_slashes
from handlers.request import Incoming

T = TypeVar("T")

_NUMBERS_WITHIN = 3
"""The depth of lists and objects in which numbers are found: `prompt` is a list of lists."""

_EXACT = 2**53
"""Above it, some whole numbers cannot be written as a float."""

FORM = "application/x-www-form-urlencoded"

SHORT_BYTES = 2**16
"""A body of at most this size is parsed without being counted first: that takes a few milliseconds at worst."""

MOST_KEYS = 4096
"""The most keys at the top level of a body."""

_JSON_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
_PYTHON_TYPE = re.compile(rf"\b(?:{'|'.join(_JSON_TYPES)})\b")
_EXPECTED = re.compile(r"(?:expected|got) `[^`]*`", re.IGNORECASE)

_MOST_QUOTED = 300
"""Characters of msgspec's message that are kept at its beginning and at its end."""

_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}

_UTF8 = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})
_AT = re.compile(r"^(?P<what>.*?)(?: - at `(?P<key>key` in `)?\$\.?(?P<path>[^`]*)`)?$", re.DOTALL)


class _HugeNumber(ValueError):
    pass


def _number(digits: str) -> float:
    """Return a number; one that is too large for a float becomes infinite."""
    return float(digits) if len(digits) > 4000 or "e" in digits.lower() else 0.0


def _finite(pairs: list[tuple[str, Any]]) -> None:
    for key, value in pairs:
        for number in value if isinstance(value, list) else (value,):
            if isinstance(number, float) and math.isinf(number):
                raise _HugeNumber(key)


def _no_number(word: str) -> float:
    raise ValueError(word)


_HUGE = json.JSONDecoder(object_pairs_hook=_finite, parse_int=_number, parse_float=_number, parse_constant=_no_number)


def read_body(
    body: bytes, headers: Mapping[str, str], context: int = 0, longest_text: int = MOST_TEXT_BYTES
) -> dict[str, Any]:
    """Return the JSON object, or `{"inputs": text}` for text/plain. If a key is given twice, the last one counts.

    A JSON object is also read if it is declared as a form, as curl declares all data by default. headers: with names in
    lower case. context, longest_text: as in `check_body`.

    Raises:
        UnsupportedMediaType: The content type is another one.
        InvalidRequest: The body is not a strict JSON object in UTF-8, or holds more than a request could use.
    """
    content_type, charset = _content_type(headers.get("content-type", ""))
    is_json = content_type in ("", "application/json") or content_type.endswith("+json")
    is_json |= content_type == FORM and body[:SHORT_BYTES].lstrip()[:1] == b"{"
    if not is_json and content_type != "text/plain":
        raise UnsupportedMediaType(f"content type {content_type[:80]!r}: send application/json or text/plain")
    if charset not in _UTF8:
        raise UnsupportedMediaType(f"charset {charset[:40]!r}: send UTF-8")
    if not body:
        raise MalformedBody("the body is empty")
    return _object(body, context, longest_text) if is_json else {"inputs": _plain_text(body, longest_text)}


def read_options(incoming: Incoming, shape: type[T]) -> T:
    """Return what a request asks for whose body, if it has one, is a small JSON object.

    Raises:
        PayloadTooLarge: The body has more than `SHORT_BYTES`.
        InvalidRequest: It is not a JSON object, or a field is wrong.
    """
    body = incoming.body
    if len(body) > SHORT_BYTES:
        raise PayloadTooLarge(f"the body has {len(body)} bytes; allowed: at most {SHORT_BYTES}")
    return convert(read_body(body, {}) if body.strip() else {}, shape)


def convert(body: dict[str, Any], shape: type[T], *, under: str = "") -> T:
    """Return `body` as a msgspec Struct. Raises InvalidRequest with the path of the first field at fault.

    A whole number may be written as 16.0: JSON has one kind of number, and some clients write all of them so.
    under: the path of `body` itself.
    """
    try:
        try:
            return msgspec.convert(body, shape, str_keys=True)
        except msgspec.ValidationError as error:
            if "got `float`" not in str(error):
                raise
        return msgspec.convert(_whole(body, _NUMBERS_WITHIN), shape, str_keys=True)
    except msgspec.ValidationError as error:
        found = _AT.match(_cut(str(error)))
        assert found is not None
        path = ".".join(filter(None, [under, found["path"]]))
        what = _EXPECTED.sub(_in_json_words, found["what"][:1].lower() + found["what"][1:])
        where = f"{path}: " if path else ""
        raise InvalidRequest(f"{where}{'a key: ' if found['key'] else ''}{what}", param=path or None) from None


def _cut(message: str) -> str:
    """Shorten a message: msgspec quotes the whole of what the client sent."""
    if len(message) <= 2 * _MOST_QUOTED:
        return message
    return f"{message[:_MOST_QUOTED]}... {message[-_MOST_QUOTED:]}"


def kind_of(value: object) -> str:
    """Name a JSON value's type, for a message."""
    return _KINDS.get(type(value), "a number")


def shown_value(value: object) -> str:
    """Return a value for a message, where only some texts are allowed."""
    return repr(value[:40]) if isinstance(value, str) else kind_of(value)


def refuse_unknown(fields: Mapping[str, Any], known: Collection[str], where: str, *, param: str | None = None) -> None:
    """Raise InvalidRequest for a key that is not read, where ignoring it would silently change the answer.

    Keys whose value is null count as absent. where: the object's path. param: the error's, if it is not `where`.
    """
    for key, value in fields.items():
        if value is not None and key not in known:
            raise InvalidRequest(
                f"{where} has the key {key[:40]!r}, which this server does not read; allowed: "
                f"{', '.join(sorted(known))}",
                param=param or where,
            )


def _in_json_words(expected: re.Match[str]) -> str:
    return _PYTHON_TYPE.sub(lambda word: _JSON_TYPES[word[0]], expected[0])


def _whole(value: Any, depth: int) -> Any:
    """Return the value with 16 for 16.0, down to the depth at which bodies have whole numbers."""
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT:
        return int(value)
    if depth and isinstance(value, list):
        return [_whole(item, depth - 1) for item in value]
    if depth and isinstance(value, dict):
        return {key: _whole(item, depth - 1) for key, item in value.items()}
    return value


def _content_type(header: str) -> tuple[str, str]:
    content_type, *parameters = header.lower().split(";")
    charset = "utf-8"
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "charset":
            charset = value.strip().strip('"')
    return content_type.strip(), charset


def _plain_text(body: bytes, longest: int) -> str:
    if len(body) > longest:
        raise MalformedBody(f"the body has {len(body)} bytes in one text; allowed: at most {longest}")
    return _text(body)


def _text(body: bytes) -> str:
    if len(body) > MOST_WIDE_BYTES and not body.isascii():
        raise MalformedBody(
            f"the body is a text of {len(body)} bytes that holds more than ASCII; allowed: at most {MOST_WIDE_BYTES}"
        )
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        raise MalformedBody(f"the body is not UTF-8 (byte {error.start})") from None


def _object(body: bytes, context: int, longest_text: int) -> dict[str, Any]:
    given: bytes | memoryview = body
    if len(body) > SHORT_BYTES and check_body(body, context, longest_text).slashes:
        given = with_plain_slashes(body)
    moved = given is not body
    try:
        value = msgspec.json.decode(given)
    except UnicodeDecodeError:
        _text(body)
        raise MalformedBody("the body is not UTF-8") from None
    except RecursionError:
        raise MalformedBody("the body is nested too deeply") from None
    except msgspec.ValidationError as error:  # Only numbers out of range: no type is asked for.
        if len(body) <= SHORT_BYTES:
            _refuse_huge_numbers(_text(body))
        raise MalformedBody(f"the body is not valid JSON: {_plain(str(error), len(body), moved)}") from None
    except msgspec.MsgspecError as error:
        _text(body)
        raise MalformedBody(f"the body is not valid JSON: {_plain(str(error), len(body), moved)}") from None
    if not isinstance(value, dict):
        raise MalformedBody("the body must be a JSON object")
    if len(value) > MOST_KEYS:
        raise MalformedBody(f"the body has {len(value)} keys; allowed: at most {MOST_KEYS}")
    return value


def _refuse_huge_numbers(text: str) -> None:
    try:
        _HUGE.decode(text)
    except _HugeNumber as error:
        name = str(error)[:80]
        raise MalformedBody(f"{name} is a number out of range", param=name) from None
    except (ValueError, RecursionError):
        return


def _plain(message: str, size: int, moved: bool) -> str:
    """Rephrase msgspec's message. moved: its positions are not those of the client's body."""
    message = message.removeprefix("JSON is malformed: ").partition(" - at ")[0]
    if message == "Input data was truncated":
        return f"it ends too early, or has half a surrogate pair (byte {size})"
    if moved:
        message = message.partition(" (byte ")[0]
    return message[:1].lower() + message[1:]
