"""Log probabilities on their way from the sampler to the front, which knows no torch."""

from __future__ import annotations

import msgspec


class Logprobs(msgspec.Struct, array_like=True):
    """What the model thought at one position, before any processor.

    Entry 0 is the chosen token, then come the k best, best first; the chosen token is repeated there if it is
    among them. A rank is 1 + the number of tokens that are strictly more probable.
    """

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]
