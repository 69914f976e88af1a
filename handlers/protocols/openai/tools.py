"""Tools and reasoning of a chat: what a request offers, and what its answers look like because of it.

`Tools` are what may be called, what must be, and the schema that forces a call. `AnswerForm` is the grammar that
answers must match, the parser that reads them, and the messages and streamed deltas that show calls and reasoning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import msgspec
from msgspec import UNSET

from handlers.deltas import Delta, PromptStats
from handlers.errors import InvalidRequest
from handlers.grammars.json_schema import subschemas
from handlers.parsers.base import (
    AnswerFormats,
    Asked,
    CallArguments,
    CallBroken,
    CallStart,
    Content,
    Parser,
    Piece,
    Reasoning,
    parse_whole,
)
from handlers.parsers.reasoning import ReasoningThenCalls
from handlers.parsers.select import named_parser, openai_call_id, required_parser
from handlers.protocols.base import Answer, ServerContext
from handlers.protocols.body import KnownNames, refuse_unknown, shown_value
from handlers.protocols.fields import MAX_BYTES, MAX_DEPTH, depth
from handlers.protocols.openai.replies import (
    CalledFunction,
    CalledFunctionDelta,
    ChatDelta,
    ChatMessage,
    FinishReason,
    ToolCall,
    ToolCallDelta,
)
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
        parallel: Whether an answer may contain several calls.
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
        return Constraint(
            "json_schema", msgspec.json.encode(schema).decode(), "tools", whitespace_pattern="[ ]?"
        )


def read_tools(
    *,
    tools: Sequence[object] | None,
    choice: object = None,
    parallel: bool | None = None,
    functions: Sequence[object] | None = None,
    function_call: object = None,
    formats: AnswerFormats,
) -> Tools | None:
    """Return the tools of a request; None if none may be called. `functions` and `function_call` are the older names.

    Raises:
        InvalidRequest: It names the path of what is wrong.
    """
    legacy = not tools and bool(functions)
    if legacy:
        field, choice_field, offered = "functions", "function_call", functions or ()
        choice = {"function": function_call} if isinstance(function_call, dict) else function_call
    else:
        field, choice_field, offered = "tools", "tool_choice", tools or ()
    mode, allowed = _choice(choice, choice_field)
    if mode == "none":
        return None
    if not offered:
        if mode in (None, "auto") and allowed is None:
            return None
        raise InvalidRequest(
            f"{choice_field} asks for a call: send {field} to choose from", param=choice_field
        )
    definitions = _definitions(offered, field)
    if mode not in (None, *_MODES) and allowed is None:
        allowed, mode = [str(mode)], "named"
    usable = definitions
    if allowed is not None:
        known = {tool["function"]["name"]: tool for tool in definitions}
        for name in allowed:
            if name not in known:
                raise InvalidRequest(
                    f"{choice_field} names {name[:80]!r}, which is not among the {field}", param=choice_field
                )
        usable = [known[name] for name in dict.fromkeys(allowed)]
    parallel = parallel is not False and not legacy
    if mode in ("required", "named"):
        return Tools(definitions, usable, "named" if mode == "named" else "required", parallel, legacy)
    if not formats.auto or formats.tools is None:
        raise InvalidRequest(
            f'{choice_field} "auto" (the default) requires option.enable_auto_tool_choice=true and '
            f'option.tool_call_parser to be set on this server; a named choice, "required" and "none" work without',
            param=choice_field,
        )
    return Tools(definitions, usable, "auto", parallel, legacy)


def _choice(given: object, param: str) -> tuple[str | None, list[str] | None]:
    """Return the mode and the allowed names. Any other string is a function's name, as in TGI."""
    if given is None or isinstance(given, str):
        return given or None, None
    correct = '{"type": "function", "function": {"name": "..."}}'
    if not isinstance(given, dict):
        raise InvalidRequest(f"{param} must be a string or {correct}", param=param)
    refuse_unknown(given, _CHOICE, param)
    if given.get("type") == "allowed_tools":
        return _allowed(given.get("allowed_tools"), param)
    if isinstance(function := given.get("function"), dict):
        _refuse_misspelt(function, f"{param}.function", param)
    name = _name_of(given)
    if (given.get("type") or "function") != "function" or name is None:
        raise InvalidRequest(f'{param} is none of "none", "auto", "required" and {correct}', param=param)
    return "named", [name]


