"""SageMaker's stateful sessions.

A session is a name that SageMaker sends to the same instance again, where the prefixes and images of earlier turns are
still cached; the server keeps nothing but the name.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import msgspec
from msgspec import Struct

from handlers.errors import InvalidParameter, InvalidRequest, Overloaded
from handlers.protocols.base import JSON
from handlers.protocols.body import shown_value
from handlers.protocols.lmi.sagemaker import INVOKE_ROUTES
from handlers.request import Incoming, Reply

MOST_SESSIONS = 100_000
"""Most sessions that are open at a time."""

_ID = "x-amzn-sagemaker-session-id"
_NEW = "NEW_SESSION"
_CLOSE = "CLOSE"
_MOST_BYTES = 128
"""Longest body that may open or close a session, `{"requestType": "NEW_SESSION"}`; few others are as short."""

_SCHEMAS = frozenset({"messages", "prompt", "inputs"})
"""Keys of bodies that ask for an answer."""


class SessionBody(Struct):
    """Opens or closes a session."""

    requestType: Literal["NEW_SESSION", "CLOSE"]


class SessionReply(Struct, forbid_unknown_fields=True):
    """Says what has been done."""

    result: str


class Sessions:
    """The open sessions of this server, in the order in which they end: each lasts equally long. See `Gate`."""

    routes: Collection[str] = INVOKE_ROUTES
    header = _ID

    def __init__(
        self,
        *,
        enabled: bool = True,
        expiration: float = 1200.0,
        most: int = MOST_SESSIONS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """expiration: seconds from a session's opening to its end, used or not. clock: in seconds since 1970."""
        self._most = most
        self._enabled = enabled
        self._expiration = expiration
        self._clock = clock
        self._ends: dict[str, float] = {}

    def answer(self, body: Mapping[str, Any], incoming: Incoming) -> Reply | None:
        """Return the reply to a body that opens or closes a session; None for all others.

        Raises:
            InvalidRequest: The body, or the session that a header names, is not valid.
            Overloaded: Too many sessions are open.
        """
        named = incoming.headers.get(_ID, "")
        if incoming.route in INVOKE_ROUTES and "requestType" in body and not _SCHEMAS & body.keys():
            return self._control(body["requestType"], named)
        if named:
            self._require_enabled()
            self._find(named)
        return None

    def may_answer(self, size: int, content: bytes | None = None) -> bool:
        fits = self._enabled and 0 < size <= _MOST_BYTES
        return fits and (content is None or b'"requestType"' in content)

    def _control(self, asked: object, named: str) -> Reply:
        if asked not in (_NEW, _CLOSE):
            raise InvalidParameter("requestType", f"is {shown_value(asked)}; allowed: {_NEW!r}, {_CLOSE!r}")
        self._require_enabled()
        return self._open() if asked == _NEW else self._close(named)

    def _open(self) -> Reply:
        self._forget_ended()
        if len(self._ends) >= self._most:
            raise Overloaded("too many sessions are open: close some, or try again later", retry_after=60)
        name, end = str(uuid.uuid4()), self._clock() + self._expiration
        self._ends[name] = end
        expires = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(end))
        value = f"{name}; Expires={expires}"
        # SageMaker's guide names the first header, its own container standard the second.
        headers = {"X-Amzn-SageMaker-Session-Id": value, "X-Amzn-SageMaker-New-Session-Id": value}
        return _result(f"Session {name} created", headers)

    def _close(self, name: str) -> Reply:
        if not name:
            raise InvalidRequest("name the session to close in the header X-Amzn-SageMaker-Session-Id")
        self._find(name)
        del self._ends[name]
        return _result(f"Session {name} closed", {"X-Amzn-SageMaker-Closed-Session-Id": name})

    def _find(self, name: str) -> None:
        self._forget_ended()
        if name == _NEW:
            raise InvalidRequest(f'to open a session send {{"requestType": "{_NEW}"}}', param="requestType")
        if name not in self._ends:
            raise InvalidRequest(f"session not found, or expired: {name[:80]}")

    def _forget_ended(self) -> None:
        now = self._clock()
        while self._ends and self._ends[first := next(iter(self._ends))] <= now:
            del self._ends[first]

    def _require_enabled(self) -> None:
        if not self._enabled:
            raise InvalidRequest("this server keeps no sessions (option.enable_stateful_sessions)")


def _result(text: str, headers: dict[str, str]) -> Reply:
    return Reply(200, JSON, msgspec.json.encode(SessionReply(text)), headers=headers)
