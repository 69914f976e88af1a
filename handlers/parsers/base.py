"""The seam between a model's text and a chat reply: small parsers, fed as the text comes.

A parser never loses text: what is no call and no reasoning comes out as content, in order. The same text gives the
same pieces wherever it is cut, once neighbours of one kind are joined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model wrote to itself."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call of the function `name` begins. `index` counts an answer's calls from 0, broken ones included."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments; all of a whole call's together are the JSON text of an object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallBroken:
    """A call that has started turned out to be malformed.

    text: all that the model wrote of it so far, marks included. A whole reply shows it as content in the call's
    place; in a stream it has been sent already. What follows comes as further pieces.
    """

    index: int
    text: str


Piece = Content | Reasoning | CallStart | CallArguments | CallBroken


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """The same with neighbours of one kind as one."""
    out: list[Piece] = []
    for (kind, index), run in groupby(pieces, key=lambda piece: (type(piece), getattr(piece, "index", -1))):
        same = list(run)
        if len(same) == 1 or kind in (CallStart, CallBroken):
            out += same
        elif kind is CallArguments:
            out.append(
                CallArguments(
                    index, "".join(piece.text for piece in same if isinstance(piece, CallArguments))
                )
            )
        else:
            text = "".join(piece.text for piece in same if isinstance(piece, Content | Reasoning))
            out.append(Content(text) if kind is Content else Reasoning(text))
    return out


class Parser(Protocol):
    """Parses one answer."""

    def push(self, text: str, token_ids: Sequence[int] = ()) -> list[Piece]:
        """token_ids: the tokens that came with the text, for parsers that go by them."""

    def finish(self) -> list[Piece]:
        """What was held back when the answer ended. A call that the end cut short stays as it is."""


@runtime_checkable
class WholeParser(Parser, Protocol):
    """Also knows a way of its own to parse a whole answer."""

    def whole(self, text: str, token_ids: Sequence[int] = ()) -> list[Piece]:
        """In place of `push` and `finish`."""


def parse_whole(parser: Parser, text: str, token_ids: Sequence[int] = ()) -> list[Piece]:
    """The pieces of a whole answer."""
    if isinstance(parser, WholeParser):
        return parser.whole(text, token_ids)
    return [*parser.push(text, token_ids), *parser.finish()]


@dataclass(frozen=True, slots=True)
class Asked:
    """What a parser may know of the request whose answer it parses.

    tools: OpenAI's definitions of those that may be called. prompt_text: as the model was given it; "" where that
    is not known. template_kwargs: what the client told the chat template (`enable_thinking`).
    """

    tools: Sequence[Mapping[str, Any]] = ()
    prompt_text: str = ""
    prompt_token_ids: Sequence[int] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tool_names(self) -> frozenset[str]:
        return frozenset(tool["function"]["name"] for tool in self.tools)


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family of models writes calls.

    markers: texts that it may write as special tokens, which must then not be skipped.
    call_id: a new id, in the form that the family's chat template takes back.
    """

    parser: Callable[[Asked], Parser]
    markers: frozenset[str]
    call_id: Callable[[], str]


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a family of models tells reasoning from its answer. markers: as for tools."""

    parser: Callable[[Asked], Parser]
    markers: frozenset[str]


@dataclass(frozen=True, slots=True)
class AnswerFormats:
    """How the served model's answers are read; None for a format that the operator did not name.

    auto: the model may decide by itself to call a tool. together: a parser of both; None where one of each is put
    behind the other.
    """

    tools: ToolFormat | None = None
    auto: bool = False
    reasoning: ReasoningFormat | None = None
    together: Callable[[Asked], Parser] | None = None
