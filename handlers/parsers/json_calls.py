"""Calls written as JSON: as an object, in an array, between tags, after a mark, or with arguments only."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Container

from handlers.parsers.base import Machine, Pieces, State, possible_beginning
from handlers.parsers.json_scanner import JsonScanner, is_object, skip_space

_ARGUMENTS = ("arguments", "parameters")
_OTHERS = ("id", "type", "index", "description")
_LONGEST_NAME = 600
"""Greatest number of characters of a key or a function's name, quotes and escapes included."""


class CallObject:
    """Reads one call, {"name": "f", "arguments": {...}}, and writes it into `pieces` as it arrives.

    It starts as soon as the name and the beginning of the arguments are known. The name may come after the
    arguments, which then wait for it. Arguments may also be the JSON text of an object, or null.
    """

    def __init__(
        self,
        pieces: Pieces,
        *,
        names: Container[str] | None = None,
        needs_arguments: bool = False,
        strict: bool = False,
    ) -> None:
        """Create a reader.

        Args:
            pieces: Receives the call.
            names: Functions that may be called; None for any.
            needs_arguments: An object without arguments is not a call.
            strict: An object with keys that calls do not have is not a call.
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
        """Read more text; not to be called after the end.

        Returns:
            The position after the part that belongs to the object, leading white space included. If the
                object breaks, the position of the first invalid character.
        """
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
        """Start the call: the name and the beginning of the arguments are known."""
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
    """JSON may escape half a surrogate pair, which a reply cannot contain."""
    return not any("\ud800" <= character <= "\udfff" for character in decoded)


class CallArray(Machine):
    """Reads calls as an array, [{"name": "f", "arguments": {...}}, ...], or as one bare object.

    The state `_rest` follows the end of the array.
    """

    def __init__(self, pieces: Pieces, begin: State | None = None) -> None:
        super().__init__(pieces, begin if begin is not None else self._head)
        self._call = CallObject(pieces)
        self._array = False

    def _rest(self, text: str, at: int) -> int | None:
        """Handle what follows the calls, or is not a call."""
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
    """Reads nothing but the arguments of one call whose function is known beforehand."""

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


HERMES_OPEN, HERMES_CLOSE = "<tool_call>", "</tool_call>"


class HermesParser(Machine):
    """Reads calls between tags, as Hermes and Qwen write them.

    They are <tool_call>{"name": "f", "arguments": {...}}</tool_call>. A call without its closing tag counts
    as soon as its object is complete.
    """

    def __init__(self, pieces: Pieces, opening: str = HERMES_OPEN, closing: str = HERMES_CLOSE) -> None:
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


TAG = "<|python_tag|>"
_STOP = re.compile(r"\n|<\|python_tag\|>")


class Llama3JsonParser(Machine):
    """Reads calls as bare objects, {"name": "f", "parameters": {...}}, separated by ";", as Llama 3 writes them.

    Objects are looked for at the beginning of the completion and of each line, and after the tag. Nothing
    else distinguishes a call from an answer in JSON, so it must name a known function and have only the keys
    of a call.
    """

    def __init__(self, pieces: Pieces, names: Container[str]) -> None:
        super().__init__(pieces, self._blank)
        self._names = names
        self._call = self._new_call()

    def _new_call(self) -> CallObject:
        return CallObject(self._pieces, names=self._names, needs_arguments=True, strict=True)

    def _blank(self, text: str, at: int) -> int:
        """At the beginning of the completion, white space may precede the object."""
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
        """Handle what follows a call."""
        if (end := skip_space(text, at)) > at:
            self._pieces.content(text[at:end])
            return end
        if text[at] in ";,":
            self._pieces.source(text[at])
            self._state = self._begin
            return at + 1
        self._state = self._line
        return at


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
        match = _MISTRAL_NAME.match(text, at, at + _LONGEST_MISTRAL_NAME - len(self._name))
        assert match is not None
        self._name += match[0]
        end = self._took(text, at, match.end())
        if not self._name or len(self._name) == _LONGEST_MISTRAL_NAME:
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
        match = _MISTRAL_ID.match(text, at, at + _LONGEST_MISTRAL_NAME - len(self._id))
        assert match is not None
        self._id += match[0]
        end = self._took(text, at, match.end())
        if len(self._id) == _LONGEST_MISTRAL_NAME:
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
