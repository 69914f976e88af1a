"""Who may call the server: the keys that open it, and the web pages that may call it from a browser (CORS)."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Mapping, Sequence

from pydantic import SecretStr

METHODS = "GET, POST, OPTIONS"
_DAY = "86400"
_NAMES = re.compile(r"[\w!#$%&'*+.^`|~-]+(?:\s*,\s*[\w!#$%&'*+.^`|~-]+)*", re.ASCII)
_MOST = 2000
"""Characters of the header names that a page may ask for at once."""


class Keys:
    """One key, or several as a JSON list of texts; None opens the server to all."""

    def __init__(self, secret: SecretStr | None) -> None:
        texts = [] if secret is None else _several(secret.get_secret_value())
        self._digests = [_digest(text.encode()) for text in texts]

    def admit(self, headers: Mapping[str, str]) -> bool:
        """Whether `Authorization: Bearer KEY` is there, in the same time for every wrong key.

        headers: decoded as latin-1, so that their bytes can be had back.
        """
        if not self._digests:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        sent = _digest(given.strip().encode("latin-1", "replace"))
        found = False
        for digest in self._digests:
            found |= hmac.compare_digest(sent, digest)
        return found and scheme.lower() == "bearer"


def _several(text: str) -> list[str]:
    try:
        listed = json.loads(text)
    except ValueError:
        return [text]
    if isinstance(listed, list) and listed and all(isinstance(key, str) and key for key in listed):
        return listed
    return [text]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


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
