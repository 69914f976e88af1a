"""Messages between the front end and a process that compiles grammars: msgpack, each preceded by its length."""

from __future__ import annotations

import msgspec


class Job(msgspec.Struct, frozen=True):
    """A constraint's fields; see `handlers.request.Constraint`."""

    kind: str
    value: str | None
    whitespace_pattern: str | None


class Outcome(msgspec.Struct, frozen=True):
    """A grammar for `engine.guidance`, or the reason, for the client, why there is none. last: the process ends now."""

    grammar: str = ""
    reason: str | None = None
    last: bool = False