def _allowed(given: object, param: str) -> tuple[str, list[str]]:
    param = f"{param}.allowed_tools"
    fields = given if isinstance(given, dict) else {}
    refuse_unknown(fields, {"mode", "tools"}, param)
    mode, tools = fields.get("mode"), fields.get("tools")
    names = [_name_of(tool) for tool in tools] if isinstance(tools, list) else []
    if mode not in ("auto", "required") or not names or len(names) > MAX_TOOLS or None in names:
        raise InvalidRequest(
            f'{param} must be {{"mode": "auto" or "required", "tools": [functions by their names]}}',
            param=param,
        )
    return mode, [name for name in names if name is not None]


def _name_of(given: object) -> str | None:
    if not isinstance(given, dict):
        return None
    function = given.get("function", given)
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) and name else None


def _definitions(offered: Sequence[object], field: str) -> list[dict[str, Any]]:
    if len(offered) > MAX_TOOLS:
        raise InvalidRequest(f"{field} has {len(offered)} entries; allowed: {MAX_TOOLS}", param=field)
    definitions: list[dict[str, Any]] = []
    for number, given in enumerate(offered):
        path = f"{field}[{number}]"
        if not isinstance(given, dict):
            raise InvalidRequest(f"{path} must be an object", param=path)
        if field == "functions":
            function: object = given
        else:
            kind = given.get("type")
            if kind is not None and kind != "function":
                raise InvalidRequest(
                    f"{path}.type is {shown_value(kind)}; this server knows tools of type function",
                    param=f"{path}.type",
                )
            refuse_unknown(given, _TOOL, path)
            function, path = given.get("function"), f"{path}.function"
        definitions.append({"type": "function", "function": _function(function, path)})
    names = [tool["function"]["name"] for tool in definitions]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"{field} has two functions named {twice!r}", param=field)
    if (size := len(msgspec.json.encode(definitions))) > MAX_BYTES:
        raise InvalidRequest(f"{field} have {size} bytes; allowed: {MAX_BYTES}", param=field)
    return definitions


def _function(given: object, path: str) -> dict[str, Any]:
    """Return a checked copy; `parameters`, which TGI's clients also call `arguments`, have their usual name there."""
    if not isinstance(given, dict):
        raise InvalidRequest(f"{path} must be an object with the function's name", param=path)
    name = given.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        shown = f"is {name[:80]!r}" if isinstance(name, str) else "is missing"
        raise InvalidRequest(
            f"{path}.name {shown}; allowed: 1 to 128 letters, digits, underscores, dots and dashes",
            param=f"{path}.name",
        )
    _refuse_misspelt(given, path, path)
    description = given.get("description")
    if description is not None and not isinstance(description, str):
        raise InvalidRequest(f"{path}.description must be a string", param=f"{path}.description")
    function = {key: value for key, value in given.items() if value is not None and key != "arguments"}
    key = "parameters" if given.get("parameters") is not None else "arguments"
    parameters = given.get(key)
    if parameters is not None:
        if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
            raise InvalidRequest(
                f'{path}.{key} must be the JSON schema of an object: {{"type": "object", "properties": ...}}',
                param=f"{path}.{key}",
            )
        function["parameters"] = parameters
    if depth(function) > MAX_DEPTH:
        raise InvalidRequest(f"{path} is nested too deeply; allowed: {MAX_DEPTH} levels", param=path)
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


