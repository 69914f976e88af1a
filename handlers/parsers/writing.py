"""What tool parsers share: pieces in order, white space around calls, text held back until it is decided."""

from __future__ import annotations

from collections.abc import Callable

from handlers.parsers.base import CallArguments, CallBroken, CallStart, Content, Piece, joined

SPACE = " \t\r\n"


class Pieces:
    """Collects what a parser finds.

    White space right before and after calls is framing: that at the beginning of the answer and after a call is
    held back until text follows, and dropped where a call or the end does.
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
        """The pieces since the last time."""
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
        """The text, marks included, of a call that may yet turn out to be none."""
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
        """A mark that closes calls: the white space before it is framing."""
        if self._blank is not None and self._after_call:
            self._blank.clear()

    def no_call(self) -> None:
        """The source is none after all."""
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
        """The answer has ended: a call that has not started is content."""
        if self._source and not self._started:
            self.no_call()
        if self._blank and not self._after_call and not self._started:
            self._ready.append(Content("".join(self._blank)))
        self._blank = None


def possible_beginning(text: str, at: int, mark: str) -> int:
    """Where, from `at` on, the text's end may be the beginning of the mark; its length where it cannot."""
    start = max(at, len(text) - len(mark) + 1)
    while start < len(text):
        start = text.find(mark[0], start)
        if start < 0:
            return len(text)
        if mark.startswith(text[start:]):
            return start
        start += 1
    return len(text)
