"""What a request gets: its text step by step, and what is known of its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]
"""stop: end of sequence, stop id or stop string (see `stop_reason`); length: max_tokens or the end of the context."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One candidate at one position. `logprob` is finite; `rank` counts from 1, the most likely token."""

    token_id: int
    text: str
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The token chosen at a position and the most likely alternatives there, best first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(slots=True)
class Delta:
    """What one step added to choice number `index` (0 to n-1).

    Attributes:
        text: Whole characters only; it may lag behind `token_ids` while a character or a stop string is undecided.
        logprobs: One entry for each new token, if they were asked for.
        finish_reason: Why the choice has ended; None while it continues.
        stop_reason: The stop string or stop id that ended it; None for end-of-sequence and for length.
        eos: Whether it ended with the model's own end-of-sequence token.
        pieces: The text that each token added; joined they are `text`. If that is not known, the last one holds all of
            it. There is one entry even without a token.
    """

    index: int
    token_ids: list[int]
    text: str
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    eos: bool = False
    pieces: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.pieces:
            self.pieces = [""] * (len(self.token_ids) - 1) + [self.text]


@dataclass(slots=True)
class PromptStats:
    """Counts and details of a prompt, complete once the first delta has arrived.

    Attributes:
        prompt_tokens: Including the placeholders of images.
        image_tokens: Those of the placeholders alone.
        cached_tokens: How many were found in the prefix cache.
        prompt_text: The text that they were made of.
        prompt_logprobs: If they were asked for; the first entry is None.
        first_token_text: The text of the first token, which goes with `prompt_logprobs`.
        queued: Seconds that the request waited for the engine to begin.
    """

    prompt_tokens: int
    image_tokens: int = 0
    cached_tokens: int = 0
    prompt_token_ids: list[int] = field(default_factory=list)
    prompt_text: str = ""
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    first_token_text: str = ""
    queued: float = 0.0


def total(stats: Sequence[PromptStats]) -> PromptStats:
    """Return the sum of the counts of several prompts; a single prompt's own stats are returned as they are."""
    if len(stats) == 1:
        return stats[0]
    return PromptStats(
        prompt_tokens=sum(one.prompt_tokens for one in stats),
        image_tokens=sum(one.image_tokens for one in stats),
        cached_tokens=sum(one.cached_tokens for one in stats),
        queued=max((one.queued for one in stats), default=0.0),
    )


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt as the model reads it, including the tokens of its images.

    Attributes:
        text: What the tokens were made of, with a placeholder for each image.
        pieces: The tokens as the vocabulary spells them.
        spans: Where each token is in `text`, (start, stop) in characters; (0, 0) for one that was added to the text.
            All tokens of an image have the span of its placeholder.
    """

    text: str
    token_ids: list[int]
    pieces: list[str]
    spans: list[tuple[int, int]]

    @property
    def texts(self) -> list[str]:
        """The text that each token covers; the byte tokens of a single character each cover all of it."""
        return [self.text[start:stop] for start, stop in self.spans]
