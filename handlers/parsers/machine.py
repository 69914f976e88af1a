"""Shared by tool parsers: a machine of states, and the collection of what they find."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from handlers.parsers.base import CallArguments, CallBroken, CallStart, Content, Piece, joined

SPACE = " \t\r\n"


class Pieces:
    """Collects what a parser finds.

    White space right before and after calls is framing. At the beginning of the completion and after a call
    it is held back until text follows, and dropped if a call or the end follows.
    """

    def __init__(self, call_id: Callable[[], str]) -> None:
        self._call_id = call_id
        self._ready: list[Piece] = []
        self._blank: list[str] | None = []
        self._source: list[str] = []
        self._calls = 0
        self._started = False
        self._after_call = False

    def take(self) -> list[Piece]:
        """Return the pieces since the last call."""
        ready, self._ready = self._ready, []
        return joined(ready) if len(ready) > 1 else ready

    def content(self, text: str) -> None:
        if self._blank is not None:
            if not text.strip(SPACE):
                if text:
                    self._blank.append(text)
                return
            text = "".join((*self._blank, text))
            self._blank = None
        if text:
            self._ready.append(Content(text))

    def source(self, text: str) -> None:
        """Add text, marks included, of a call that may still turn out not to be one."""
        if text:
            self._source.append(text)

    def start(self, name: str, call_id: str | None = None) -> None:
        self._ready.append(CallStart(self._calls, call_id or self._call_id(), name))
        self._started = True

    def arguments(self, text: str) -> None:
        if text:
            self._ready.append(CallArguments(self._calls, text))

    def call_ended(self) -> None:
        self._calls += 1
        self._source.clear()
        self._started = False
        self._blank = []
        self._after_call = True

    def mark_ended(self) -> None:
        """Handle the end of a mark that closes calls: white space before it is framing."""
        if self._blank is not None and self._after_call:
            self._blank.clear()

    def no_call(self) -> None:
        """Handle the source as content, because it is not a call."""
        source = "".join(self._source)
        self._source.clear()
        if self._started:
            self._ready.append(CallBroken(self._calls, "".join((*(self._blank or ()), source))))
            self._calls += 1
            self._started = False
            self._blank = None
        else:
            self.content(source)

    def finish(self) -> None:
        """Handle the end of the completion: a call that has not started is content."""
        if self._source and not self._started:
            self.no_call()
        if self._blank and not self._after_call and not self._started:
            self._ready.append(Content("".join(self._blank)))
        self._blank = None


def possible_beginning(text: str, at: int, mark: str) -> int:
    """Return the position, from `at` on, where the end of the text may be the beginning of the mark.

    It is the length of the text if there is no such position.
    """
    start = max(at, len(text) - len(mark) + 1)
    while start < len(text):
        start = text.find(mark[0], start)
        if start < 0:
            return len(text)
        if mark.startswith(text[start:]):
            return start
        start += 1
    return len(text)


State = Callable[[str, int], int | None]
"""Given the text and a position in it, before its end, a state returns the position from which the next state
continues. It returns None if it needs more text to decide; the undecided text is then short."""


class Machine:
    """Runs the states; the text before the position that they reach is never looked at again."""

    def __init__(self, pieces: Pieces, begin: State) -> None:
        self._pieces = pieces
        self._state = begin
        self._held = ""

    def push(self, text: str, token_ids: Sequence[int] = ()) -> list[Piece]:
        text = self._held + text
        at: int | None = 0
        reached = 0
        while reached < len(text) and (at := self._state(text, reached)) is not None:
            reached = at
        self._held = text[reached:]
        return self._pieces.take()

    def finish(self) -> list[Piece]:
        held, self._held = self._held, ""
        if held:
            self._cut_short(held)
        self._pieces.finish()
        return self._pieces.take()

    def _cut_short(self, held: str) -> None:
        """Handle undecided text at the end of the completion, such as half a mark."""
        self._pieces.content(held)
