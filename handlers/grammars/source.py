"""A constraint in the words of llguidance."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec
from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark

from engine.guidance import GrammarError
from handlers.grammars.json_schema import subschemas
from handlers.grammars.numbers import exact_numbers

WHITESPACE = r"(?: ?|\r?\n[ \t]{0,32})"
"""Between the tokens of JSON: a space, or a line end and its indentation, as JSON is written everywhere. Bounded, or a
model that has lost its way could write line ends for ever."""

_CHECKED_FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
)


def grammar_of(kind: str, value: str | None, whitespace_pattern: str | None) -> str:
    """The grammar for a constraint's fields (see `handlers.request.Constraint`). Raises GrammarError."""
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
    except Exception as error:  # the converters raise whatever the text makes them raise
        raise GrammarError(f"it cannot be read: {error}") from error


def _json(schema: Any, whitespace_pattern: str) -> str:
    """Dropped are keywords that ask for nothing, `uniqueItems: false` and formats that JSON Schema itself lets one
    take for a comment, and llguidance's own options, which could make the answer something else than JSON."""
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
    """Whether this llguidance, as those that vLLM asks for, lets white space follow itself, so that no pattern bounds
    it. Then it may stand behind colons and commas alone, of which it is a part."""
    grammar = LLMatcher.grammar_from_json_schema(
        '{"type": "array", "minItems": 1}', overrides={"whitespace_pattern": " ?"}
    )
    return LLMatcher(LLTokenizer("byte"), grammar, log_level=0).try_consume_tokens(list(b"[  ")) == 3


def _literal(text: str) -> str:
    return "".join(f"\\{c}" if c in r"\.+*?()|[]{}^$#&-~" else c for c in text)
