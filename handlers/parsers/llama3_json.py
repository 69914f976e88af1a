"""Calls as bare objects: {"name": "f", "parameters": {...}}, as Llama 3 writes them, several with ";" between."""

from __future__ import annotations

import re
from collections.abc import Container

from handlers.parsers.call_object import CallObject
from handlers.parsers.json_scanner import skip_space
from handlers.parsers.machine import Machine
from handlers.parsers.writing import Pieces, possible_beginning

TAG = "<|python_tag|>"
_STOP = re.compile(r"\n|<\|python_tag\|>")


class Llama3JsonParser(Machine):
    """An object is looked for at the beginning of the answer and of each line, and after the tag. As nothing else
    tells it from an answer in JSON, it must name a known function and have no keys but those of a call."""

    def __init__(self, pieces: Pieces, names: Container[str]) -> None:
        super().__init__(pieces, self._blank)
        self._names = names
        self._call = self._new_call()

    def _new_call(self) -> CallObject:
        return CallObject(self._pieces, names=self._names, needs_arguments=True, strict=True)

    def _blank(self, text: str, at: int) -> int:
        """At the beginning of the answer, where white space may come before the object."""
        if (end := skip_space(text, at)) > at:
            self._pieces.content(text[at:end])
            return end
        self._state = self._line
        return at

    def _line(self, text: str, at: int) -> int:
        self._state = self._begin if text[at] == "{" else self._text
        return at

    def _text(self, text: str, at: int) -> int | None:
        found = _STOP.search(text, at)
        if found is None:
            end = possible_beginning(text, at, TAG)
            self._pieces.content(text[at:end])
            return end if end > at else None
        if found[0] == TAG:
            self._pieces.content(text[at : found.start()])
            self._pieces.source(TAG)
            self._state = self._begin
        else:
            self._pieces.content(text[at : found.end()])
            self._state = self._line
        return found.end()

    def _begin(self, text: str, at: int) -> int:
        self._call = self._new_call()
        self._state = self._object
        return at

    def _object(self, text: str, at: int) -> int:
        end = self._call.feed(text, at)
        self._pieces.source(text[at:end])
        if self._call.done:
            self._pieces.call_ended()
            self._state = self._between
        elif self._call.broken:
            self._pieces.no_call()
            self._state = self._text
        return end

    def _between(self, text: str, at: int) -> int:
        """After a call."""
        if (end := skip_space(text, at)) > at:
            self._pieces.content(text[at:end])
            return end
        if text[at] in ";,":
            self._pieces.source(text[at])
            self._state = self._begin
            return at + 1
        self._state = self._line
        return at
