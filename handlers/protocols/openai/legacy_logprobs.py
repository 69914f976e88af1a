"""The `logprobs` object of text completions: four lists, one entry for each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from handlers.backends.base import PositionLogprobs, TokenLogprob
from handlers.protocols.openai.reply import finite, token_text

_SEARCHED = 8
"""Characters past its expected place in which a token's text is looked for."""


class LegacyLogprobs:
    """Writes the lists of one choice, all at once or as its text comes in.

    `text_offset` counts characters of the choice's text. A token that holds a piece of a character starts where
    the character does; one that is not shown, where the next one starts.
    """

    def __init__(self, top: int, *, as_ids: bool = False) -> None:
        """top: alternatives beside each token. as_ids: tokens are written as "token_id:ID"."""
        self._top = top
        self._as_ids = as_ids
        self._before = 0
        self._pending = ""
        self._at = 0

    def add(self, text: str, positions: Sequence[PositionLogprobs | TokenLogprob]) -> dict[str, Any]:
        """What `positions` adds to the lists and `text` to the text. A bare token has no probability."""
        seen = min(self._at, len(self._pending))
        self._pending = self._pending[seen:] + text
        self._before += seen
        self._at -= seen
        lists: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for position in positions:
            if isinstance(position, TokenLogprob):
                token, logprob, top = position, None, None
            else:
                token = position.chosen
                logprob, top = finite(token.logprob), self._alternatives(position)
            lists["tokens"].append(token_text(token, self._as_ids))
            lists["token_logprobs"].append(logprob)
            lists["top_logprobs"].append(top)
            lists["text_offset"].append(self._offset(token.text))
        return lists

    def _alternatives(self, position: PositionLogprobs) -> dict[str, float]:
        """The chosen token and the best others. Of several that look the same the most likely one is shown."""
        shown: dict[str, float] = {}
        for token in (position.chosen, *position.top[: self._top]):
            shown.setdefault(token_text(token, self._as_ids), finite(token.logprob))
        return shown

    def _offset(self, text: str) -> int:
        at = self._at
        if "\ufffd" in text:
            return self._before + min(at, len(self._pending))
        if at >= len(self._pending):  # its text is held back, or will never come
            self._at = at + len(text)
            return self._before + at
        found = self._pending.find(text, at, at + len(text) + _SEARCHED)
        if found >= 0:
            self._at = found + len(text)
        return self._before + (found if found >= 0 else at)
