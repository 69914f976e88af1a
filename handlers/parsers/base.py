"""The pieces of a chat reply, and the interface of the small parsers that find them in a model's text as it arrives.

A parser never loses text: text that is neither a call nor reasoning is returned as content, in order. Wherever a text
is cut, it gives the same pieces, once adjacent pieces of one kind are joined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

from handlers.parsers.json_scanner import skip_space


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """The beginning of a call of the function `name`. index: its number in the completion, broken calls included."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments; all of a complete call's arguments together are the JSON text of an object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallBroken:
    """A call that has started turned out to be malformed; what follows comes as further pieces.

    text: Everything that the model wrote of the call so far, marks included. A whole reply shows it as content in the
    call's place; in a stream it has been sent already.
    """

    index: int
    text: str


Piece = Content | Reasoning | CallStart | CallArguments | CallBroken


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Join adjacent pieces of one kind."""
    out: list[Piece] = []
    for _, run in groupby(pieces, key=lambda piece: (type(piece), getattr(piece, "index", -1))):
        same = list(run)
        first = same[0]
        if len(same) == 1 or isinstance(first, CallStart | CallBroken):
            out += same
        else:
            out.append(replace(first, text="".join(piece.text for piece in same if not isinstance(piece, CallStart))))
    return out


class Parser(Protocol):
    """Parses one completion."""

    def push(self, text: str, token_ids: Sequence[int] = ()) -> list[Piece]:
        """Parse more text. token_ids: its tokens, for parsers that depend on them."""

    def finish(self) -> list[Piece]:
        """Return what was held back. A call that the end of the completion cuts short stays incomplete."""


@runtime_checkable
class WholeParser(Parser, Protocol):
    """A parser with a separate way to parse a whole completion."""

    def whole(self, text: str, token_ids: Sequence[int] = ()) -> list[Piece]:
        """Parse a whole completion, in place of `push` and `finish`."""


def parse_whole(parser: Parser, text: str, token_ids: Sequence[int] = ()) -> list[Piece]:
    """Return the pieces of a whole completion."""
    if isinstance(parser, WholeParser):
        return parser.whole(text, token_ids)
    return [*parser.push(text, token_ids), *parser.finish()]


@dataclass(frozen=True, slots=True)
class ParserContext:
    """What a parser may know of the request whose completion it parses.

    Attributes:
        tools: OpenAI's definitions of the functions that may be called.
        prompt_text: The prompt as the model received it; "" if it is unknown.
        prompt_token_ids: The prompt's tokens.
        template_kwargs: The client's variables for the chat template (`enable_thinking`).
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

    Attributes:
        parser: Makes a parser for a completion.
        markers: Texts that the model may write as special tokens, which must then not be skipped.
        call_id: Makes an id in the form that the family's chat template accepts.
    """

    parser: Callable[[ParserContext], Parser]
    markers: frozenset[str]
    call_id: Callable[[], str]


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a family of models separates reasoning from its answer. See `ToolFormat`."""

    parser: Callable[[ParserContext], Parser]
    markers: frozenset[str]


@dataclass(frozen=True, slots=True)
class AnswerFormats:
    """How the served model's completions are read.

    Attributes:
        tools: None if the operator did not name a parser.
        auto: The model may decide by itself to call a tool.
        reasoning: None if the operator did not name a parser.
        together: Makes a parser of both; None if one of each is used, one after the other.
    """

    tools: ToolFormat | None = None
    auto: bool = False
    reasoning: ReasoningFormat | None = None
    together: Callable[[ParserContext], Parser] | None = None


SPACE = " \t\r\n"


class Pieces:
    """Collects what a parser finds.

    White space next to calls only separates them. At the beginning of the completion and after a call it is held back
    until text follows, and dropped if a call or the end follows.
    """

    def __init__(self, call_id: Callable[[], str]) -> None:
        self._call_id = call_id
        self._ready: list[Piece] = []
        self._blank: list[str] | None = []
        self._source: list[str] = []
        self._calls = 0
        self._started = False
        self._after_call = False

    def take(self) -> list[Piece]:
        """Return the pieces since the last call."""
        ready, self._ready = self._ready, []
        return joined(ready) if len(ready) > 1 else ready

    def content(self, text: str) -> None:
        if self._blank is not None:
            if not text.strip(SPACE):
                if text:
                    self._blank.append(text)
                return
            text = "".join((*self._blank, text))
            self._blank = None
        if text:
            self._ready.append(Content(text))

    def source(self, text: str) -> None:
        """Add text, marks included, of a call that may still turn out not to be one."""
        if text:
            self._source.append(text)

    def start(self, name: str, call_id: str | None = None) -> None:
        self._ready.append(CallStart(self._calls, call_id or self._call_id(), name))
        self._started = True

    def arguments(self, text: str) -> None:
        if text:
            self._ready.append(CallArguments(self._calls, text))

    def call_ended(self) -> None:
        self._calls += 1
        self._source.clear()
        self._started = False
        self._blank = []
        self._after_call = True

    def mark_ended(self) -> None:
        """Handle the end of a mark that closes calls: white space before it is dropped."""
        if self._blank is not None and self._after_call:
            self._blank.clear()

    def no_call(self) -> None:
        """Handle the source as content, because it is not a call."""
        source = "".join(self._source)
        self._source.clear()
        if self._started:
            self._ready.append(CallBroken(self._calls, "".join((*(self._blank or ()), source))))
            self._calls += 1
            self._started = False
            self._blank = None
        else:
            self.content(source)

    def finish(self) -> None:
        """Handle the end of the completion: a call that has not started is content."""
        if self._source and not self._started:
            self.no_call()
        if self._blank and not self._after_call and not self._started:
            self._ready.append(Content("".join(self._blank)))
        self._blank = None


