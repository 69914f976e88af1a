"""From an option's text to the value of a vLLM engine argument, by that argument's own type."""

from __future__ import annotations

import argparse
import json
from typing import Any

_TRUE = frozenset({"true", "1", "yes", "on", "t", "y"})
_FALSE = frozenset({"false", "0", "no", "off", "f", "n"})
_LONGEST = 200


class BadValue(Exception):
    """`reason` says why, where vLLM does; `allowed` what is allowed, in words."""

    def __init__(self, allowed: str, reason: str = "") -> None:
        super().__init__(allowed)
        self.allowed = allowed
        self.reason = reason


def coerce(action: argparse.Action | None, text: str, annotation: str) -> Any:
    """The value that `text` means to vLLM's own command line.

    action: the argument's, from vLLM's parser; None for a field that is not on its command line.
    annotation: the field's type as written, for messages. Raises BadValue.
    """
    if action is None:
        return _json_or_text(text)
    if isinstance(action, argparse.BooleanOptionalAction) or action.nargs == 0:
        return _boolean(text)
    if action.nargs in ("+", "*"):
        return [_one(action, item, annotation) for item in _items(text)]
    if action.nargs == "?" and text.lower() in _TRUE | _FALSE:
        return _boolean(text)
    return _one(action, text, annotation)


def _boolean(text: str) -> bool:
    word = text.strip().lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise BadValue("true or false")


def _items(text: str) -> list[str]:
    """`["a", "b"]` or `a,b`."""
    if text.lstrip().startswith("["):
        try:
            value = json.loads(text)
        except ValueError:
            raise BadValue("a list: a,b or a JSON list") from None
        return [item if isinstance(item, str) else json.dumps(item) for item in value]
    return [item.strip() for item in text.split(",") if item.strip()]


def _one(action: argparse.Action, text: str, annotation: str) -> Any:
    value: Any = text
    if callable(action.type):
        try:
            value = action.type(_whole(text) if "int" in annotation else text)
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            raise BadValue(_allowed(action, annotation), _reason(error)) from error
    choices = list(action.choices or ())
    if choices and value not in choices:
        words = {choice.lower(): choice for choice in choices if isinstance(choice, str)}
        if not isinstance(value, str) or value.strip().lower() not in words:
            raise BadValue(_allowed(action, annotation))
        value = words[value.strip().lower()]
    return value


def _whole(text: str) -> str:
    """64.0 is a whole number here, as in LMI."""
    head, point, tail = text.partition(".")
    return head if point and head.lstrip("+-").isdigit() and not tail.strip("0") else text


def _allowed(action: argparse.Action, annotation: str) -> str:
    if action.choices:
        return ", ".join("none" if choice is None else str(choice) for choice in action.choices)
    for word, meaning in (
        ("bool", "true or false"),
        ("int", "a whole number"),
        ("float", "a number"),
        ("dict", "a JSON object"),
        ("list", "a list: a,b or a JSON list"),
        ("Config", "a JSON object"),
    ):
        if word in annotation:
            return meaning
    return "text"


def _reason(error: Exception) -> str:
    """Which part of an object is wrong, where that is what the value is; else the words for what is allowed do."""
    listed = getattr(error.__cause__, "errors", None)
    if listed is None:
        return ""
    found = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in listed(include_url=False)]
    return "; ".join(found)[:_LONGEST]


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
