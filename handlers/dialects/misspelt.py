"""Names in a body that nobody reads and that look like others that are read: told, and not refused.

Clients send what other servers know, so a name that is not known is no error; but one that is nearly `max_tokens` was
meant to change the answer. What is told is bounded in size and made of plain names alone, and so is the work.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]{2,31}")
_CUTOFF = 0.74
"""Of difflib's ratio: max_output_tokens is just as near to max_tokens."""

_MOST_KEYS = 64
"""Keys of a body that are looked at, of those that nobody reads."""

_MOST_NAMES = 8
"""Of these, names that are compared with those that are known, which takes 0.2 ms for each."""

_MOST_TOLD = 3

_ELSEWHERE = {
    "max_length": ("max_new_tokens", "max_tokens"),
    "max_new_tokens": ("max_tokens",),
    "n_predict": ("max_new_tokens", "max_tokens"),
    "num_predict": ("max_new_tokens", "max_tokens"),
    "repeat_penalty": ("repetition_penalty",),
    "stop_sequences": ("stop",),
    "stop_words": ("stop",),
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
        self._nearest = lru_cache(maxsize=1024)(self._find)

    def misspelt(self, given: Mapping[str, Any], under: str = "") -> list[str]:
        """A sentence for each of the first names that look like one that is read. under: the object's path."""
        unknown = (item for item in given.items() if item[0] not in self._own)
        plain = (
            name
            for name, value in islice(unknown, _MOST_KEYS)
            if value is not None and _PLAIN.fullmatch(name)
        )
        path = f"{under}." if under else ""
        near = ((name, self._nearest(name)) for name in islice(plain, _MOST_NAMES))
        found = (f"{path}{name} is not read; did you mean {path}{known}?" for name, known in near if known)
        return list(islice(found, _MOST_TOLD))

    def _find(self, name: str) -> str | None:
        for known in (name, *_ELSEWHERE.get(name, ())):
            if known in self._shown:
                return self._shown[known]
        found = difflib.get_close_matches(name.lower(), sorted(self._shown), n=1, cutoff=_CUTOFF)
        return self._shown[found[0]] if found else None


def warning(misspelt: Sequence[str]) -> dict[str, str]:
    """The header that tells of them (RFC 7234, 5.5: 299 is "miscellaneous persistent warning"); none for none."""
    if not misspelt:
        return {}
    return {"warning": ", ".join(f'299 - "{sentence}"' for sentence in misspelt[:_MOST_TOLD])}
