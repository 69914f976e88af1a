"""Refusals that come in thousands: each is counted in the metrics, and one log line a second speaks for all."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

from handlers.errors import ServingError

logger = logging.getLogger("container.request")

_SECONDS = 1.0


class Refusals:
    """Requests that were refused by their heads, since the last log line about them."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, error: ServingError) -> None:
        """error: with a message of the program's own, as it is logged."""
        self._counts[error.message] += 1
        if self._timer is None:
            self._log()

    def _log(self) -> None:
        self._timer = None
        if not self._counts:
            return
        for message, count in self._counts.items():
            logger.warning("refused %d requests before reading their bodies: %s", count, message)
        self._counts.clear()
        self._timer = asyncio.get_running_loop().call_later(_SECONDS, self._log)
