"""Calls between tags: <tool_call>{"name": "f", "arguments": {...}}</tool_call>, as Hermes and Qwen write them."""

from __future__ import annotations

from handlers.parsers.call_object import CallObject
from handlers.parsers.json_scanner import skip_space
from handlers.parsers.machine import Machine
from handlers.parsers.writing import Pieces, possible_beginning

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesParser(Machine):
    """A call whose closing tag is missing is one all the same, as soon as its object is whole."""

    def __init__(self, pieces: Pieces, opening: str = OPEN, closing: str = CLOSE) -> None:
        super().__init__(pieces, self._text)
        self._open, self._close = opening, closing
        self._call = CallObject(pieces)

    def _text(self, text: str, at: int) -> int | None:
        found = text.find(self._open, at)
        if found < 0:
            end = possible_beginning(text, at, self._open)
            self._pieces.content(text[at:end])
            return end if end > at else None
        self._pieces.content(text[at:found])
        self._pieces.source(self._open)
        self._call = CallObject(self._pieces)
        self._state = self._object
        return found + len(self._open)

    def _object(self, text: str, at: int) -> int:
        end = self._call.feed(text, at)
        self._pieces.source(text[at:end])
        if self._call.done:
            self._pieces.call_ended()
            self._state = self._closing
        elif self._call.broken:
            self._pieces.no_call()
            self._state = self._text
        return end

    def _closing(self, text: str, at: int) -> int | None:
        if (end := skip_space(text, at)) > at:
            self._pieces.content(text[at:end])
            return end
        if text.startswith(self._close, at):
            self._pieces.mark_ended()
            self._state = self._text
            return at + len(self._close)
        if self._close.startswith(text[at:]):
            return None
        self._state = self._text
        return at

    def _cut_short(self, held: str) -> None:
        if self._state != self._closing:
            super()._cut_short(held)
