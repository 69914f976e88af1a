"""Calls written as JSON: as an object, in an array, between tags, after a mark, or with arguments only."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Container

from handlers.parsers.base import Machine, Pieces, State
from handlers.parsers.json_scanner import JsonScanner, is_object, skip_space

_ARGUMENTS = ("arguments", "parameters")
_OTHERS = ("id", "type", "index", "description")
_LONGEST_NAME = 600
"""Greatest number of characters of a key or a function's name, quotes and escapes included."""


class CallObject:
    """A `CallReader` of one call, {"name": "f", "arguments": {...}}, with white space before it.

    It starts as soon as the name and the beginning of the arguments are known. The name may come after the
    arguments, which then wait for it. Arguments may also be the JSON text of an object, or null.
    """

    def __init__(self, pieces: Pieces, names: Container[str] | None = None) -> None:
        """Create a reader.

        Args:
            pieces: Receives the call.
            names: The functions that may be called; an object without arguments, or with keys that calls do not have,
                is then not a call. None for any function.
        """
        self.done = False
        self.broken = False
        self._pieces = pieces
        self._names = names
        self._expects = "{"
        self._scanner = JsonScanner()
        self._text: list[str] = []
        self._length = 0
        self._key = ""
        self._name: str | None = None
        self._waiting: list[str] = []
        self._has_arguments = False
        self._started = False

    def read(self, text: str, at: int) -> int:
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
        return self._key != "arguments" or character in '{"n'

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
            return self._names is None or key in _OTHERS
        return True

    def _value_ended(self) -> bool:
        self._expects = ", or }"
        key, self._key = self._key, ""
        if key == "name":
            name = json.loads("".join(self._text))
            if not name or not _is_text(name) or (self._names is not None and name not in self._names):
                return False
            self._name = name
            self._pass_on()
            return True
        if key == "arguments" and self._scanner.kind != "object":
            written = "{}" if self._scanner.kind == "null" else json.loads("".join(self._text))
            if not is_object(written) or not _is_text(written):
                return False
            self._arguments(written)
        return True

    def _arguments(self, piece: str) -> None:
        self._waiting.append(piece)
        self._pass_on()

    def _pass_on(self) -> None:
        """Start the call and pass its arguments on, as soon as the name and the first of them are known."""
        if self._name is None or not self._waiting:
            return
        if not self._started:
            self._pieces.start(self._name)
            self._started = True
        for piece in self._waiting:
            self._pieces.arguments(piece)
        self._waiting.clear()

    def _end(self) -> None:
        if not self._has_arguments and self._names is None:
            self._arguments("{}")
        self.done = self._started
        self.broken = not self.done


def _is_text(decoded: str) -> bool:
    """JSON may escape half a surrogate pair, which a reply cannot contain."""
    return not any("\ud800" <= character <= "\udfff" for character in decoded)


class Arguments(JsonScanner):
    """A `CallReader` of the arguments of a call whose function is known."""

    def __init__(self, pieces: Pieces, name: str, call_id: str | None = None) -> None:
        super().__init__()
        self._pieces = pieces
        pieces.start(name, call_id)

    def read(self, text: str, at: int) -> int:
        end, piece = self.feed(text, at)
        self._pieces.arguments(piece)
        return end


class CallArray(Machine):
    """Reads calls as an array, [{"name": "f", "arguments": {...}}, ...], or as one bare object."""

    def __init__(self, pieces: Pieces, begin: State | None = None) -> None:
        super().__init__(pieces, begin if begin is not None else self._head)
        self._array = False

    def _head(self, text: str, at: int) -> int:
        if (end := self._source(text, at, skip_space(text, at))) > at:
            return end
        self._array = text[at] == "["
        if self._array:
            self._state = self._item
            return self._source(text, at, at + 1)
        return self._begin(CallObject(self._pieces), at) if text[at] == "{" else self._no_array(at)

    def _no_array(self, at: int) -> int:
        return self._failed(at)

    def _item(self, text: str, at: int) -> int:
        if (end := self._source(text, at, skip_space(text, at))) > at:
            return end
        return self._begin(CallObject(self._pieces), at) if text[at] == "{" else self._failed(at)

    def _after_call(self, text: str, at: int) -> int | None:
        if not self._array:
            return super()._after_call(text, at)
        return self._next_of_list(text, at, self._item, self._outside)


class OnlyArguments(Machine):
    """Reads nothing but the arguments of one call whose function is known beforehand."""

    def __init__(self, pieces: Pieces, name: str) -> None:
        super().__init__(pieces, self._blank)
        self._name = name

    def _blank(self, text: str, at: int) -> int:
        if (end := self._content(text, at, skip_space(text, at))) > at:
            return end
        if text[at] == "{":
            return self._begin(Arguments(self._pieces, self._name), at)
        self._state = self._outside
        return at


HERMES_OPEN, HERMES_CLOSE = "<tool_call>", "</tool_call>"


