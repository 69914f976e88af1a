"""Requests with the same picture are rendered one after the other.

vLLM's front notes a picture as sent to the engine when it has rendered it, and renders it without its data from then
on. So the next request with that picture must not be rendered before the one before it has been sent, or taken back.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from weakref import WeakValueDictionary


class PictureTurns:
    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def of(self, digests: Iterable[str]) -> AsyncIterator[None]:
        """Hold the turns of these pictures; in one order for all, so that none waits for another in a circle."""
        async with AsyncExitStack() as held:
            for digest in sorted(set(digests)):
                await held.enter_async_context(self._locks.setdefault(digest, asyncio.Lock()))
            yield
