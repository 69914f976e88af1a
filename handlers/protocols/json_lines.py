"""Another dialect's stream as JSON lines, which is how LMI streams chat and completions where it is asked to."""

from __future__ import annotations

from handlers.backends.base import Delta, PromptStats
from handlers.errors import ServingError
from handlers.protocols.base import JSON_LINES, Answered, Writer


class JsonLines:
    """A writer of server-sent events, each of one line of data, written as one line of JSON for each event.

    Line ends inside JSON are escaped, so events and lines can be told apart by their ends alone.
    """

    stream_type = JSON_LINES
    keep_alive = b""

    def __init__(self, events: Writer) -> None:
        self._events = events

    def whole(self, answered: list[Answered]) -> bytes:
        return self._events.whole(answered)

    def chunk(self, delta: Delta, stats: PromptStats) -> bytes:
        return _lines(self._events.chunk(delta, stats))

    def end(self, stats: PromptStats) -> bytes:
        return _lines(self._events.end(stats))

    def failed(self, error: ServingError) -> bytes:
        return _lines(self._events.failed(error))


def _lines(events: bytes) -> bytes:
    """`[DONE]`, which is no JSON, and comments are left out."""
    data = [event[5:].strip() for event in events.split(b"\n\n") if event[:5] == b"data:"]
    return b"".join([line + b"\n" for line in data if line != b"[DONE]"])