MakeParser = Callable[[PromptStats], Parser]
"""A parser for one more answer to the prompt."""


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """What a request's answers look like, to the engine and to the client.

    Attributes:
        constraint: The form that every answer must have; None for free text.
        parsed: Parses the answers; None for plain text.
        keeps_special_tokens: Whether special tokens mark calls or reasoning, so that they must stay in the text.
        hides_tokens: Whether tokens are not shown, because they would reveal hidden reasoning.
    """

    constraint: Constraint | None
    parsed: ParsedAnswers | None = None
    keeps_special_tokens: bool = False
    hides_tokens: bool = False


def answer_form(
    tools: Tools | None,
    constraint: Constraint | None,
    server: ServerContext,
    template_kwargs: Mapping[str, Any],
    *,
    hide_reasoning: bool = False,
) -> AnswerForm:
    """Return the form of the answers to a chat.

    A constraint holds from the first token on, so a constrained answer has neither reasoning nor calls that the model
    chooses to make.

    Raises:
        InvalidRequest: A constraint is given although a call is forced.
    """
    formats = server.formats
    if tools is not None and tools.forced:
        if constraint is not None:
            choice = "function_call" if tools.legacy else "tool_choice"
            raise InvalidRequest(
                f"{constraint.param} and a {choice} that forces a call exclude each other: send one of them",
                param=constraint.param,
            )
        named = tools.choice == "named"
        called: FinishReason = "stop" if named else "function_call" if tools.legacy else "tool_calls"
        return AnswerForm(
            tools.constraint(),
            ParsedAnswers(
                _forced(tools, server), called=called, parallel=tools.parallel, legacy=tools.legacy
            ),
        )
    calls = formats.tools if tools is not None else None
    if constraint is not None or (calls is None and formats.reasoning is None):
        return AnswerForm(constraint)
    reasoning = formats.reasoning
    definitions = [] if tools is None else tools.callable

    def make(stats: PromptStats) -> Parser:
        asked = Asked(definitions, stats.prompt_text, stats.prompt_token_ids, template_kwargs)
        if reasoning is None or calls is None:
            return (calls or reasoning).parser(asked)  # type: ignore[union-attr]
        if formats.together is not None:
            return formats.together(asked)
        return ReasoningThenCalls(reasoning.parser(asked), calls.parser(asked))

    markers = frozenset[str]().union(*(known.markers for known in (calls, reasoning) if known is not None))
    legacy = tools is not None and tools.legacy
    return AnswerForm(
        None,
        ParsedAnswers(
            make,
            called="function_call" if legacy else "tool_calls",
            parallel=tools is None or tools.parallel,
            hide_reasoning=hide_reasoning,
            legacy=legacy,
        ),
        keeps_special_tokens=not markers.isdisjoint(server.special_tokens),
        hides_tokens=hide_reasoning and reasoning is not None,
    )


def _forced(tools: Tools, server: ServerContext) -> MakeParser:
    formats = server.formats
    call_id = openai_call_id if formats.tools is None else formats.tools.call_id
    if tools.choice == "named":
        name: str = tools.callable[0]["function"]["name"]
        return lambda stats: named_parser(name, call_id)
    return lambda stats: required_parser(call_id)


