"""The tools of a chat: which functions a request offers, which of them may or must be called, and in what form."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from handlers.errors import InvalidParameter, InvalidRequest
from handlers.grammars.json_schema import subschemas
from handlers.parsers.base import AnswerFormats
from handlers.protocols.body import refuse_unknown, shown_value
from handlers.protocols.body_limits import MAX_DEPTH, depth
from handlers.protocols.constraints import MAX_BYTES
from handlers.protocols.known_names import KnownNames
from handlers.protocols.openai.bodies import ChatBody
from handlers.request import Constraint

MAX_TOOLS = 128
"""OpenAI's limit."""

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_MODES = ("none", "auto", "required")
_TOOL = frozenset({"type", "function", "id", "strict", "defer_loading", "cache_control"})
_FUNCTION = KnownNames(
    {"name", "description", "parameters", "arguments", "strict"}, {"return", "defer_loading", "cache_control"}
)
"""All keys of a function, unknown ones included, reach the chat template: models are trained with some."""

_CHOICE = frozenset({"type", "function", "name", "allowed_tools"})
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Tools:
    """What a request may call.

    Attributes:
        offered: All functions, for the chat template, each as {"type": "function", "function": {...}}.
        callable: Those that may be called; only one if the choice is "named".
        choice: Whether the model may choose to call, must call, or must call the one function.
        parallel: Whether an answer may contain several calls, which it never does for `legacy`.
        legacy: Whether the client uses OpenAI's older `functions` instead of `tools`.
    """

    offered: list[dict[str, Any]]
    callable: list[dict[str, Any]]
    choice: Literal["auto", "required", "named"]
    parallel: bool = True
    legacy: bool = False

    @property
    def forced(self) -> bool:
        return self.choice != "auto"

    def constraint(self) -> Constraint:
        """Return the form of a forced answer: an array of {"name", "parameters"}, or one call's arguments alone.

        White space is limited to what a line of JSON has, so that an answer cannot consist of it.
        """
        functions = [tool["function"] for tool in self.callable]
        named = self.choice == "named"
        schema = _parameters(functions[0]) if named else _calls_schema(functions, self.parallel)
        return Constraint("json_schema", msgspec.json.encode(schema).decode(), "tools", whitespace_pattern="[ ]?")


def read_tools(asked: ChatBody, formats: AnswerFormats) -> Tools | None:
    """Return the tools of a request; None if none may be called. `functions` and `function_call` are the older names.

    Raises:
        InvalidRequest: It names the path of what is wrong.
    """
    choice: object = asked.tool_choice
    legacy = not asked.tools and bool(asked.functions)
    if legacy:
        field, choice_field, offered = "functions", "function_call", asked.functions
        choice = {"function": asked.function_call} if isinstance(asked.function_call, dict) else asked.function_call
    else:
        field, choice_field, offered = "tools", "tool_choice", asked.tools
    mode, allowed = _choice(choice, choice_field)
    if mode == "none":
        return None
    if not offered:
        if mode in (None, "auto") and allowed is None:
            return None
        raise InvalidParameter(choice_field, f"asks for a call: send {field} to choose from")
    definitions = _definitions(offered, field)
    if mode not in (None, *_MODES) and allowed is None:
        allowed, mode = [str(mode)], "named"
    usable = definitions
    if allowed is not None:
        known = {tool["function"]["name"]: tool for tool in definitions}
        for name in allowed:
            if name not in known:
                raise InvalidParameter(choice_field, f"names {name[:80]!r}, which is not among the {field}")
        usable = [known[name] for name in dict.fromkeys(allowed)]
    parallel = asked.parallel_tool_calls is not False and not legacy
    if mode in ("required", "named"):
        return Tools(definitions, usable, "named" if mode == "named" else "required", parallel, legacy)
    if not formats.auto or formats.tools is None:
        raise InvalidParameter(
            choice_field,
            '"auto" (the default) requires option.enable_auto_tool_choice=true and '
            'option.tool_call_parser to be set on this server; a named choice, "required" and "none" work without',
        )
    return Tools(definitions, usable, "auto", parallel, legacy)


def _choice(given: object, param: str) -> tuple[str | None, list[str] | None]:
    """Return the mode and the allowed names. Any other string is a function's name, as in TGI."""
    if given is None or isinstance(given, str):
        return given or None, None
    correct = '{"type": "function", "function": {"name": "..."}}'
    if not isinstance(given, dict):
        raise InvalidParameter(param, f"must be a string or {correct}")
    refuse_unknown(given, _CHOICE, param)
    if given.get("type") == "allowed_tools":
        return _allowed(given.get("allowed_tools"), param)
    if isinstance(function := given.get("function"), dict):
        _refuse_misspelt(function, f"{param}.function", param)
    name = _name_of(given)
    if (given.get("type") or "function") != "function" or name is None:
        raise InvalidParameter(param, f'is none of "none", "auto", "required" and {correct}')
    return "named", [name]


