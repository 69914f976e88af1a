"""Names in a body that nobody reads and that look like others that are read: told, and not refused.

Clients send what other servers know, so a name that is not known is no error; but one that is nearly `max_tokens` was
meant to change the answer. What is told is bounded in size and made of plain names alone, and so is the work.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]{2,31}")
_CUTOFF = 0.74
"""Of difflib's ratio: max_output_tokens is just as near to max_tokens."""

_MOST_KEYS = 256
"""Keys of a body that are looked at, of those that nobody reads."""

_MOST_NAMES = 64
"""Of these, names that are compared with those whose letters they share, which takes up to 0.1 ms for each."""

_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")

_MOST_TOLD = 3

_LONGEST = 40
"""Characters of a name that is looked at."""

_WRAPPER = "extra_body"
"""The argument of OpenAI's Python client whose keys it puts into the body; other clients send it as it is."""

_ELSEWHERE = {
    "input_schema": ("parameters",),
    "max_length": ("max_new_tokens", "max_tokens"),
    "max_new_tokens": ("max_tokens",),
    "max_tokens_to_sample": ("max_tokens", "max_new_tokens"),
    "n_predict": ("max_new_tokens", "max_tokens"),
    "num_predict": ("max_new_tokens", "max_tokens"),
    "parts": ("content",),
    "repeat_penalty": ("repetition_penalty",),
    "stop_sequence": ("stop",),
    "stop_sequences": ("stop",),
    "stop_words": ("stop",),
    "text": ("content",),
    "top_n_tokens": ("top_logprobs", "logprobs"),
}
"""What other servers call a thing -> what it may be called here."""


class KnownNames:
    """The names of one kind of object.

    own: those that are read. silent: those that are ignored on purpose. inside: those that are read in an object
    inside of it, with the path that they have there.
    """

    def __init__(
        self, own: Collection[str], silent: Collection[str] = (), inside: Mapping[str, str] | None = None
    ) -> None:
        self._own = frozenset(own) | frozenset(silent)
        self._shown = {**(inside or {}), **{name: name for name in own}}
        self._letters = [(name, _letters(name)) for name in sorted(self._shown)]
        self._nearest = lru_cache(maxsize=1024)(self._find)

    def misspelt(self, given: Mapping[str, Any], under: str = "", *, only_missing: bool = False) -> list[str]:
        """A sentence for each of the first names that look like one that is read.

        under: the object's path. only_missing: where the one that is read is not given, too.
        """
        path = f"{under}." if under else ""
        near = (pair for pair in self.nearest(given) if not (only_missing and given.get(pair[1])))
        told = [_told(path, name, known) for name, known in islice(near, _MOST_TOLD)]
        if given.get(_WRAPPER) is not None and _WRAPPER not in self._own:
            told.insert(0, f"{path}{_WRAPPER} is not read; put its keys into the body itself")
        return told[:_MOST_TOLD]

    def nearest(self, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """The names that nobody reads, as given, each with the one that is read and looks like it."""
        unknown = ((name, value) for name, value in given.items() if name not in self._own)
        words = ((name, _words(name)) for name, value in islice(unknown, _MOST_KEYS) if value is not None)
        likely = ((name, word) for name, word in words if word and self._near(word))
        for name, word in islice(likely, _MOST_NAMES):
            if known := self._nearest(word):
                yield name, known

    def _near(self, word: str) -> list[str]:
        """Known names that difflib may find near: no letter that only one of the two has is part of a match."""
        if elsewhere := [name for name in (word, *_ELSEWHERE.get(word, ())) if name in self._shown]:
            return elsewhere
        letters = _letters(word)
        return [
            name
            for name, others in self._letters
            if (letters ^ others).bit_count() <= (1 - _CUTOFF) * (len(word) + len(name))
        ]

    def _find(self, word: str) -> str | None:
        near = self._near(word)
        if near[0] == word or near[0] in _ELSEWHERE.get(word, ()):
            return self._shown[near[0]]
        found = difflib.get_close_matches(word, near, n=1, cutoff=_CUTOFF)
        return self._shown[found[0]] if found else None


def _words(name: str) -> str:
    """The name as ours are written: `max_tokens` for "maxTokens", "max-tokens" and "Max tokens "; else nothing."""
    if len(name) > _LONGEST:
        return ""
    word = re.sub("[- ]+", "_", _HUMP.sub("_", name.strip(" "))).lower()
    return word if _PLAIN.fullmatch(word) else ""


def _letters(word: str) -> int:
    """The set of its letters, as bits."""
    return sum(1 << ord(letter) for letter in set(word))


def _told(path: str, name: str, known: str) -> str:
    shown = name if _PLAIN.fullmatch(name) else _words(name)
    spelling = " in that spelling" if shown == known else ""
    return f"{path}{shown}{spelling} is not read; did you mean {path}{known}?"


def warning(misspelt: Sequence[str]) -> dict[str, str]:
    """The header that tells of them (RFC 7234, 5.5: 299 is "miscellaneous persistent warning"); none for none."""
    if not misspelt:
        return {}
    return {"warning": ", ".join(f'299 - "{sentence}"' for sentence in misspelt[:_MOST_TOLD])}
