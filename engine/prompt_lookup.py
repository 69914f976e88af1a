"""Speculative decoding by prompt lookup: drafts the tokens that followed the same words earlier in the sequence.

An answer that quotes its prompt, or repeats itself, is computed several tokens at a step. The engine samples each
position as it would without a draft, and keeps drafted tokens for as long as they are the ones that it samples; so the
tokens of an answer do not change.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.config import LookupConfig


class PromptLookup:
    """Drafts the next tokens of one sequence."""

    __slots__ = ("_config", "_count", "_ids", "_most")

    def __init__(self, config: LookupConfig) -> None:
        self._config = config
        self._ids = np.empty(0, np.int64)
        self._count = 0
        self._most = config.tokens

    def draft(self, token_ids: Sequence[int], most: int) -> list[int]:
        """Return at most `most` tokens that may follow; none if the end of the sequence occurs nowhere before.

        Args:
            token_ids: The sequence; after the first call, with tokens appended.
            most: The greatest number of tokens that is of use.
        """
        most = min(most, self._most)
        if most <= 0:
            return []
        ids = self._follow(token_ids)
        ends = np.flatnonzero(ids[:-1] == ids[-1])  # of the occurrences of the last 1, 2, ... tokens
        found = None
        for length in range(1, self._config.longest + 1):
            if length > 1:
                ends = ends[ends >= length - 1]
                ends = ends[ids[ends - length + 1] == ids[-length]]
            if not len(ends):
                break
            if length >= self._config.shortest:
                found = ends
        if found is None:
            return []
        whole = found[found + most < len(ids)]
        start = int(whole[-1] if len(whole) else found[0]) + 1
        return ids[start : start + most].tolist()  # type: ignore[no-any-return]

    def verified(self, drafted: int, accepted: int) -> None:
        """Draft less after drafts that were wrong, and more after right ones, since each token costs a row."""
        self._most = min(self._config.tokens, 2 * accepted + 1 if accepted < drafted else 2 * self._most)

    def _follow(self, token_ids: Sequence[int]) -> np.ndarray:
        if len(token_ids) > len(self._ids):
            grown = np.empty(2 * len(token_ids), np.int64)
            grown[: self._count] = self._ids[: self._count]
            self._ids = grown
        self._ids[self._count : len(token_ids)] = token_ids[self._count :]
        self._count = len(token_ids)
        return self._ids[: self._count]
