"""Calls written in Python, as Llama 3.2 and 4 and ToolACE write them: [f(a=1), g(b="x")]."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container
from dataclasses import dataclass

from handlers.parsers.base import Machine, Pieces
from handlers.parsers.json_scanner import MAX_DEPTH, skip_space

_LONGEST_WORD = 1000
"""Greatest number of characters of a name, a constant or a number."""

_WORD = re.compile(r"[\w.]*")
_DIGITS = re.compile(r"[\w.+-]*")
_INTEGER = re.compile(r"[+-]?[0-9]+(?:_[0-9]+)*")
_HEX = re.compile(r"[+-]?0[xX][0-9a-fA-F]+")
_FLOAT = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_PLAIN = re.compile(r"""[^"'\\]+""")
_CONSTANTS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_ESCAPES = dict(zip("ntrbfav", "\n\t\r\b\f\a\v", strict=True)) | {c: c for c in "\\'\""} | {"\n": ""}
_HEX_ESCAPES = {"x": 2, "u": 4, "U": 8}
_HEX_DIGITS = "0123456789abcdefABCDEF"
_BRACKETS = {"[": ("]", "]"), "(": (")", "]"), "{": ("}", "}")}


@dataclass(slots=True)
class _Open:
    """An open bracket: what closes it in Python and in JSON, the number of its values, whether a comma came last."""

    closing: str
    json_closing: str
    count: int = 0
    comma: bool = False


class PythonCall:
    """A `CallReader` of one call with literal keyword arguments, f(a=1, b="x"), which it writes as JSON.

    Strings have one pair of quotes and no prefix; lists, tuples and dicts with strings as keys may be nested. Anything
    else breaks the call.
    """

    def __init__(self, pieces: Pieces, names: Container[str]) -> None:
        self.done = False
        self.broken = False
        self._pieces = pieces
        self._names = names
        self._name = ""
        self._started = False
        self._expects = "function"
        self._word = ""
        self._open: list[_Open] = []
        self._quote = ""
        self._after_text = ""
        self._hex = ""
        self._hex_length = 0

    def read(self, text: str, at: int) -> int:
        while at < len(text) and not self.done and not self.broken:
            if self._expects == "text":
                at = self._in_text(text, at)
            elif self._expects == "escape":
                at = self._escape(text, at)
            elif self._expects == "hex":
                at = self._hex_digit(text, at)
            elif self._expects in ("function", "keyword", "constant", "number"):
                at = self._in_word(text, at)
            elif (end := skip_space(text, at)) > at:
                at = end
            else:
                at = self._structure(text, at)
        return at

    def _break(self, at: int) -> int:
        self.broken = True
        return at

    def _in_word(self, text: str, at: int) -> int:
        pattern = _DIGITS if self._expects == "number" else _WORD
        match = pattern.match(text, at, at + _LONGEST_WORD - len(self._word))
        assert match is not None
        self._word += match[0]
        if len(self._word) == _LONGEST_WORD:
            self.broken = True
        elif match.end() < len(text):
            self.broken = not self._word_ended()
        return match.end()

    def _word_ended(self) -> bool:
        word = self._word
        if self._expects == "function":
            self._name, self._word, self._expects = word, "", "("
            return word in self._names
        if self._expects == "keyword":
            self._expects = "="
            return word.isidentifier()
        written = _CONSTANTS.get(word) if self._expects == "constant" else _number(word)
        self._word, self._expects = "", "after"
        if written is not None:
            self._write(written)
        return written is not None

    def _structure(self, text: str, at: int) -> int:
        """Process a character between words and strings."""
        character, expects = text[at], self._expects
        opened = self._open[-1] if self._open else None
        if opened is not None and character == opened.closing and expects in ("argument", "item", "key", "after"):
            return self._close(opened, at)
        if expects == "(" and character == "(":
            self._open.append(_Open(")", "}"))
            self._expects = "argument"
            return at + 1
        if expects == "argument" and (character.isalpha() or character == "_"):
            self._expects = "keyword"
            return at
        if expects == "=" and character == "=":
            self._next()
            self._write(json.dumps(self._word, ensure_ascii=False) + ": ")
            self._word, self._expects = "", "value"
            return at + 1
        if expects == "key" and character in "\"'":
            return self._begin_value(character, at)
        if expects == ":" and character == ":":
            self._write(": ")
            self._expects = "value"
            return at + 1
        if expects == "after" and character == "," and opened is not None:
            opened.comma = True
            self._expects = "item" if opened.json_closing == "]" else "argument" if len(self._open) == 1 else "key"
            return at + 1
        return self._begin_value(character, at) if expects in ("value", "item") else self._break(at)

    def _begin_value(self, character: str, at: int) -> int:
        """Process the first character of a value, or of a key."""
        if self._expects != "value":
            self._next()
        if character in "\"'":
            self._write('"')
            self._quote, self._after_text = character, ":" if self._expects == "key" else "after"
            self._expects = "text"
            return at + 1
        if character in _BRACKETS and len(self._open) < MAX_DEPTH:
            closing, json_closing = _BRACKETS[character]
            self._open.append(_Open(closing, json_closing))
            self._write("{" if character == "{" else "[")
            self._expects = "key" if character == "{" else "item"
            return at + 1
        if character.isalpha():
            self._expects = "constant"
            return at
        if character in "0123456789.+-":
            self._expects = "number"
            return at
        return self._break(at)

    def _next(self) -> None:
        """Count one more value in the innermost bracket."""
        opened = self._open[-1]
        if opened.count:
            self._write(", ")
        opened.count += 1
        opened.comma = False

    def _close(self, opened: _Open, at: int) -> int:
        if opened.closing == ")" and len(self._open) > 1 and opened.count == 1 and not opened.comma:
            return self._break(at)  # a value in parentheses is not a tuple
        self._write(opened.json_closing)
        self._open.pop()
        self._expects = "after"
        self.done = not self._open
        return at + 1

    def _in_text(self, text: str, at: int) -> int:
        match = _PLAIN.match(text, at)
        if match is not None:
            self._write(_escaped(match[0]))
            return match.end()
        character = text[at]
        if character == self._quote:
            self._write('"')
            self._expects = self._after_text
        elif character == "\\":
            self._expects = "escape"
        else:
            self._write(_escaped(character))
        return at + 1

    def _escape(self, text: str, at: int) -> int:
        """Process the character after a backslash; Python keeps both if together they have no meaning."""
        character = text[at]
        self._expects = "text"
        if character in _HEX_ESCAPES:
            self._expects, self._hex, self._hex_length = "hex", "", _HEX_ESCAPES[character]
        elif character in "01234567N":
            return self._break(at)
        else:
            self._write(_escaped(_ESCAPES.get(character, "\\" + character)))
        return at + 1

    def _hex_digit(self, text: str, at: int) -> int:
        self._hex += text[at]
        if text[at] not in _HEX_DIGITS:
            return self._break(at)
        if len(self._hex) == self._hex_length:
            code = int(self._hex, 16)
            self._expects = "text"
            if code > 0x10FFFF:
                self.broken = True
            elif 0xD800 <= code < 0xE000:
                self._write(f"\\u{code:04x}")
            else:
                self._write(_escaped(chr(code)))
        return at + 1

    def _write(self, text: str) -> None:
        if not self._started:
            self._started = True
            self._pieces.start(self._name)
            self._pieces.arguments("{")
        self._pieces.arguments(text)


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _number(word: str) -> str | None:
    """Return a number as JSON; None if it is not a number."""
    if _INTEGER.fullmatch(word):
        return str(int(word))
    if _HEX.fullmatch(word):
        return str(int(word, 16))
    if _FLOAT.fullmatch(word) and math.isfinite(value := float(word)):
        return json.dumps(value)
    return None


