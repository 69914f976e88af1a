"""One call written as a JSON object, {"name": "f", "arguments": {...}}, while it comes."""

from __future__ import annotations

import json
from collections.abc import Container

from handlers.parsers.json_scanner import JsonScanner, is_object, skip_space
from handlers.parsers.writing import Pieces

_ARGUMENTS = ("arguments", "parameters")
_OTHERS = ("id", "type", "index", "description")
_LONGEST_NAME = 600
"""Characters of a key or a function's name, quotes and escapes included."""


class CallObject:
    """Reads one object and writes the call into `pieces` as soon as its name and its arguments' beginning are there.

    The name may come after the arguments, which then wait for it. Arguments may also be the JSON text of an object,
    or null.
    """

    def __init__(
        self,
        pieces: Pieces,
        *,
        names: Container[str] | None = None,
        needs_arguments: bool = False,
        strict: bool = False,
    ) -> None:
        """names: of the functions that may be called; None for any. needs_arguments: an object without is no call.
        strict: nor is one with keys that calls do not have.
        """
        self.done = False
        self.broken = False
        self._pieces = pieces
        self._names = names
        self._needs_arguments = needs_arguments
        self._strict = strict
        self._expects = "{"
        self._scanner = JsonScanner()
        self._text: list[str] = []
        self._length = 0
        self._key = ""
        self._name: str | None = None
        self._waiting: list[str] | None = None
        self._has_arguments = False
        self._started = False

    def feed(self, text: str, at: int) -> int:
        """The position after what belongs to the object, white space before it included. Where it breaks, that of
        what does not fit. Not to be called after the end."""
        length = len(text)
        while not self.done and not self.broken:
            if self._expects not in ("key", "value"):
                at = skip_space(text, at)
                if at == length:
                    break
                at = self._structure(text, at)
            elif at == length:
                break
            else:
                at = self._scan(text, at)
        return at

    def _structure(self, text: str, at: int) -> int:
        character, expects = text[at], self._expects
        if expects in ("key or }", ", or }") and character == "}":
            self._end()
            return at + 1
        if (expects == "{" and character == "{") or (expects == ", or }" and character == ","):
            self._expects = "key or }" if character == "{" else "a key"
            return at + 1
        if expects in ("key or }", "a key") and character == '"':
            self._begin("key")
            return at
        if expects == ":" and character == ":":
            self._expects = "a value"
            return at + 1
        if expects == "a value" and self._value_fits(character):
            self._begin("value")
            return at
        self.broken = True
        return at

    def _begin(self, what: str) -> None:
        self._expects, self._scanner = what, JsonScanner()
        self._text.clear()
        self._length = 0

    def _value_fits(self, character: str) -> bool:
        if self._key == "name":
            return character == '"'
        if self._key == "arguments":
            if character == "{":
                self._begin_arguments()
            return character in '{"n'
        return True

    def _scan(self, text: str, at: int) -> int:
        is_key = self._expects == "key"
        bounded = is_key or self._key == "name"
        if bounded:
            used, piece = self._scanner.feed(text[at : at + _LONGEST_NAME - self._length], 0)
            end = at + used
        else:
            end, piece = self._scanner.feed(text, at)
        if self._key == "arguments" and self._scanner.kind == "object":
            self._arguments(piece)
        elif bounded or self._key == "arguments":
            self._text.append(piece)
            self._length += end - at
        if self._scanner.done:
            self.broken = not (self._key_ended() if is_key else self._value_ended())
        else:
            self.broken = self._scanner.broken or (bounded and self._length == _LONGEST_NAME)
        return end

    def _key_ended(self) -> bool:
        self._expects = ":"
        key = json.loads("".join(self._text))
        if key == "name" and self._name is None:
            self._key = "name"
        elif key in _ARGUMENTS and not self._has_arguments:
            self._key = "arguments"
            self._has_arguments = True
        else:
            self._key = ""
            return not self._strict or key in _OTHERS
        return True

    def _value_ended(self) -> bool:
        self._expects = ", or }"
        key, self._key = self._key, ""
        if key == "name":
            name = json.loads("".join(self._text))
            if not name or not _is_text(name) or (self._names is not None and name not in self._names):
                return False
            self._name = name
            if self._waiting is not None:
                self._start()
            return True
        if key == "arguments" and self._scanner.kind != "object":
            written = "{}" if self._scanner.kind == "null" else json.loads("".join(self._text))
            if not is_object(written) or not _is_text(written):
                return False
            self._begin_arguments()
            self._arguments(written)
        return True

    def _begin_arguments(self) -> None:
        self._waiting = []
        if self._name is not None:
            self._start()

    def _start(self) -> None:
        """Both the name and the beginning of the arguments are there."""
        assert self._name is not None
        waiting, self._waiting = self._waiting or [], None
        self._pieces.start(self._name)
        self._started = True
        for piece in waiting:
            self._pieces.arguments(piece)

    def _arguments(self, piece: str) -> None:
        if self._waiting is not None:
            self._waiting.append(piece)
        else:
            self._pieces.arguments(piece)

    def _end(self) -> None:
        if self._name is not None and not self._has_arguments and not self._needs_arguments:
            self._begin_arguments()
            self._arguments("{}")
        self.done = self._started
        self.broken = not self.done


def _is_text(decoded: str) -> bool:
    """JSON may escape half a surrogate pair, which no reply can hold."""
    return not any("\ud800" <= character <= "\udfff" for character in decoded)
