"""Calls after a mark, as Mistral writes them.

They are a JSON array, [TOOL_CALLS] [{"name": "f", "arguments": {...}}]. Since version 11 of its tokenizers
they are [TOOL_CALLS]f{...}, in later ones with [CALL_ID] and [ARGS].
"""

from __future__ import annotations

import re
import secrets
import string

from handlers.parsers.base import Pieces, possible_beginning
from handlers.parsers.json_calls import CallArray
from handlers.parsers.json_scanner import JsonScanner, skip_space

TOOL_CALLS, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"

_ID_LENGTH = 9
_ALPHANUMERIC = string.ascii_letters + string.digits
_NAME = re.compile(r"[A-Za-z0-9_.:/-]*")
_ID = re.compile(r"[A-Za-z0-9]*")
_LONGEST_NAME = 200


def new_call_id() -> str:
    """Make an id of nine letters and digits: Mistral's chat templates accept no other."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(_ID_LENGTH))


class MistralParser(CallArray):
    """Reads calls in both forms."""

    def __init__(self, pieces: Pieces) -> None:
        super().__init__(pieces, self._rest)
        self._scanner = JsonScanner()
        self._name = self._id = ""

    def _rest(self, text: str, at: int) -> int | None:
        found = text.find(TOOL_CALLS, at)
        if found < 0:
            end = possible_beginning(text, at, TOOL_CALLS)
            self._pieces.content(text[at:end])
            return end if end > at else None
        self._pieces.content(text[at:found])
        self._pieces.source(TOOL_CALLS)
        self._state = self._head
        return found + len(TOOL_CALLS)

    def _no_array(self, at: int) -> int:
        self._name = self._id = ""
        self._state = self._in_name
        return at

    def _in_name(self, text: str, at: int) -> int:
        match = _NAME.match(text, at, at + _LONGEST_NAME - len(self._name))
        assert match is not None
        self._name += match[0]
        end = self._took(text, at, match.end())
        if not self._name or len(self._name) == _LONGEST_NAME:
            return self._failed(end)
        if end < len(text):
            self._state = self._after_name
        return end

    def _after_name(self, text: str, at: int) -> int | None:
        if (end := skip_space(text, at)) > at:
            return self._took(text, at, end)
        if text[at] == "{":
            self._pieces.start(self._name, self._id if len(self._id) == _ID_LENGTH else None)
            self._scanner = JsonScanner()
            self._state = self._arguments
            return at
        for mark in (ARGS, CALL_ID):
            if text.startswith(mark, at):
                if mark == CALL_ID:
                    self._id, self._state = "", self._in_id
                return self._took(text, at, at + len(mark))
            if mark.startswith(text[at:]):
                return None
        return self._failed(at)

    def _in_id(self, text: str, at: int) -> int:
        match = _ID.match(text, at, at + _LONGEST_NAME - len(self._id))
        assert match is not None
        self._id += match[0]
        end = self._took(text, at, match.end())
        if len(self._id) == _LONGEST_NAME:
            return self._failed(end)
        if end < len(text):
            self._state = self._after_name
        return end

    def _arguments(self, text: str, at: int) -> int:
        end, piece = self._scanner.feed(text, at)
        self._pieces.arguments(piece)
        self._took(text, at, end)
        if self._scanner.done:
            self._pieces.call_ended()
            self._state = self._rest
        elif self._scanner.broken:
            self._failed(end)
        return end

    def _cut_short(self, held: str) -> None:
        if self._state == self._after_name:
            self._pieces.source(held)
        else:
            super()._cut_short(held)
