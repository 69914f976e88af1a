"""Answers with calls and reasoning, as chat completions show them: whole messages and streamed deltas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from handlers.backends.base import Delta, PromptStats
from handlers.parsers.base import (
    CallArguments,
    CallBroken,
    CallStart,
    Content,
    Parser,
    Piece,
    Reasoning,
    parse_whole,
)
from handlers.protocols.base import Answer

MakeParser = Callable[[PromptStats], Parser]
"""A parser for one more answer to the prompt."""


class ParsedAnswers:
    """Parses the answers to one prompt.

    called: the finish reason of an answer that made calls and was not cut short. parallel: False shows an answer's
    first call only. hide_reasoning: reasoning is not shown. legacy: a call is a `function_call`, of which an answer
    has one.
    """

    def __init__(
        self,
        make: MakeParser,
        *,
        called: str = "tool_calls",
        parallel: bool = True,
        hide_reasoning: bool = False,
        legacy: bool = False,
    ) -> None:
        self._make = make
        self._called = called
        self._only_first = legacy or not parallel
        self.hide_reasoning = hide_reasoning
        self._legacy = legacy
        self._open: dict[int, _Streamed] = {}

    def message(self, answer: Answer, stats: PromptStats) -> tuple[dict[str, Any], str | None]:
        """A whole answer's message, without its role, and its finish reason."""
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
        message: dict[str, Any] = {"content": "".join(content), "refusal": None}
        if not content and (calls or reasoning):
            message["content"] = None
        if reasoning and not self.hide_reasoning:
            message |= _reasoning("".join(reasoning))
        if calls:
            written = [
                (start, {"name": start.name, "arguments": "".join(arguments)})
                for start, arguments in calls.values()
            ]
            if self._only_first:
                del written[1:]
            if self._legacy:
                message["function_call"] = written[0][1]
            else:
                message["tool_calls"] = [
                    {"id": start.id, "type": "function", "function": function} for start, function in written
                ]
        return message, self._reason(answer.finish_reason, bool(calls))

    def deltas(self, delta: Delta, stats: PromptStats) -> tuple[list[dict[str, Any]], str | None]:
        """What a delta adds to its answer's message, one kind of thing in each, and its finish reason."""
        answer = self._open.get(delta.index)
        if answer is None:
            answer = self._open[delta.index] = _Streamed(self._make(stats), self._only_first)
        pieces = answer.parser.push(delta.text, delta.token_ids)
        if delta.finish_reason is not None:
            pieces += answer.parser.finish()
        shown = [self._delta(piece) for piece in pieces if answer.shows(piece)]
        return [delta for delta in shown if delta], self._reason(delta.finish_reason, bool(answer.calls))

    def _delta(self, piece: Piece) -> dict[str, Any]:
        match piece:
            case Content(text):
                return {"content": text}
            case Reasoning(text):
                return {} if self.hide_reasoning else _reasoning(text)
            case CallStart(index, call_id, name):
                function = {"name": name, "arguments": ""}
                if self._legacy:
                    return {"function_call": function}
                call = {"index": index, "id": call_id, "type": "function", "function": function}
                return {"tool_calls": [call]}
            case CallArguments(index, text):
                if self._legacy:
                    return {"function_call": {"arguments": text}}
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
            case CallBroken():
                return {}

    def _reason(self, finish: str | None, called: bool) -> str | None:
        return self._called if called and finish == "stop" else finish


class _Streamed:
    """One answer on its way."""

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


def _reasoning(text: str) -> dict[str, str]:
    """vLLM's name, and the one that it had before, which DeepSeek's clients read."""
    return {"reasoning": text, "reasoning_content": text}


def first_delta(deltas: Sequence[dict[str, Any]], echo: str) -> list[dict[str, Any]]:
    """The deltas with an answer's role in front, and what is shown before it."""
    head: dict[str, Any] = {"role": "assistant"}
    if echo:
        return [{**head, "content": echo}, *deltas]
    if not deltas:
        return [{**head, "content": ""}]
    first, *others = deltas
    return [{**head, "content": None, **first}, *others]
