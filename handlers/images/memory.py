"""Host memory for decoded pictures: a budget in bytes, handed out in the order of asking or nearly so."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

Wanted = tuple[bytes, int]
"""A picture's digest and the bytes that its pixels take."""


class PictureMemory:
    """What all requests together may hold. Used on one event loop.

    A prompt asks once, for all of its pictures, and so never holds some while it waits for others. One that
    wants more than there is gets it when nobody else holds any. Pictures of the same content are one.
    """

    def __init__(self, capacity: int, most_passes: int = 0) -> None:
        """capacity: bytes. most_passes: of those that fit, how many may go before one that waits and does not fit."""
        self.capacity = capacity
        self._most_passes = most_passes
        self.used = 0
        self._held: dict[bytes, _Held] = {}
        self._queue: deque[_Waiting] = deque()

    async def take(self, pictures: Sequence[Wanted]) -> list[Share]:
        """A share for each picture. Waits its turn; cancelled, it leaves nothing behind."""
        if not self._queue and self._fits(pictures):
            return self._grant(pictures)
        waiting = _Waiting(pictures)
        self._queue.append(waiting)
        self._serve()
        try:
            return await waiting.turn
        except asyncio.CancelledError:
            if waiting.turn.done() and not waiting.turn.cancelled():
                for share in waiting.turn.result():
                    share.release()
            elif waiting in self._queue:
                self._queue.remove(waiting)
                self._serve()
            raise

    def _fits(self, pictures: Sequence[Wanted]) -> bool:
        more = sum(size for digest, size in dict(pictures).items() if digest not in self._held)
        return self.used == 0 or self.used + more <= self.capacity

    def _grant(self, pictures: Sequence[Wanted]) -> list[Share]:
        for digest, size in pictures:
            held = self._held.get(digest)
            if held is None:
                self._held[digest] = held = _Held(size)
                self.used += size
            held.holders += 1
        return [Share(self, digest) for digest, _ in pictures]

    def _serve(self) -> None:
        while self._queue and self._fits(self._queue[0].pictures):
            self._let_in(self._queue.popleft())
        if not self._queue or self._queue[0].passes >= self._most_passes:
            return
        first = self._queue[0]
        for waiting in [*self._queue][1:]:
            if self._fits(waiting.pictures):
                self._queue.remove(waiting)
                self._let_in(waiting)
                first.passes += 1
                if first.passes >= self._most_passes:
                    return

    def _let_in(self, waiting: _Waiting) -> None:
        if not waiting.turn.cancelled():
            waiting.turn.set_result(self._grant(waiting.pictures))

    def _give_back(self, digest: bytes) -> None:
        held = self._held[digest]
        held.holders -= 1
        if held.holders == 0:
            del self._held[digest]
            self.used -= held.size
            self._serve()


class Share:
    """One prompt's hold on the memory of one picture; returned once, however often it is released."""

    __slots__ = ("_digest", "_memory")

    def __init__(self, memory: PictureMemory, digest: bytes) -> None:
        self._memory: PictureMemory | None = memory
        self._digest = digest

    def handed_over(self, more: int = 0) -> Share:
        """The same hold, which somebody else returns: releasing this one does nothing any more.

        more: bytes that it takes from now on beside, whether there is room for them or not.
        """
        assert self._memory is not None
        memory, self._memory = self._memory, None
        memory._held[self._digest].size += more
        memory.used += more
        return Share(memory, self._digest)

    def release(self) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            memory._give_back(self._digest)


@dataclass(slots=True)
class _Held:
    size: int
    holders: int = 0


@dataclass(slots=True, eq=False)
class _Waiting:
    """passes: of others that came later and went first."""

    pictures: Sequence[Wanted]
    passes: int = 0
    turn: asyncio.Future[list[Share]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
