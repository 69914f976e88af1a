"""What the long lists in a body may add up to: they are checked, spelled and sent anew for each prompt and answer."""

from __future__ import annotations

from collections.abc import Sequence

from handlers.errors import InvalidRequest
from handlers.request import GenerationRequest

MOST_ALLOWED_TOKENS = 2**20
"""Some vocabularies are 260,000 tokens; a million hold the others up for about half a second."""

MOST_BAD_WORDS = 2**14
"""Spelled with a space and without, these take about as long."""


def check_totals(requests: Sequence[GenerationRequest]) -> None:
    """requests: of one body. Raises InvalidRequest."""
    answers = sum(request.n for request in requests)
    sampling = requests[0].sampling
    allowed = sampling.allowed_token_ids or ()
    for name, size, times, of, most in (
        ("allowed_token_ids", len(allowed), answers, "answers", MOST_ALLOWED_TOKENS),
        ("bad_words", len(sampling.bad_words), len(requests), "prompts", MOST_BAD_WORDS),
    ):
        if size * times > most:
            raise InvalidRequest(
                f"{name} has {size} entries, for {times} {of}; allowed: {most} for all of them together",
                param=name,
            )
