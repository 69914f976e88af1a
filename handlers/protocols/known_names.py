"""Finds misspelt names in bodies, for a warning header.

Clients send fields that only other servers know, so an unknown name is not an error; but one that is nearly
`max_tokens` was meant to change the answer. Warnings are bounded in size and number and consist of plain names alone;
the work to find them is bounded as well.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

log = logging.getLogger(__name__)

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]{2,31}")
_CUTOFF = 0.74
"""The lowest ratio of difflib that counts as similar: that of max_output_tokens and max_tokens."""

_MOST_KEYS = 256
"""The most unread keys of a body that are examined."""

_MOST_NAMES = 64
"""The most names among them that are compared letter by letter, which takes up to 0.1 ms for each."""

_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")

_MOST_WARNINGS = 3

_LONGEST = 40
"""The longest name that is examined."""

_WRAPPER = "extra_body"
"""The argument of OpenAI's Python client whose keys it puts into the body; other clients send it as it is."""

_ELSEWHERE = {
    "input_schema": ("parameters",),
    "max_length": ("max_new_tokens", "max_tokens"),
    "max_new_tokens": ("max_tokens",),
    "max_tokens_to_sample": ("max_tokens", "max_new_tokens"),
    "mirostat": ("mirostat_mode",),
    "n_predict": ("max_new_tokens", "max_tokens"),
    "num_predict": ("max_new_tokens", "max_tokens"),
    "parts": ("content",),
    "rep_pen": ("repetition_penalty",),
    "repeat_penalty": ("repetition_penalty",),
    "stop_sequence": ("stop",),
    "stop_sequences": ("stop",),
    "stop_words": ("stop",),
    "text": ("content",),
    "top_n_tokens": ("top_logprobs", "logprobs"),
}
"""A name that other servers use -> the names that it may have here."""


class KnownNames:
    """The names that are known in one kind of object."""

    def __init__(
        self, own: Collection[str], silent: Collection[str] = (), inside: Mapping[str, str] | None = None
    ) -> None:
        """Collect the names.

        Args:
            own: Names that are read.
            silent: Names that are ignored on purpose.
            inside: Names that are read in an object inside it -> their path there.
        """
        self._own = frozenset(own) | frozenset(silent)
        self._shown = {**(inside or {}), **{name: name for name in own}}
        self._letters = [(name, _letters(name)) for name in sorted(self._shown)]
        self._nearest = lru_cache(maxsize=1024)(self._find)

    def misspelt(self, given: Mapping[str, Any], under: str = "", *, only_missing: bool = False) -> list[str]:
        """Return a sentence for each of the first few unread names that look like one that is read.

        All unread names are logged for the developer, unless only_missing says to skip those whose known neighbour is
        given as well. under: the object's path.
        """
        path = f"{under}." if under else ""
        if not only_missing:
            for name in given.keys() - self._own:
                log.debug("unknown %s ignored: %.80s", "parameter" if under else "field", name)
        near = (pair for pair in self.nearest(given) if not (only_missing and given.get(pair[1])))
        found = [_sentence(path, name, known) for name, known in islice(near, _MOST_WARNINGS)]
        if given.get(_WRAPPER) is not None and _WRAPPER not in self._own:
            found.insert(0, f"{path}{_WRAPPER} is not read; put its keys into the body itself")
        return found[:_MOST_WARNINGS]

    def nearest(self, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Yield each unread name, as it was given, with the known name that it looks like."""
        unknown = ((name, value) for name, value in given.items() if name not in self._own)
        words = ((name, _words(name)) for name, value in islice(unknown, _MOST_KEYS) if value is not None)
        likely = ((name, word) for name, word in words if word and self._near(word))
        for name, word in islice(likely, _MOST_NAMES):
            if known := self._nearest(word):
                yield name, known

    def _near(self, word: str) -> list[str]:
        """Return the known names that difflib may find similar, judged by the letters that only one of the two has."""
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
    """Return a name in our spelling: `max_tokens` for "maxTokens", "max-tokens" and "Max tokens "; "" if impossible."""
    if len(name) > _LONGEST:
        return ""
    word = re.sub("[- ]+", "_", _HUMP.sub("_", name.strip(" "))).lower()
    return word if _PLAIN.fullmatch(word) else ""


def _letters(word: str) -> int:
    """Return the set of a word's letters, as bits."""
    return sum(1 << ord(letter) for letter in set(word))


def _sentence(path: str, name: str, known: str) -> str:
    shown = name if _PLAIN.fullmatch(name) else _words(name)
    spelling = " in that spelling" if shown == known else ""
    return f"{path}{shown}{spelling} is not read; did you mean {path}{known}?"


def warning(misspelt: Sequence[str]) -> dict[str, str]:
    """The warning header of a reply, if one is due (RFC 7234, 5.5: 299 is "miscellaneous persistent warning")."""
    if not misspelt:
        return {}
    return {"warning": ", ".join(f'299 - "{sentence}"' for sentence in misspelt[:_MOST_WARNINGS])}