def possible_beginning(text: str, at: int, mark: str) -> int:
    """Return where, from `at` on, the text's end may be the beginning of the mark; the text's length if nowhere."""
    start = max(at, len(text) - len(mark) + 1)
    while start < len(text):
        start = text.find(mark[0], start)
        if start < 0:
            return len(text)
        if mark.startswith(text[start:]):
            return start
        start += 1
    return len(text)


State = Callable[[str, int], int | None]
"""Given the text and a position before its end, a state returns where the next state continues. It returns None if it
needs more text to decide; the undecided text is then short."""


class CallReader(Protocol):
    """Reads one call and writes it into the pieces as it arrives. broken: the text is not a call."""

    done: bool
    broken: bool

    def read(self, text: str, at: int) -> int:
        """Read more text; not to be called after the end.

        Returns the position after the part that belongs to the call, or of the first character that breaks it.
        """


class Machine:
    """Runs the states. Text before the position that they have reached is never looked at again."""

    _call: CallReader

    def __init__(self, pieces: Pieces, begin: State) -> None:
        self._pieces = pieces
        self._state = begin
        self._held = ""

    def push(self, text: str, token_ids: Sequence[int] = ()) -> list[Piece]:
        text = self._held + text
        at: int | None = 0
        reached = 0
        while reached < len(text) and (at := self._state(text, reached)) is not None:
            reached = at
        self._held = text[reached:]
        return self._pieces.take()

    def finish(self) -> list[Piece]:
        held, self._held = self._held, ""
        if held:
            self._cut_short(held)
        self._pieces.finish()
        return self._pieces.take()

    def _cut_short(self, held: str) -> None:
        """Handle undecided text at the end of the completion, such as half a mark."""
        self._pieces.content(held)

    def _outside(self, text: str, at: int) -> int | None:
        """Handle text that belongs to no call: by default, all that follows."""
        return self._content(text, at, len(text))

    def _after_call(self, text: str, at: int) -> int | None:
        return self._outside(text, at)

    def _in_call(self, text: str, at: int) -> int:
        end = self._source(text, at, self._call.read(text, at))
        if self._call.done:
            self._pieces.call_ended()
            self._state = self._after_call
        elif self._call.broken:
            self._failed(end)
        return end

    def _begin(self, call: CallReader, at: int) -> int:
        self._call, self._state = call, self._in_call
        return at

    def _failed(self, at: int) -> int:
        self._pieces.no_call()
        self._state = self._outside
        return at

    def _content(self, text: str, at: int, end: int) -> int:
        self._pieces.content(text[at:end])
        return end

    def _source(self, text: str, at: int, end: int) -> int:
        self._pieces.source(text[at:end])
        return end

    def _until(self, mark: str, following: State, text: str, at: int) -> int | None:
        """Look for a mark before a call; the text before it is content."""
        found = text.find(mark, at)
        if found < 0:
            end = self._content(text, at, possible_beginning(text, at, mark))
            return end if end > at else None
        self._content(text, at, found)
        self._state = following
        return self._source(text, found, found + len(mark))

    def _next_of_list(self, text: str, at: int, item: State, closed: State) -> int:
        """Look for what follows a call in a list: a comma, or the bracket that closes it."""
        if (end := self._content(text, at, skip_space(text, at))) > at:
            return end
        if text[at] == ",":
            self._state = item
            return self._source(text, at, at + 1)
        self._state = self._outside
        if text[at] != "]":
            return at
        self._pieces.mark_ended()
        self._state = closed
        return at + 1

    def _closing(self, mark: str, text: str, at: int) -> int | None:
        """Look for the mark that may close calls; white space may precede it."""
        if (end := self._content(text, at, skip_space(text, at))) > at:
            return end
        if mark.startswith(text[at:]) and text[at:] != mark:
            return None
        self._state = self._outside
        if not text.startswith(mark, at):
            return at
        self._pieces.mark_ended()
        return at + len(mark)