START, END = "<|python_start|>", "<|python_end|>"


class PythonicParser(Machine):
    """Reads lists of calls, at the beginning of the completion and anywhere after Llama 4's mark.

    The functions must be known ones, since nothing else distinguishes calls from other text in brackets.
    """

    def __init__(self, pieces: Pieces, names: Container[str]) -> None:
        super().__init__(pieces, self._blank)
        self._names = names

    def _blank(self, text: str, at: int) -> int:
        if (end := self._content(text, at, skip_space(text, at))) > at:
            return end
        self._state = self._list if text[at] == "[" else self._outside
        return at

    def _outside(self, text: str, at: int) -> int | None:
        return self._until(START, self._list, text, at)

    def _list(self, text: str, at: int) -> int:
        """Expect the bracket; white space may precede it after the mark."""
        if (end := self._source(text, at, skip_space(text, at))) > at:
            return end
        if text[at] != "[":
            return self._failed(at)
        self._state = self._item
        return self._source(text, at, at + 1)

    def _item(self, text: str, at: int) -> int:
        if (end := self._source(text, at, skip_space(text, at))) > at:
            return end
        return self._begin(PythonCall(self._pieces, self._names), at)

    def _after_call(self, text: str, at: int) -> int:
        return self._next_of_list(text, at, self._item, self._after_list)

    def _after_list(self, text: str, at: int) -> int | None:
        """Handle what follows the list, which may be Llama 4's second mark."""
        return self._closing(END, text, at)

    def _cut_short(self, held: str) -> None:
        if self._state != self._after_list:
            super()._cut_short(held)
