"""Token ids to text while they arrive: whole characters only, and stop strings found across any cut."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

MOST_TEXTLESS = 16
"""Tokens that may go without text. The longest character is four bytes; special tokens have no text either."""


class Detokenizer:
    """The text of one answer.

    stop: strings that end the answer. Text that may turn out to be the beginning of one is held back until it
    is decided. min_tokens: stop strings are not looked for in the text of the first that many tokens.
    prime: token ids that the answer continues, so that a word's leading space is kept; empty for a chat, whose
    answer begins anew.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        prime: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(ids=list(prime) or None, skip_special_tokens=skip_special_tokens)
        self._stop = tuple(text for text in stop if text)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._longest_stop = max((len(text) for text in self._stop), default=0)
        self._count = 0
        self._textless: list[int] = []
        self._held = ""
        self.stopped_by: str | None = None
        """The stop string that ended the answer."""

    def pieces(self, token_ids: Sequence[int], *, silent: bool = False, finished: bool = False) -> list[str]:
        """The text that each token makes certain. silent: the last one has none itself.

        finished: no token follows, so the last one makes certain what was held back, or an entry of its own does
        where there is no token.
        """
        pieces = [self.push(token) for token in (token_ids[:-1] if silent else token_ids)]
        if silent and token_ids:
            pieces.append("")
        if finished and (held := self.finish()):
            pieces.append(pieces.pop() + held if pieces else held)
        return pieces

    def push(self, token_id: int) -> str:
        """The text that this token makes certain; after a stop string, always empty."""
        if self.stopped_by is not None:
            return ""
        self._count += 1
        text = self._step(token_id)
        if not self._stop or not text:
            return text
        pending = self._held + text
        if self._count <= self._min_tokens:
            self._held = ""
            return pending
        end = self._find_stop(pending)
        if end is not None:
            self._held = ""
            return pending[:end]
        keep = self._undecided(pending)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]

    def finish(self) -> str:
        """What was held back for a stop string that did not come."""
        held, self._held = self._held, ""
        return held

    def _step(self, token_id: int) -> str:
        """Bytes that are no text show as U+FFFD once no character can come of them; the stream then begins anew
        (it would otherwise decode all of them again for each further token)."""
        self._textless.append(token_id)
        try:
            text = self._stream.step(self._tokenizer, token_id) or ""
        except Exception:  # tokenizers raises a bare Exception when earlier text changes under a later token
            text = ""
            self._begin_anew()
        if text:
            self._textless.clear()
        elif len(self._textless) >= MOST_TEXTLESS:
            text = str(self._tokenizer.decode(self._textless, skip_special_tokens=self._skip_special_tokens))
            self._begin_anew()
        return text

    def _begin_anew(self) -> None:
        self._textless.clear()
        self._stream = DecodeStream(skip_special_tokens=self._skip_special_tokens)

    def _find_stop(self, pending: str) -> int | None:
        """Where the text ends at the stop string that is complete first; None when there is none."""
        best: tuple[int, int, str] | None = None
        for stop in self._stop:
            at = pending.find(stop)
            if at >= 0 and (best is None or (at + len(stop), at) < best[:2]):
                best = (at + len(stop), at, stop)
        if best is None:
            return None
        end, at, self.stopped_by = best
        return end if self._include_stop else at

    def _undecided(self, pending: str) -> int:
        """How many last characters could be the beginning of a stop string."""
        for length in range(min(self._longest_stop - 1, len(pending)), 0, -1):
            tail = pending[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0
