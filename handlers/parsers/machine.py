"""A tool parser as a machine of states, each a method that takes the text on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from handlers.parsers.base import Piece
from handlers.parsers.writing import Pieces

State = Callable[[str, int], int | None]
"""Given the text and a position in it, before its end, returns the position from which the next state goes on; None
where it needs more text to decide what stands at the position, which is then little."""


class Machine:
    """Drives the states; the text before the position that they reach is never looked at again."""

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
        """The answer ended with text that was not decided: half a mark."""
        self._pieces.content(held)
