"""Which keys open the server."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping

from pydantic import SecretStr


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
