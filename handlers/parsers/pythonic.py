"""Calls as a list in Python, [f(a=1), g(b="x")], as Llama 3.2 and 4 and ToolACE write them."""

from __future__ import annotations

from collections.abc import Container

from handlers.parsers.json_scanner import skip_space
from handlers.parsers.machine import Machine
from handlers.parsers.python_call import PythonCall
from handlers.parsers.writing import Pieces, possible_beginning

START, END = "<|python_start|>", "<|python_end|>"


class PythonicParser(Machine):
    """A list is looked for at the beginning of the answer, and after Llama 4's mark anywhere. Its calls must be of
    known functions: nothing else tells them from other text in brackets."""

    def __init__(self, pieces: Pieces, names: Container[str]) -> None:
        super().__init__(pieces, self._blank)
        self._names = names
        self._call = PythonCall(pieces, names)

    def _blank(self, text: str, at: int) -> int:
        if (end := skip_space(text, at)) > at:
            self._pieces.content(text[at:end])
            return end
        self._state = self._list if text[at] == "[" else self._text
        return at

    def _text(self, text: str, at: int) -> int | None:
        found = text.find(START, at)
        if found < 0:
            end = possible_beginning(text, at, START)
            self._pieces.content(text[at:end])
            return end if end > at else None
        self._pieces.content(text[at:found])
        self._pieces.source(START)
        self._state = self._list
        return found + len(START)

    def _list(self, text: str, at: int) -> int:
        """The bracket; white space may stand before it where the mark does."""
        if (end := skip_space(text, at)) > at:
            return self._took(text, at, end)
        if text[at] != "[":
            return self._failed(at)
        self._state = self._begin
        return self._took(text, at, at + 1)

    def _begin(self, text: str, at: int) -> int:
        if (end := skip_space(text, at)) > at:
            return self._took(text, at, end)
        self._call = PythonCall(self._pieces, self._names)
        self._state = self._in_call
        return at

    def _in_call(self, text: str, at: int) -> int:
        end = self._call.feed(text, at)
        self._took(text, at, end)
        if self._call.done:
            self._pieces.call_ended()
            self._state = self._between
        elif self._call.broken:
            self._failed(end)
        return end

    def _between(self, text: str, at: int) -> int:
        if (end := skip_space(text, at)) > at:
            self._pieces.content(text[at:end])
            return end
        if text[at] == ",":
            self._state = self._begin
            return self._took(text, at, at + 1)
        self._state = self._text
        if text[at] != "]":
            return at
        self._pieces.mark_ended()
        self._state = self._closing
        return at + 1

    def _closing(self, text: str, at: int) -> int | None:
        """After the list, where Llama 4's second mark may follow."""
        if (end := skip_space(text, at)) > at:
            self._pieces.content(text[at:end])
            return end
        if END.startswith(text[at : at + len(END)]) and len(text) - at < len(END):
            return None
        self._state = self._text
        if not text.startswith(END, at):
            return at
        self._pieces.mark_ended()
        return at + len(END)

    def _took(self, text: str, at: int, end: int) -> int:
        self._pieces.source(text[at:end])
        return end

    def _failed(self, at: int) -> int:
        self._pieces.no_call()
        self._state = self._text
        return at

    def _cut_short(self, held: str) -> None:
        if self._state != self._closing:
            super()._cut_short(held)