class ParsedAnswers:
    """Parses the answers to one prompt."""

    def __init__(
        self,
        make: MakeParser,
        *,
        called: FinishReason = "tool_calls",
        parallel: bool = True,
        hide_reasoning: bool = False,
        legacy: bool = False,
    ) -> None:
        """Prepare to parse.

        Args:
            make: Makes a parser for each answer.
            called: The finish reason of a complete answer with calls.
            parallel: False to show only an answer's first call.
            hide_reasoning: Whether to leave out reasoning.
            legacy: Whether a call is shown as `function_call`, of which an answer has one.
        """
        self._make = make
        self._called = called
        self._only_first = legacy or not parallel
        self.hide_reasoning = hide_reasoning
        self._legacy = legacy
        self._open: dict[int, _Streamed] = {}

    def message(self, answer: Answer, stats: PromptStats) -> tuple[ChatMessage, FinishReason | None]:
        """Return a whole answer's message and its finish reason."""
        parser = self._make(stats)
        content: list[str] = []
        reasoning: list[str] = []
        calls: dict[int, tuple[CallStart, list[str]]] = {}
        for piece in parse_whole(parser, answer.text, answer.token_ids):
            match piece:
                case Content(more):
                    content.append(more)
                case Reasoning(more):
                    reasoning.append(more)
                case CallStart(index):
                    calls[index] = (piece, [])
                case CallArguments(index, more):
                    calls[index][1].append(more)
                case CallBroken(index, more):
                    del calls[index]
                    content.append(more)
        message = ChatMessage("assistant", "".join(content))
        if not content and (calls or reasoning):
            message.content = None
        if reasoning and not self.hide_reasoning:
            message.reasoning = message.reasoning_content = "".join(reasoning)
        if calls:
            made = [
                ToolCall(start.id, "function", CalledFunction(start.name, "".join(arguments)))
                for start, arguments in calls.values()
            ]
            if self._only_first:
                del made[1:]
            if self._legacy:
                message.function_call = made[0].function
            else:
                message.tool_calls = made
        return message, self._reason(answer.finish_reason, bool(calls))

    def deltas(self, delta: Delta, stats: PromptStats) -> tuple[list[ChatDelta], FinishReason | None]:
        """Return what a delta adds to its answer's message, each of one kind, and the finish reason."""
        answer = self._open.get(delta.index)
        if answer is None:
            answer = self._open[delta.index] = _Streamed(self._make(stats), self._only_first)
        pieces = answer.parser.push(delta.text, delta.token_ids)
        if delta.finish_reason is not None:
            pieces += answer.parser.finish()
        shown = [self._delta(piece) for piece in pieces if answer.shows(piece)]
        reason = self._reason(delta.finish_reason, bool(answer.calls))
        return [delta for delta in shown if delta is not None], reason

    def _delta(self, piece: Piece) -> ChatDelta | None:
        match piece:
            case Content(text):
                return ChatDelta(content=text)
            case Reasoning(text):
                return None if self.hide_reasoning else ChatDelta(reasoning=text, reasoning_content=text)
            case CallStart(index, call_id, name):
                begun = CalledFunctionDelta(name=name, arguments="")
                if self._legacy:
                    return ChatDelta(function_call=begun)
                call = ToolCallDelta(index=index, id=call_id, type="function", function=begun)
                return ChatDelta(tool_calls=[call])
            case CallArguments(index, text):
                more = CalledFunctionDelta(arguments=text)
                if self._legacy:
                    return ChatDelta(function_call=more)
                return ChatDelta(tool_calls=[ToolCallDelta(index=index, function=more)])
            case CallBroken():
                return None

    def _reason(self, finish: str | None, called: bool) -> FinishReason | None:
        return self._called if called and finish == "stop" else cast("FinishReason | None", finish)


class _Streamed:
    """An answer that is being streamed."""

    def __init__(self, parser: Parser, only_first: bool) -> None:
        self.parser = parser
        self.calls: set[int] = set()
        self._only_first = only_first

    def shows(self, piece: Piece) -> bool:
        match piece:
            case CallStart(index):
                if self._only_first and self.calls:
                    return False
                self.calls.add(index)
            case CallArguments(index):
                return index in self.calls
            case CallBroken(index):
                self.calls.discard(index)
        return True


def first_deltas(deltas: Sequence[ChatDelta], echo: str) -> list[ChatDelta]:
    """Return the deltas with the answer's role and echo in front."""
    if echo or not deltas:
        return [ChatDelta("assistant", echo), *deltas]
    first = deltas[0]
    first.role = "assistant"
    if first.content is UNSET:
        first.content = None
    return [*deltas]
