"""Host memory for decoded images: a budget in bytes, handed out in order of arrival or nearly so."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

Wanted = tuple[bytes, int]
"""An image's digest, and the bytes of its pixels."""


class ImageMemory:
    """Limits what all requests together may hold. Used on one event loop.

    A prompt asks once, for all of its images, and so never holds some while it waits for others. A prompt
    that needs more than the capacity is served when nobody else holds any. Images with the same content are
    counted once.
    """

    def __init__(self, capacity: int, most_passes: int = 0) -> None:
        """Create a budget of which nothing is used.

        Args:
            capacity: Bytes.
            most_passes: How many requests that fit may overtake one that is waiting and does not fit.
        """
        self.capacity = capacity
        self._most_passes = most_passes
        self.used = 0
        self._held: dict[bytes, _Held] = {}
        self._queue: deque[_Waiting] = deque()

    async def take(self, images: Sequence[Wanted]) -> list[Share]:
        """Wait for a share for each image. Cancelled, it leaves nothing behind."""
        if not self._queue and self._fits(images):
            return self._grant(images)
        waiting = _Waiting(images)
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

    def _fits(self, images: Sequence[Wanted]) -> bool:
        more = sum(size for digest, size in dict(images).items() if digest not in self._held)
        return self.used == 0 or self.used + more <= self.capacity

    def _grant(self, images: Sequence[Wanted]) -> list[Share]:
        for digest, size in images:
            held = self._held.get(digest)
            if held is None:
                self._held[digest] = held = _Held(size)
                self.used += size
            held.holders += 1
        return [Share(self, digest) for digest, _ in images]

    def _serve(self) -> None:
        while self._queue and self._fits(self._queue[0].images):
            self._admit(self._queue.popleft())
        if not self._queue or self._queue[0].passes >= self._most_passes:
            return
        first = self._queue[0]
        for waiting in [*self._queue][1:]:
            if self._fits(waiting.images):
                self._queue.remove(waiting)
                self._admit(waiting)
                first.passes += 1
                if first.passes >= self._most_passes:
                    return

    def _admit(self, waiting: _Waiting) -> None:
        if not waiting.turn.cancelled():
            waiting.turn.set_result(self._grant(waiting.images))

    def _give_back(self, digest: bytes) -> None:
        held = self._held[digest]
        held.holders -= 1
        if held.holders == 0:
            del self._held[digest]
            self.used -= held.size
            self._serve()


class Share:
    """One prompt's hold on the memory of one image; it is returned once, however often it is released."""

    __slots__ = ("_digest", "_memory")

    def __init__(self, memory: ImageMemory, digest: bytes) -> None:
        self._memory: ImageMemory | None = memory
        self._digest = digest

    def handed_over(self, more: int = 0) -> Share:
        """Pass the hold on to a new share; releasing this one then has no effect.

        Args:
            more: Bytes that it uses in addition from now on, even if they exceed the capacity.
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
    """A prompt that waits.

    Attributes:
        passes: Number of later prompts that have overtaken it.
    """

    images: Sequence[Wanted]
    passes: int = 0
    turn: asyncio.Future[list[Share]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
