"""Learns how long prompts and images take, and how many of them fit into a step."""

from __future__ import annotations

import math

_WEIGHT = 0.25
"""Weight of the newest measurement."""

FEWEST_TOKENS = 16
"""Prompt tokens that a step may always compute, so that prompts go on however slow the model is."""


class StepTime:
    """Bounds the time that requests which are being streamed wait for the prompts and images of others.

    A step with decodes gets as many prompt tokens and images as fit into `seconds`, or into two and a half times the
    time of the decodes alone where that is longer. Steps without decodes are not bounded, since no stream waits.
    """

    def __init__(self, seconds: float | None) -> None:
        """Create an estimate that knows nothing yet. seconds: the bound; None for none."""
        self._seconds = seconds
        self._decodes = 0.0
        self._token = 0.0
        self._image = 0.0

    @property
    def _bound(self) -> float:
        return math.inf if self._seconds is None else max(self._seconds, 2.5 * self._decodes)

    def prompt_tokens(self) -> int | None:
        """Return the greatest number of prompt tokens in a step with decodes; None for no limit."""
        if self._seconds is None or not self._token:
            return None
        return max(FEWEST_TOKENS, int((self._bound - self._decodes) / self._token))

    def images(self) -> int | None:
        """Return the greatest number of images that a step with decodes encodes; None for no limit."""
        if self._seconds is None or not self._image:
            return None
        return max(1, int(self._bound / self._image))

    def leaves_no_time(self, encoding: float) -> bool:
        """Whether a step with decodes in which images took `encoding` seconds leaves the prompts to the next step."""
        return encoding > self._bound / 2

    def note_step(self, prompt_tokens: int, seconds: float) -> None:
        """Learn from a step without images that computed this many prompt tokens."""
        if prompt_tokens == 0:
            self._decodes = _averaged(self._decodes, seconds)
        elif prompt_tokens >= FEWEST_TOKENS:
            self._token = _averaged(self._token, max(seconds - self._decodes, seconds / 2) / prompt_tokens)

    def note_images(self, count: int, seconds: float) -> None:
        """Learn from the encoding of `count` images."""
        self._image = _averaged(self._image, seconds / count)


def _averaged(average: float, newest: float) -> float:
    return average + _WEIGHT * (newest - average) if average else newest
