"""From the bytes of a request to a JSON object, or to the reason why they are none."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import msgspec

from handlers.errors import InvalidRequest, MalformedBody, UnsupportedMediaType

T = TypeVar("T")

_NUMBERS_WITHIN = 3
"""Lists or objects around a number: `prompt` is a list of lists."""

_EXACT = 2**53
"""Above it not every whole number is a float."""

FORM = "application/x-www-form-urlencoded"

MOST_CONTAINERS = 2**20
"""Lists and objects in one body. Reading twenty times as many, which 64 MB can hold, would stop the event loop for
seconds, in whichever thread it is done."""

_JSON_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
_PYTHON_TYPE = re.compile(rf"\b(?:{'|'.join(_JSON_TYPES)})\b")
_EXPECTED = re.compile(r"(?:expected|got) `[^`]*`", re.IGNORECASE)

_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}

_UTF8 = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})
_AT = re.compile(r"^(?P<what>.*?)(?: - at `(?P<key>key` in `)?\$\.?(?P<path>[^`]*)`)?$", re.DOTALL)


class _RepeatedKey(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> None:
    if len({key for key, _ in pairs}) != len(pairs):
        seen: set[str] = set()
        raise _RepeatedKey(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]


_DUPLICATES = json.JSONDecoder(object_pairs_hook=_unique)


class _HugeNumber(ValueError):
    pass


def _number(digits: str) -> float:
    """What no number here can hold is infinite."""
    return float(digits) if len(digits) > 4000 or "e" in digits.lower() else 0.0


def _finite(pairs: list[tuple[str, Any]]) -> None:
    for key, value in pairs:
        for number in value if isinstance(value, list) else (value,):
            if isinstance(number, float) and math.isinf(number):
                raise _HugeNumber(key)


def _no_number(word: str) -> float:
    raise ValueError(word)


_HUGE = json.JSONDecoder(
    object_pairs_hook=_finite, parse_int=_number, parse_float=_number, parse_constant=_no_number
)


def read_body(body: bytes, headers: Mapping[str, str]) -> dict[str, Any]:
    """A JSON object, or `{"inputs": text}` for text/plain.

    A JSON object may also come as a form, which is what curl calls all data unless told otherwise.
    Raises UnsupportedMediaType for any other type, InvalidRequest for what is no strict JSON object in UTF-8:
    the message says where.
    """
    content_type, charset = _content_type(headers.get("content-type", ""))
    is_json = content_type in ("", "application/json") or content_type.endswith("+json")
    is_json |= content_type == FORM and body.lstrip()[:1] == b"{"
    if not is_json and content_type != "text/plain":
        raise UnsupportedMediaType(f"content type {content_type[:80]!r}: send application/json or text/plain")
    if charset not in _UTF8:
        raise UnsupportedMediaType(f"charset {charset[:40]!r}: send UTF-8")
    if not body:
        raise MalformedBody("the body is empty")
    return _object(body) if is_json else {"inputs": _text(body)}


def convert(body: dict[str, Any], shape: type[T], *, under: str = "") -> T:
    """`body` as a msgspec Struct. Raises InvalidRequest with the path of the first field at fault.

    A whole number may be written as 16.0, which JSON does not tell from 16; some clients write all numbers so.
    """
    try:
        try:
            return msgspec.convert(body, shape, str_keys=True)
        except msgspec.ValidationError as error:
            if "got `float`" not in str(error):
                raise
        return msgspec.convert(_whole(body, _NUMBERS_WITHIN), shape, str_keys=True)
    except msgspec.ValidationError as error:
        found = _AT.match(str(error))
        assert found is not None
        path = ".".join(filter(None, [under, found["path"]]))
        what = _EXPECTED.sub(_in_json_words, found["what"][:1].lower() + found["what"][1:])
        where = f"{path}: " if path else ""
        raise InvalidRequest(
            f"{where}{'a key: ' if found['key'] else ''}{what}", param=path or None
        ) from None


def kind_of(value: object) -> str:
    """A JSON value's type, for a message."""
    return _KINDS.get(type(value), "a number")


def shown_value(value: object) -> str:
    """What a client sent where only some texts are allowed, for a message."""
    return repr(value[:40]) if isinstance(value, str) else kind_of(value)


def refuse_unknown(
    fields: Mapping[str, Any], known: Collection[str], where: str, *, param: str | None = None
) -> None:
    """For an object in which a key that nobody reads would change the answer without a word; null is as good as absent.

    param: of the error, where that is not `where`. Raises InvalidRequest.
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
    """The value with 16 for 16.0, as far down as bodies have whole numbers."""
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


def _text(body: bytes) -> str:
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        raise MalformedBody(f"the body is not UTF-8 (byte {error.start})") from None


def _object(body: bytes) -> dict[str, Any]:
    if len(body) > MOST_CONTAINERS and body.count(b"[") + body.count(b"{") > MOST_CONTAINERS:
        raise MalformedBody(f"the body has more than {MOST_CONTAINERS} opening brackets and braces")
    try:
        value = msgspec.json.decode(body)
        _DUPLICATES.decode(body.decode())
    except UnicodeDecodeError:
        _text(body)
        raise MalformedBody("the body is not UTF-8") from None
    except _RepeatedKey as error:
        raise MalformedBody(
            f"the body is no strict JSON: the key {str(error)[:80]!r} appears twice"
        ) from None
    except RecursionError:
        raise MalformedBody("the body is nested too deeply") from None
    except msgspec.MsgspecError as error:
        _refuse_huge_numbers(_text(body))
        raise MalformedBody(f"the body is no valid JSON: {_plain(str(error), len(body))}") from None
    except ValueError:
        raise MalformedBody("the body is no valid JSON") from None
    if not isinstance(value, dict):
        raise MalformedBody("the body must be a JSON object")
    return value


def _refuse_huge_numbers(text: str) -> None:
    try:
        _HUGE.decode(text)
    except _HugeNumber as error:
        name = str(error)[:80]
        raise MalformedBody(f"{name} is a number out of range", param=name) from None
    except (ValueError, RecursionError):
        return


def _plain(message: str, size: int) -> str:
    message = message.removeprefix("JSON is malformed: ").partition(" - at ")[0]
    if message == "Input data was truncated":
        return f"it ends too early, or has half a surrogate pair (byte {size})"
    return message[:1].lower() + message[1:]
