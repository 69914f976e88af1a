"""What the answers to a chat look like because of its tools, its constraint and the model's reasoning.

`AnswerForm` is the grammar that answers must match and the parser that reads them; `ParsedAnswers` makes the messages
and streamed deltas that show calls and reasoning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from msgspec import UNSET

from handlers.deltas import Delta, PromptStats
from handlers.errors import InvalidParameter
from handlers.parsers.base import (
    CallArguments,
    CallBroken,
    CallStart,
    Content,
    Parser,
    ParserContext,
    Piece,
    Reasoning,
    parse_whole,
)
from handlers.parsers.reasoning import ReasoningThenCalls
from handlers.parsers.select import named_parser, openai_call_id, required_parser
from handlers.protocols.base import Answer, ServerContext
from handlers.protocols.openai.replies import (
    CalledFunction,
    CalledFunctionDelta,
    ChatDelta,
    ChatMessage,
    FinishReason,
    ToolCall,
    ToolCallDelta,
)
from handlers.protocols.openai.tools import Tools
from handlers.request import Constraint

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
            raise InvalidParameter(
                constraint.param, f"and a {choice} that forces a call exclude each other: send one of them"
            )
        return AnswerForm(tools.constraint(), ParsedAnswers(_forced(tools, server), tools))
    calls = formats.tools if tools is not None else None
    if constraint is not None or (calls is None and formats.reasoning is None):
        return AnswerForm(constraint)
    reasoning = formats.reasoning
    definitions = [] if tools is None else tools.callable

    def make(stats: PromptStats) -> Parser:
        asked = ParserContext(definitions, stats.prompt_text, stats.prompt_token_ids, template_kwargs)
        if reasoning is None or calls is None:
            return (calls or reasoning).parser(asked)  # type: ignore[union-attr]
        if formats.together is not None:
            return formats.together(asked)
        return ReasoningThenCalls(reasoning.parser(asked), calls.parser(asked))

    markers = frozenset[str]().union(*(known.markers for known in (calls, reasoning) if known is not None))
    return AnswerForm(
        None,
        ParsedAnswers(make, tools, hide_reasoning=hide_reasoning),
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

    def __init__(self, make: MakeParser, tools: Tools | None, *, hide_reasoning: bool = False) -> None:
        self._make = make
        self._legacy = tools is not None and tools.legacy
        self._only_first = tools is not None and not tools.parallel
        self._called: FinishReason = "function_call" if self._legacy else "tool_calls"
        """The finish reason of a complete answer with calls."""
        if tools is not None and tools.choice == "named":
            self._called = "stop"
        self.hide_reasoning = hide_reasoning
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
