"""Translates constraints to grammars of llguidance."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import msgspec
from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark

from engine.guidance import GrammarError
from handlers.grammars.json_schema import subschemas

WHITESPACE = r"(?: ?|\r?\n[ \t]{0,32})"
"""White space between the tokens of JSON: a space, or a line end and its indentation, as JSON is usually written. It is
bounded, because a confused model could write line ends for ever."""

_CHECKED_FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
)


def grammar_of(kind: str, value: str | None, whitespace_pattern: str | None) -> str:
    """Return the grammar for a constraint's fields (see `handlers.request.Constraint`). Raises GrammarError."""
    try:
        if kind in ("json_object", "json_schema"):
            schema = {"type": "object"} if value is None else msgspec.json.decode(value)
            return _json(schema, WHITESPACE if whitespace_pattern is None else whitespace_pattern)
        assert value is not None
        if kind == "regex":
            return LLMatcher.grammar_from_regex(value)
        if kind == "choice":
            choices = msgspec.json.decode(value, type=list[str])
            return LLMatcher.grammar_from_regex("|".join(map(_literal, choices)))
        return LLMatcher.grammar_from_lark(gbnf_to_lark(value) if "::=" in value else value)
    except GrammarError:
        raise
    except Exception as error:  # the converters document no exceptions
        raise GrammarError(f"it cannot be read: {error}") from error


def _json(schema: Any, whitespace_pattern: str) -> str:
    """Translate a JSON schema.

    Keywords without effect are removed: `uniqueItems: false`, and formats that may be treated as comments. So are
    llguidance's own options, with which the output might not be JSON.
    """
    for node in subschemas(schema):
        exact_numbers(node)
        node.pop("x-guidance", None)
        if node.get("uniqueItems") is False:
            del node["uniqueItems"]
        if isinstance(wanted := node.get("format"), str) and wanted not in _CHECKED_FORMATS:
            del node["format"]
    text = msgspec.json.encode(schema).decode()
    if whitespace_pattern and _white_space_repeats():
        key, item = f":(?:{whitespace_pattern})", f",(?:{whitespace_pattern})"
        return LLMatcher.grammar_from_json_schema(
            text, overrides={"whitespace_flexible": False, "key_separator": key, "item_separator": item}
        )
    return LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": whitespace_pattern})


@cache
def _white_space_repeats() -> bool:
    """Whether this llguidance repeats the white-space pattern, so that it bounds nothing.

    The versions that vLLM requires do. White space is then allowed only after colons and commas, as a part of them.
    """
    grammar = LLMatcher.grammar_from_json_schema(
        '{"type": "array", "minItems": 1}', overrides={"whitespace_pattern": " ?"}
    )
    return LLMatcher(LLTokenizer("byte"), grammar, log_level=0).try_consume_tokens(list(b"[  ")) == 3


def _literal(text: str) -> str:
    return "".join(f"\\{c}" if c in r"\.+*?()|[]{}^$#&-~" else c for c in text)


LARGEST_EXACT = 2**53
"""Up to here a double represents every integer exactly."""

LARGEST = 2**63 - 1024
"""The largest double that is a 64-bit integer; llguidance supports no greater bounds."""

_LEAST, _MOST = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")


def exact_numbers(schema: dict[str, Any]) -> None:
    """Correct numbers that llguidance, which stores them in double precision, would change.

    A bound that is not a double is moved inwards to the next one, so that the output still respects the schema. Only
    this schema is considered, not those inside it. Raises GrammarError if a value cannot be represented exactly.
    """
    for key in _LEAST:
        if _is_large(schema.get(key)):
            schema[key] = _at_least(schema[key])
    for key in _MOST:
        if _is_large(schema.get(key)):
            schema[key] = -_at_least(-schema[key])
    if "const" in schema:
        _check(schema["const"])
    if "enum" in schema:
        _check(schema["enum"])


def _is_large(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST_EXACT


def _at_least(bound: int) -> int:
    """Return the smallest integer double that is not below the bound."""
    if bound > LARGEST:
        raise GrammarError(f"a bound is too large to be enforced: {str(bound)[:40]}")
    nearest = float(max(bound, -LARGEST))
    return int(nearest if nearest >= bound else math.nextafter(nearest, math.inf))


def _check(value: object) -> None:
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, int | float) and abs(node) > LARGEST_EXACT:
            raise GrammarError(f"const and enum may hold numbers up to 2^53 only, not {str(node)[:40]}")
        if isinstance(node, dict | list):
            waiting += node.values() if isinstance(node, dict) else node
