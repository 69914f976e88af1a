"""What an answer must look like, in the fields of every API, read into one `Constraint`.

`response_format` is OpenAI's, which TGI's chat also takes with a `value`; `structured_outputs` is vLLM's; `guided_*`
are vLLM's and Aphrodite's older fields; and `grammar` is TGI's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import msgspec

from handlers.errors import InvalidParameter, InvalidRequest
from handlers.grammars.json_schema import subschemas
from handlers.protocols.body import refuse_unknown, shown_value
from handlers.protocols.body_limits import MAX_DEPTH, depth
from handlers.request import Constraint

MAX_BYTES = 2**18
"""The most bytes of a schema, an expression, a grammar, or all choices together."""

MAX_WHITESPACE_PATTERN = 200

GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_json_object")
"""The older fields; a request may have one of them. `guided_whitespace_pattern` goes with the first."""

_NAMED_SCHEMA = frozenset({"name", "description", "schema", "strict"})
_FLAGS = frozenset({"disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"})
_WITHOUT_EFFECT = frozenset({"backend", "disable_fallback"})
"""Keys of `structured_outputs` that are ignored: there is one way to constrain answers."""

_OUTPUTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")

MOST_CHOICES = MAX_BYTES // 4
"""The most choices: each takes at least a letter, its quotes and a comma."""

_SPACE = r"[ \t\n\r]"
_WHITESPACE = re.compile(r"(?:[ \t\n\r?*+|()\[\]]|\(\?:|\\[nrts ]|\\x(?:20|0[9aAdD])|\{[0-9]{0,3}(?:,[0-9]{0,3})?\})*")


def read_constraint(
    *,
    response_format: object = None,
    structured_outputs: object = None,
    guided: Mapping[str, Any] | None = None,
    grammar: object = None,
) -> Constraint | None:
    """Return the one constraint that these fields, each as the client sent it, ask for; None for free text.

    guided: may hold other fields as well, which are not read.

    Raises:
        InvalidRequest: A field is malformed, or two of them ask for something; it names the field.
    """
    found = [
        _response_format(response_format),
        _structured_outputs(structured_outputs),
        *_guided(guided or {}),
        _typed(grammar, "grammar") if grammar is not None else None,
    ]
    asked = [constraint for constraint in found if constraint is not None]
    if len(asked) > 1:
        names = " and ".join(constraint.param for constraint in asked)
        raise InvalidRequest(f"{names} exclude each other: send one of them", param=asked[1].param)
    return asked[0] if asked else None


def _response_format(given: object) -> Constraint | None:
    if given is None:
        return None
    param = "response_format"
    fields = _object(given, param)
    kind = fields.get("type")
    if kind == "text":
        refuse_unknown(fields, {"type"}, param)
        return None
    if kind not in ("json_schema", "json_object") or fields.get("value") is not None:
        return _typed(fields, param)
    if kind == "json_schema" and fields.get("schema") is None:
        refuse_unknown(fields, {"type", "json_schema"}, param)
        return _named_schema(fields.get("json_schema"), f"{param}.json_schema", param)
    # llama.cpp and others write the schema itself beside the type.
    refuse_unknown(fields, {"type", *_NAMED_SCHEMA}, param)
    if fields.get("schema") is None:
        return Constraint("json_object", None, param)
    return _of_object(_schema(fields["schema"], f"{param}.schema", param), kind)


def _named_schema(given: object, where: str, param: str) -> Constraint:
    fields = _object(given, where)
    refuse_unknown(fields, _NAMED_SCHEMA, where, param=param)
    return _schema(fields.get("schema"), f"{where}.schema", param)


def _typed(given: object, param: str) -> Constraint:
    """Read TGI's `{"type", "value"}`."""
    fields = _object(given, param)
    kind, value = fields.get("type"), fields.get("value")
    where = f"{param}.value"
    if kind in ("json", "json_object", "json_schema", "regex"):
        refuse_unknown(fields, {"type", "value"}, param)
    if kind in ("json", "json_object"):
        return _of_object(_schema(value, where, param), kind)
    if kind == "json_schema":
        return _named_schema(value, where, param)
    if kind == "regex":
        return _text("regex", value, where, param)
    allowed = "'json', 'json_object', 'json_schema', 'regex'"
    if param == "response_format":
        allowed = f"'text', {allowed}"
    problem = "is missing" if kind is None else f"{shown_value(kind)} is not supported by this server"
    raise InvalidRequest(f"{param}.type {problem}; allowed: {allowed}", param=param)


