"""Who may call the server: the keys that it accepts, and the web pages that may call it from a browser (CORS)."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Mapping, Sequence

from pydantic import SecretStr

from handlers.errors import ServingError

_METHODS = "GET, POST, OPTIONS"
_PREFLIGHT_SECONDS = "86400"
_HEADER_NAMES = re.compile(r"[\w!#$%&'*+.^`|~-]+(?:\s*,\s*[\w!#$%&'*+.^`|~-]+)*", re.ASCII)
_MOST_HEADER_CHARACTERS = 2000
"""Characters of all header names in one preflight request."""


class Unauthorized(ServingError):
    """The request does not carry one of the server's keys."""

    status = 401
    kind = "authentication_failed"


class Keys:
    """The keys that the server accepts: one, or several as a JSON list of strings; with None no key is needed."""

    def __init__(self, secret: SecretStr | None) -> None:
        texts = [] if secret is None else _several(secret.get_secret_value())
        self._digests = [_digest(text.encode()) for text in texts]

    def admit(self, headers: Mapping[str, str]) -> bool:
        """Whether a valid `Authorization: Bearer KEY` is present; every wrong key takes the same time.

        Args:
            headers: Decoded as latin-1, so that their bytes can be restored.
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
    """The web pages that may call the server.

    Origins are written as browsers send them, "https://app.example", or "*" for any page. Credentials that a browser
    adds by itself are never allowed, so that no page can use another's key.
    """

    def __init__(self, origins: Sequence[str]) -> None:
        self._any = "*" in origins
        self._origins = frozenset(origins)

    def headers(self, asked: Mapping[str, str]) -> dict[str, str]:
        """The CORS headers of any reply. asked: the request's headers, names in lower case."""
        if not self._origins:
            return {}
        origin = asked.get("origin")
        shown = {} if self._any else {"vary": "origin"}
        if origin is None or not (self._any or origin in self._origins):
            return shown
        allowed = "*" if self._any else origin
        return {**shown, "access-control-allow-origin": allowed, "access-control-expose-headers": "*"}

    def preflight(self, method: str, asked: Mapping[str, str]) -> dict[str, str] | None:
        """The headers that answer a browser's preflight request; None for any other request."""
        if method != "OPTIONS" or "access-control-request-method" not in asked or not self._origins:
            return None
        names = asked.get("access-control-request-headers", "")
        found = {"access-control-allow-methods": _METHODS, "access-control-max-age": _PREFLIGHT_SECONDS}
        if len(names) <= _MOST_HEADER_CHARACTERS and _HEADER_NAMES.fullmatch(names):
            found["access-control-allow-headers"] = names
        return found
