"""JSON that arrives in parts: finds where a value ends, or where it is no longer valid."""

from __future__ import annotations

import re

MAX_DEPTH = 100
"""Greatest depth of lists and objects; no function's arguments need more."""

_MOST_DIGITS = 1000

SPACE = " \t\n\r"
_SPACES = re.compile(r"[ \t\n\r]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_LITERALS = {"t": "true", "f": "false", "n": "null"}
_KINDS = {"{": "object", "[": "list", '"': "string", "t": "true", "f": "false", "n": "null"}

# What may follow in a number, by its last state; a number may end in a state in upper case.
_NUMBER = {
    "sign": {"0": "ZERO", "1-9": "INT"},
    "ZERO": {".": "point", "e": "exp"},
    "INT": {"0": "INT", "1-9": "INT", ".": "point", "e": "exp"},
    "point": {"0": "FRAC", "1-9": "FRAC"},
    "FRAC": {"0": "FRAC", "1-9": "FRAC", "e": "exp"},
    "exp": {"0": "EXP", "1-9": "EXP", "+-": "expsign"},
    "expsign": {"0": "EXP", "1-9": "EXP"},
    "EXP": {"0": "EXP", "1-9": "EXP"},
}
_CLASSES = {**dict.fromkeys("123456789", "1-9"), "0": "0", ".": ".", "e": "e", "E": "e", "+": "+-", "-": "+-"}


def skip_space(text: str, at: int) -> int:
    """Return the first position from `at` on that is not JSON white space."""
    match = _SPACES.match(text, at)
    assert match is not None
    return match.end()


class JsonScanner:
    """Follows one value, without leading white space, through successive texts.

    Its time grows with the text, its memory only with the depth. A number at the top level ends with the character
    after it. Control characters inside strings, which models often write and JSON does not allow, are escaped.

    Attributes:
        done: The value is complete.
        broken: The text is not JSON.
        kind: object, list, string, number, true, false or null; "" before the first character.
    """

    def __init__(self) -> None:
        self.done = False
        self.broken = False
        self.kind = ""
        self._open: list[str] = []
        self._expects = "value"
        self._rest = ""
        self._digits = 0
        self._key = False

    def feed(self, text: str, at: int) -> tuple[int, str]:
        """Scan more text; not to be called after the end.

        Returns the position after the part that belongs to the value, or of the first invalid character, and that part.
        """
        out: list[str] = []
        length = len(text)
        while at < length and not self.done and not self.broken:
            if self._expects == "string":
                at = self._string(text, at, out)
                continue
            character = text[at]
            if self._expects == "escape":
                fits = character in '"\\/bfnrtu'
                self._expects, self._digits = ("hex", 4) if character == "u" else ("string", 0)
            elif self._expects == "hex":
                fits = character in "0123456789abcdefABCDEF"
                self._digits -= 1
                if not self._digits:
                    self._expects = "string"
            elif self._expects == "literal":
                fits = character == self._rest[0]
                self._rest = self._rest[1:]
                if not self._rest:
                    self._value_ended()
            elif self._expects in _NUMBER:
                following = _NUMBER[self._expects].get(_CLASSES.get(character, ""))
                self._digits += 1
                fits = following is not None and self._digits <= _MOST_DIGITS
                if following is None and self._expects.isupper():
                    self._value_ended()
                    continue
                self._expects = following or self._expects
            elif character in SPACE:
                fits = True
            else:
                fits = self._structure(character)
            if not fits:
                self.broken = True
                break
            out.append(character)
            at += 1
        return at, "".join(out)

    def _string(self, text: str, at: int, out: list[str]) -> int:
        match = _PLAIN.match(text, at)
        assert match is not None
        out.append(match[0])
        at = match.end()
        if at == len(text):
            return at
        character = text[at]
        if character == '"':
            if self._key:
                self._expects = "colon"
            else:
                self._value_ended()
        elif character == "\\":
            self._expects = "escape"
        else:
            character = f"\\u{ord(character):04x}"
        out.append(character)
        return at + 1

    def _structure(self, character: str) -> bool:
        """Process a character between tokens; return whether it is valid."""
        expects = self._expects
        if expects == "value" or (expects == "value or ]" and character != "]"):
            return self._begin(character)
        if expects in ("key", "key or }") and character == '"':
            self._expects, self._key = "string", True
            return True
        if expects == "colon":
            self._expects = "value"
            return character == ":"
        if expects == "comma" and character == ",":
            self._expects = "key" if self._open[-1] == "}" else "value"
            return True
        if expects in ("comma", "key or }", "value or ]") and character == self._open[-1]:
            self._open.pop()
            self._value_ended()
            return True
        return False

    def _begin(self, character: str) -> bool:
        """Process the first character of a value."""
        if not self.kind:
            self.kind = _KINDS.get(character, "number")
        if character in "{[":
            self._open.append("}" if character == "{" else "]")
            self._expects = "key or }" if character == "{" else "value or ]"
            return len(self._open) <= MAX_DEPTH
        if character == '"':
            self._expects, self._key = "string", False
        elif character in _LITERALS:
            self._expects, self._rest = "literal", _LITERALS[character][1:]
        elif character in "-0123456789":
            self._digits = 1
            self._expects = "sign" if character == "-" else "ZERO" if character == "0" else "INT"
        else:
            return False
        return True

    def _value_ended(self) -> None:
        self._expects = "comma"
        self.done = not self._open


def is_object(text: str) -> bool:
    """Tell whether the text is a JSON object, with nothing after it."""
    scanner = JsonScanner()
    at, _ = scanner.feed(text, skip_space(text, 0))
    return scanner.done and scanner.kind == "object" and skip_space(text, at) == len(text)