def _structured_outputs(given: object) -> Constraint | None:
    if given is None:
        return None
    param = "structured_outputs"
    fields = _object(given, param)
    asked = _only(fields, param)
    refuse_unknown(fields, {*_OUTPUTS, *_FLAGS, *_WITHOUT_EFFECT}, param)
    if asked == "structural_tag":
        raise InvalidRequest(
            f"{param}.structural_tag is not supported by this server; use json, regex, choice or grammar", param=param
        )
    constraint = _one(asked, fields[asked], f"{param}.{asked}", param)
    if fields.get("disable_additional_properties") and constraint.kind == "json_schema":
        schema = msgspec.json.decode(constraint.value or "")
        for node in subschemas(schema):
            if isinstance(node.get("properties"), dict) or isinstance(node.get("patternProperties"), dict):
                node.setdefault("additionalProperties", False)
        constraint = replace(constraint, value=msgspec.json.encode(schema).decode())
    if fields.get("disable_any_whitespace"):
        return replace(constraint, whitespace_pattern="")
    return _with_whitespace(constraint, fields.get("whitespace_pattern"), f"{param}.whitespace_pattern")


def _guided(fields: Mapping[str, Any]) -> Iterator[Constraint]:
    for name in GUIDED:
        value = fields.get(name)
        if value is None or value is False:
            continue
        constraint = _one(name.removeprefix("guided_"), value, name, name)
        name = "guided_whitespace_pattern"
        yield _with_whitespace(constraint, fields.get(name), name)


def _one(what: str, value: object, where: str, param: str) -> Constraint:
    """Read vLLM's `json`, `regex`, `choice`, `grammar` or `json_object`."""
    if what == "json":
        return _schema(value, where, param)
    if what == "choice":
        return _choice(value, where, param)
    if what == "json_object":
        if value is not True:
            raise InvalidRequest(f"{where} must be true or left out", param=param)
        return Constraint("json_object", None, param)
    return _text("regex" if what == "regex" else "grammar", value, where, param)


def _schema(given: object, where: str, param: str) -> Constraint:
    """Read a JSON schema, given as an object or as text."""
    if isinstance(given, str):
        _check_size(given, where, param)
        try:
            given = msgspec.json.decode(given)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise InvalidRequest(f"{where} is a text that is not valid JSON", param=param) from None
    if not isinstance(given, dict):
        raise InvalidRequest(f"{where} must be a JSON schema: an object", param=param)
    if depth(given) > MAX_DEPTH:
        raise InvalidRequest(f"{where} is nested too deeply; allowed: {MAX_DEPTH} levels", param=param)
    text = msgspec.json.encode(given).decode()
    _check_size(text, where, param)
    return Constraint("json_schema", text, param)


def _of_object(constraint: Constraint, kind: str) -> Constraint:
    """Return the constraint of an object for an empty schema, which would allow any value."""
    if kind == "json_object" and constraint.value == "{}":
        return Constraint("json_object", None, constraint.param)
    return constraint


def _choice(given: object, where: str, param: str) -> Constraint:
    if not isinstance(given, list) or not given or not all(isinstance(choice, str) and choice for choice in given):
        raise InvalidRequest(f"{where} must be a list of texts, none of them empty", param=param)
    if len(given) > MOST_CHOICES:
        raise InvalidRequest(f"{where} has {len(given)} entries; allowed: at most {MOST_CHOICES}", param=param)
    text = msgspec.json.encode(list(dict.fromkeys(given))).decode()
    _check_size(text, where, param)
    return Constraint("choice", text, param)


def _text(kind: Any, given: object, where: str, param: str) -> Constraint:
    if not isinstance(given, str) or not given:
        raise InvalidRequest(f"{where} must be a text that is not empty", param=param)
    _check_size(given, where, param)
    return Constraint(kind, given, param)


def _with_whitespace(constraint: Constraint, pattern: object, where: str) -> Constraint:
    """Add the expression for white space inside JSON. It may match nothing else, so that the answer remains JSON."""
    if pattern is None:
        return constraint
    if constraint.kind not in ("json_schema", "json_object"):
        raise InvalidRequest(f"{where} goes with a JSON schema only", param=constraint.param)
    if not isinstance(pattern, str) or len(pattern) > MAX_WHITESPACE_PATTERN or not _WHITESPACE.fullmatch(pattern):
        raise InvalidRequest(
            f"{where} must be a regular expression of white space alone, such as '[ \\n]?', of at most "
            f"{MAX_WHITESPACE_PATTERN} characters",
            param=constraint.param,
        )
    return replace(constraint, whitespace_pattern=pattern.replace(r"\s", _SPACE))


def _only(fields: dict[str, Any], param: str) -> str:
    asked = [name for name in _OUTPUTS if fields.get(name) is not None and fields[name] is not False]
    if not asked:
        raise InvalidParameter(param, f"asks for nothing; allowed: {', '.join(_OUTPUTS[:-1])}")
    if len(asked) > 1:
        listed = " and ".join(f"{param}.{name}" for name in asked)
        raise InvalidRequest(f"{listed} exclude each other: send one of them", param=param)
    return asked[0]


def _object(given: object, where: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise InvalidRequest(f"{where} must be an object", param=where.partition(".")[0])
    return given


def _check_size(text: str, where: str, param: str) -> None:
    if (size := len(text.encode())) > MAX_BYTES:
        raise InvalidRequest(f"{where} has {size} bytes; allowed: at most {MAX_BYTES}", param=param)
