"""Tests that are coroutines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Make a test of a coroutine function; one that hangs fails after a minute."""

    def wrapped() -> None:
        asyncio.run(asyncio.wait_for(test(), 60))

    wrapped.__name__ = test.__name__
    wrapped.__doc__ = test.__doc__
    return wrapped
