"""Calls as a JSON array, [{"name": "f", "arguments": {...}}, ...], or as one bare object."""

from __future__ import annotations

from handlers.parsers.call_object import CallObject
from handlers.parsers.json_scanner import JsonScanner, skip_space
from handlers.parsers.machine import Machine, State
from handlers.parsers.writing import Pieces


class CallArray(Machine):
    """The states from the array's beginning to its end, after which `rest` goes on."""

    def __init__(self, pieces: Pieces, begin: State | None = None) -> None:
        super().__init__(pieces, begin if begin is not None else self._head)
        self._call = CallObject(pieces)
        self._array = False

    def _rest(self, text: str, at: int) -> int | None:
        """What follows the calls, or is none."""
        self._pieces.content(text[at:])
        return len(text)

    def _head(self, text: str, at: int) -> int:
        if (end := skip_space(text, at)) > at:
            return self._took(text, at, end)
        self._array = text[at] == "["
        if self._array:
            self._state = self._item
            return self._took(text, at, at + 1)
        return self._begin_object(at) if text[at] == "{" else self._no_array(at)

    def _no_array(self, at: int) -> int:
        return self._failed(at)

    def _item(self, text: str, at: int) -> int:
        if (end := skip_space(text, at)) > at:
            return self._took(text, at, end)
        return self._begin_object(at) if text[at] == "{" else self._failed(at)

    def _begin_object(self, at: int) -> int:
        self._call = CallObject(self._pieces)
        self._state = self._object
        return at

    def _object(self, text: str, at: int) -> int:
        end = self._took(text, at, self._call.feed(text, at))
        if self._call.done:
            self._pieces.call_ended()
            self._state = self._separator if self._array else self._rest
        elif self._call.broken:
            self._failed(end)
        return end

    def _separator(self, text: str, at: int) -> int:
        if (end := skip_space(text, at)) > at:
            self._pieces.content(text[at:end])
            return end
        if text[at] == ",":
            self._state = self._item
            return self._took(text, at, at + 1)
        self._state = self._rest
        if text[at] != "]":
            return at
        self._pieces.mark_ended()
        return at + 1

    def _took(self, text: str, at: int, end: int) -> int:
        self._pieces.source(text[at:end])
        return end

    def _failed(self, at: int) -> int:
        self._pieces.no_call()
        self._state = self._rest
        return at


class OnlyArguments(Machine):
    """Nothing but the arguments of one call whose function is known beforehand."""

    def __init__(self, pieces: Pieces, name: str) -> None:
        super().__init__(pieces, self._begin)
        self._name = name
        self._scanner = JsonScanner()

    def _begin(self, text: str, at: int) -> int:
        if (end := skip_space(text, at)) == at:
            self._state = self._rest
            if text[at] == "{":
                self._pieces.start(self._name)
                self._state = self._arguments
            return at
        self._pieces.content(text[at:end])
        return end

    def _arguments(self, text: str, at: int) -> int:
        end, piece = self._scanner.feed(text, at)
        self._pieces.arguments(piece)
        self._pieces.source(text[at:end])
        if self._scanner.done:
            self._pieces.call_ended()
            self._state = self._rest
        elif self._scanner.broken:
            self._pieces.no_call()
            self._state = self._rest
        return end

    def _rest(self, text: str, at: int) -> int:
        self._pieces.content(text[at:])
        return len(text)