class HermesParser(Machine):
    """Reads calls between tags, as Hermes and Qwen write them.

    They are <tool_call>{"name": "f", "arguments": {...}}</tool_call>. The closing tag may be missing.
    """

    def __init__(self, pieces: Pieces, opening: str = HERMES_OPEN, closing: str = HERMES_CLOSE) -> None:
        super().__init__(pieces, self._outside)
        self._open, self._close = opening, closing

    def _outside(self, text: str, at: int) -> int | None:
        return self._until(self._open, self._object, text, at)

    def _object(self, text: str, at: int) -> int:
        return self._begin(CallObject(self._pieces), at)

    def _after_call(self, text: str, at: int) -> int | None:
        return self._closing(self._close, text, at)

    def _cut_short(self, held: str) -> None:
        if self._state != self._after_call:
            super()._cut_short(held)


TAG = "<|python_tag|>"
_STOP = re.compile(r"\n|<\|python_tag\|>")


class Llama3JsonParser(Machine):
    """Reads calls as bare objects, {"name": "f", "parameters": {...}}, separated by ";", as Llama 3 writes them.

    Objects are looked for at the beginning of the completion and of each line, and after the tag. A call must name a
    known function and have only the keys of a call, since nothing else distinguishes it from an answer in JSON.
    """

    def __init__(self, pieces: Pieces, names: Container[str]) -> None:
        super().__init__(pieces, self._blank)
        self._names = names

    def _blank(self, text: str, at: int) -> int:
        """At the beginning of the completion, white space may precede the object."""
        if (end := self._content(text, at, skip_space(text, at))) > at:
            return end
        return self._line(text, at)

    def _line(self, text: str, at: int) -> int:
        self._state = self._object if text[at] == "{" else self._outside
        return at

    def _outside(self, text: str, at: int) -> int | None:
        found = _STOP.search(text, at)
        if found is None or found[0] == TAG:
            return self._until(TAG, self._object, text, at)
        self._state = self._line
        return self._content(text, at, found.end())

    def _object(self, text: str, at: int) -> int:
        return self._begin(CallObject(self._pieces, self._names), at)

    def _after_call(self, text: str, at: int) -> int:
        if (end := self._content(text, at, skip_space(text, at))) > at:
            return end
        if text[at] not in ";,":
            return self._line(text, at)
        self._state = self._object
        return self._source(text, at, at + 1)


TOOL_CALLS, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"

_ID_LENGTH = 9
_ALPHANUMERIC = string.ascii_letters + string.digits
_MISTRAL_NAME = re.compile(r"[A-Za-z0-9_.:/-]*")
_MISTRAL_ID = re.compile(r"[A-Za-z0-9]*")
_LONGEST_MISTRAL_NAME = 200


def new_call_id() -> str:
    """Make an id of nine letters and digits: Mistral's chat templates accept no other."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(_ID_LENGTH))


class MistralParser(CallArray):
    """Reads calls after a mark, as Mistral writes them.

    They are an array, [TOOL_CALLS] [{"name": "f", "arguments": {...}}]. Since version 11 of its tokenizers they are
    [TOOL_CALLS]f{...}, in later ones with [CALL_ID] and [ARGS].
    """

    def __init__(self, pieces: Pieces) -> None:
        super().__init__(pieces, self._outside)
        self._name = self._id = ""

    def _outside(self, text: str, at: int) -> int | None:
        return self._until(TOOL_CALLS, self._head, text, at)

    def _no_array(self, at: int) -> int:
        self._name = self._id = ""
        self._state = self._in_name
        return at

    def _in_name(self, text: str, at: int) -> int:
        word = self._word(_MISTRAL_NAME, text, at, self._name)
        self._name += word
        return self._word_ended(self._name, text, at + len(word)) if self._name else self._failed(at)

    def _in_id(self, text: str, at: int) -> int:
        word = self._word(_MISTRAL_ID, text, at, self._id)
        self._id += word
        return self._word_ended(self._id, text, at + len(word))

    def _word(self, pattern: re.Pattern[str], text: str, at: int, before: str) -> str:
        match = pattern.match(text, at, at + _LONGEST_MISTRAL_NAME - len(before))
        assert match is not None
        self._pieces.source(match[0])
        return match[0]

    def _word_ended(self, word: str, text: str, end: int) -> int:
        if len(word) == _LONGEST_MISTRAL_NAME:
            return self._failed(end)
        if end < len(text):
            self._state = self._after_name
        return end

    def _after_name(self, text: str, at: int) -> int | None:
        if (end := self._source(text, at, skip_space(text, at))) > at:
            return end
        if text[at] == "{":
            call_id = self._id if len(self._id) == _ID_LENGTH else None
            return self._begin(Arguments(self._pieces, self._name, call_id), at)
        for mark in (ARGS, CALL_ID):
            if text.startswith(mark, at):
                if mark == CALL_ID:
                    self._id, self._state = "", self._in_id
                return self._source(text, at, at + len(mark))
            if mark.startswith(text[at:]):
                return None
        return self._failed(at)

    def _cut_short(self, held: str) -> None:
        if self._state == self._after_name:
            self._pieces.source(held)
        else:
            super()._cut_short(held)
