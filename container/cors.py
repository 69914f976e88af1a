"""Which web pages may call the server from a browser (CORS)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

METHODS = "GET, POST, OPTIONS"
_DAY = "86400"
_NAMES = re.compile(r"[\w!#$%&'*+.^`|~-]+(?:\s*,\s*[\w!#$%&'*+.^`|~-]+)*", re.ASCII)
_MOST = 2000
"""Characters of the header names that a page may ask for at once."""


class Cors:
    """origins: as browsers send them, "https://app.example"; "*" for any. Keys are sent by the page itself, so that
    no page can borrow another's."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._any = "*" in origins
        self._origins = frozenset(origins)

    def headers(self, asked: Mapping[str, str]) -> dict[str, str]:
        """Of any reply. asked: the request's headers, names in lower case."""
        if not self._origins:
            return {}
        origin = asked.get("origin")
        shown = {} if self._any else {"vary": "origin"}
        if origin is None or not (self._any or origin in self._origins):
            return shown
        allowed = "*" if self._any else origin
        return {**shown, "access-control-allow-origin": allowed, "access-control-expose-headers": "*"}

    def preflight(self, method: str, asked: Mapping[str, str]) -> dict[str, str] | None:
        """What a browser is told that asks before it sends; None for any other request."""
        if method != "OPTIONS" or "access-control-request-method" not in asked or not self._origins:
            return None
        names = asked.get("access-control-request-headers", "")
        found = {"access-control-allow-methods": METHODS, "access-control-max-age": _DAY}
        if len(names) <= _MOST and _NAMES.fullmatch(names):
            found["access-control-allow-headers"] = names
        return found