def _allowed(given: object, param: str) -> tuple[str, list[str]]:
    param = f"{param}.allowed_tools"
    fields = given if isinstance(given, dict) else {}
    refuse_unknown(fields, {"mode", "tools"}, param)
    mode, tools = fields.get("mode"), fields.get("tools")
    names = [_name_of(tool) for tool in tools] if isinstance(tools, list) else []
    if mode not in ("auto", "required") or not names or len(names) > MAX_TOOLS or None in names:
        raise InvalidParameter(param, 'must be {"mode": "auto" or "required", "tools": [functions by their names]}')
    return mode, [name for name in names if name is not None]


def _name_of(given: object) -> str | None:
    if not isinstance(given, dict):
        return None
    function = given.get("function", given)
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) and name else None


def _definitions(offered: Sequence[object], field: str) -> list[dict[str, Any]]:
    if len(offered) > MAX_TOOLS:
        raise InvalidParameter(field, f"has {len(offered)} entries; allowed: {MAX_TOOLS}")
    definitions: list[dict[str, Any]] = []
    for number, given in enumerate(offered):
        path = f"{field}[{number}]"
        if not isinstance(given, dict):
            raise InvalidParameter(path, "must be an object")
        if field == "functions":
            function: object = given
        else:
            kind = given.get("type")
            if kind is not None and kind != "function":
                raise InvalidParameter(
                    f"{path}.type", f"is {shown_value(kind)}; this server knows tools of type function"
                )
            refuse_unknown(given, _TOOL, path)
            function, path = given.get("function"), f"{path}.function"
        definitions.append({"type": "function", "function": _function(function, path)})
    names = [tool["function"]["name"] for tool in definitions]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidParameter(field, f"has two functions named {twice!r}")
    if (size := len(msgspec.json.encode(definitions))) > MAX_BYTES:
        raise InvalidParameter(field, f"have {size} bytes; allowed: {MAX_BYTES}")
    return definitions


def _function(given: object, path: str) -> dict[str, Any]:
    """Return a checked copy; `parameters`, which TGI's clients also call `arguments`, have their usual name there."""
    if not isinstance(given, dict):
        raise InvalidParameter(path, "must be an object with the function's name")
    name = given.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        shown = f"is {name[:80]!r}" if isinstance(name, str) else "is missing"
        raise InvalidParameter(
            f"{path}.name", f"{shown}; allowed: 1 to 128 letters, digits, underscores, dots and dashes"
        )
    _refuse_misspelt(given, path, path)
    description = given.get("description")
    if description is not None and not isinstance(description, str):
        raise InvalidParameter(f"{path}.description", "must be a string")
    function = {key: value for key, value in given.items() if value is not None and key != "arguments"}
    key = "parameters" if given.get("parameters") is not None else "arguments"
    parameters = given.get(key)
    if parameters is not None:
        if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
            raise InvalidParameter(
                f"{path}.{key}", 'must be the JSON schema of an object: {"type": "object", "properties": ...}'
            )
        function["parameters"] = parameters
    if depth(function) > MAX_DEPTH:
        raise InvalidParameter(path, f"is nested too deeply; allowed: {MAX_DEPTH} levels")
    return function


def _refuse_misspelt(function: Mapping[str, Any], path: str, param: str) -> None:
    for name, known in _FUNCTION.nearest(function):
        if not function.get(known):
            raise InvalidRequest(f"{path} has the key {name!r}; did you mean {known!r}?", param=param)


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    given = function.get("parameters")
    return {"type": "object", **given} if given else _NO_PARAMETERS


def _calls_schema(functions: Sequence[Mapping[str, Any]], parallel: bool) -> dict[str, Any]:
    """Return the schema of an array of calls, with each function's own schema, adjusted, among the definitions."""
    places = [f"#/$defs/{number}" for number in range(len(functions))]
    call = [
        {
            "type": "object",
            "properties": {"name": {"const": function["name"]}, "parameters": {"$ref": place}},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for function, place in zip(functions, places, strict=True)
    ]
    schema: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": call},
        "$defs": {
            str(number): _moved(_parameters(function), place)
            for number, (function, place) in enumerate(zip(functions, places, strict=True))
        },
    }
    return schema if parallel else {**schema, "maxItems": 1}


def _moved(schema: Mapping[str, Any], place: str) -> Any:
    """Return a copy of a schema whose references fit its `place` in another schema."""
    copy = msgspec.json.decode(msgspec.json.encode(schema))
    for node in subschemas(copy):
        for key in ("$schema", "$id"):
            node.pop(key, None)
        reference = node.get("$ref")
        if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
            node["$ref"] = place + reference[1:]
    return copy
