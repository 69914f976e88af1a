"""Reasoning between tags: <think>...</think> and its variants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from handlers.parsers.base import Content, Parser, ParserContext, Piece, Reasoning, parse_whole, possible_beginning
from handlers.parsers.json_scanner import skip_space

Begins = Literal["reasoning", "content", "tagged"]


class ThinkParser:
    """Finds one block of reasoning at the beginning of the completion."""

    def __init__(self, opening: str, closing: str, begins: Begins = "tagged", *, interrupt: str = "") -> None:
        """Create a parser.

        Args:
            opening: Opening tag.
            closing: Closing tag.
            begins: What the completion begins with: reasoning, whose opening tag is then optional; content; or, if
                "tagged", reasoning only after the opening tag.
            interrupt: A mark that also ends reasoning and belongs to the text after it; "" for none.
        """
        self._opening, self._closing, self._interrupt = opening, closing, interrupt
        self._begins = begins
        self._place: Literal["blank", "reasoning", "content"] = "content" if begins == "content" else "blank"
        self._blank: list[str] = []
        self._held = ""
        self._out: list[Piece] = []

    def push(self, text: str, token_ids: Sequence[int] = ()) -> list[Piece]:
        text, self._held = self._held + text, ""
        at = 0
        if self._place == "blank":
            at = self._before(text)
        if self._place == "reasoning":
            at = self._inside(text, at)
        if self._place == "content":
            self._give(text[at:])
            at = len(text)
        self._held = text[at:]
        out, self._out = self._out, []
        return out

    def finish(self) -> list[Piece]:
        if self._place == "blank":
            self._decide(self._begins == "reasoning")
        self._give(self._held)
        self._held = ""
        out, self._out = self._out, []
        return out

    def _before(self, text: str) -> int:
        """White space may precede the opening tag."""
        at = skip_space(text, 0)
        self._blank.append(text[:at])
        if text.startswith(self._opening, at):
            self._blank.clear()
            self._decide(True)
            return at + len(self._opening)
        if not self._opening.startswith(text[at:]):
            self._decide(self._begins == "reasoning")
        return at

    def _decide(self, reasons: bool) -> None:
        self._place = "reasoning" if reasons else "content"
        self._give("".join(self._blank))
        self._blank.clear()

    def _inside(self, text: str, at: int) -> int:
        end = text.find(self._closing, at)
        interrupted = text.find(self._interrupt, at) if self._interrupt else -1
        if interrupted >= 0 and not 0 <= end < interrupted:
            self._give(text[at:interrupted])
            self._place = "content"
            return interrupted
        if end >= 0:
            self._give(text[at:end])
            self._place = "content"
            return end + len(self._closing)
        end = possible_beginning(text, at, self._closing)
        if self._interrupt:
            end = min(end, possible_beginning(text, at, self._interrupt))
        self._give(text[at:end])
        return end

    def _give(self, text: str) -> None:
        if text:
            self._out.append(Reasoning(text) if self._place == "reasoning" else Content(text))


class ReasoningThenCalls:
    """Looks for calls in the text that is not reasoning.

    The second parser gets no token ids: the first one may pass on only a part of a delta.
    """

    def __init__(self, reasoning: Parser, calls: Parser) -> None:
        self._reasoning, self._calls = reasoning, calls

    def push(self, text: str, token_ids: Sequence[int] = ()) -> list[Piece]:
        return self._parsed(self._reasoning.push(text, token_ids))

    def finish(self) -> list[Piece]:
        return [*self._parsed(self._reasoning.finish()), *self._calls.finish()]

    def whole(self, text: str, token_ids: Sequence[int] = ()) -> list[Piece]:
        pieces = parse_whole(self._reasoning, text, token_ids)
        content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
        reasoning = [piece for piece in pieces if not isinstance(piece, Content)]
        return [*reasoning, *(parse_whole(self._calls, content) if content else ())]

    def _parsed(self, pieces: list[Piece]) -> list[Piece]:
        out: list[Piece] = []
        for piece in pieces:
            if isinstance(piece, Content):
                out += self._calls.push(piece.text)
            else:
                out.append(piece)
        return out


def in_prompt(asked: ParserContext, opening: str, closing: str) -> Begins | None:
    """Return what the prompt's end makes the completion begin with; None if the prompt shows no tag, or is unknown."""
    end = asked.prompt_text[-200:].rstrip()
    if end.endswith(opening):
        return "reasoning"
    return "content" if end.endswith(closing) else None
