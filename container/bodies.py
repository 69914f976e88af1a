"""Request bodies on their way in: how many bytes of them the server holds, and which are not waited for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from handlers.errors import Overloaded, PayloadTooLarge, ServingError

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

FLOOR_BYTES = 1024
"""A second, averaged over `FLOOR_SECONDS`: slower than any mobile network that works."""

FLOOR_SECONDS = 30.0

_SWEEP_SECONDS = 1.0
_PROMPT_SECONDS = 2.0
"""How long a body that is still arriving may keep a place for an answer: one that takes longer competes again."""

_PARTS_PER_ORDER = 16
"""Of all bodies that are read, one in so many may be judged by an order that is up to a second old."""

_PIECE_BYTES = 256 * 1024
"""Small parts are put together, as each object costs more than a few bytes; large ones are not moved again."""

_JOINED_HERE_BYTES = 2**20
"""Joining a larger body would stop the event loop: for 60 MB, tens of milliseconds."""

_JOINER = ThreadPoolExecutor(1, "join-body")
"""One at a time, so that of all bodies only one is in memory twice."""

_RETRY_AFTER = 1.0


class ClientGone(Exception):
    """The client closed the connection before it had sent its request."""


class BodyTimeout(ServingError):
    """The body arrives too slowly, or takes too long in all."""

    status = 408
    kind = "body_timeout"


class Bodies:
    """The bytes of all request bodies that the server holds, from their arrival until their replies have ended; those
    of images until the engine has them.

    limit: bytes, `option.request_memory_mb`; one body of the largest size always fits into an idle server. held: bytes
    now. expected: requests that were let in and have not asked for their places yet. Bytes are counted as they arrive,
    never as they are declared: who declares much and sends nothing takes nothing from the others.
    """

    def __init__(self) -> None:
        self.limit = 0
        self.held = 0
        self.expected = 0
        self.refused = 0
        self.reading: set[Body] = set()
        self._arriving = 0  # bytes of `reading`
        self._order: list[Body] = []  # by cost, the costliest last
        self._uses = 0
        self._timer: asyncio.TimerHandle | None = None

    def fits(self, declared: int) -> bool:
        """Whether a body of `declared` bytes can find room beside those that arrived whole."""
        if self.held + declared <= self.limit:
            return True
        return self.held - self._arriving + declared <= self.limit

    def take(self, body: Body, size: int) -> None:
        """Count bytes of a body that is being read. Raises Overloaded.

        Where there is no room, the body goes that would hold the most memory for the longest: its size times the time
        that the rest needs at the pace at which it came lately. So bodies that stopped or drip make room for those
        that come fast, large ones for small ones, and one that is nearly complete stays. Raises Overloaded where that
        is the body itself.
        """
        while self.held + size > self.limit:
            if body not in self.reading:  # refused a moment ago
                raise self.overloaded()
            costliest = self._costliest()
            if costliest.cost() <= body.cost():
                raise self.overloaded()
            self.refuse(costliest, self.overloaded())
        self.held += size
        self._arriving += size if body in self.reading else 0
        body.size += size

    def _costliest(self) -> Body:
        """Of those that are read. Where there are many, the order of a moment ago serves a sixteenth as many parts:
        asking each of thousands for every part would hold up everything else."""
        self._uses += 1
        while self._order and self._order[-1] not in self.reading:
            self._order.pop()
        if not self._order or self._uses > len(self.reading) // _PARTS_PER_ORDER:
            self._order = sorted(self.reading, key=Body.cost)
            self._uses = 0
        return self._order[-1]

    def refuse(self, body: Body, error: ServingError) -> None:
        """End the reading of a body that another task awaits."""
        self.forget(body)
        body.release()
        body.fail(error)

    def forget(self, body: Body) -> None:
        """It is read no longer. Safe to call twice."""
        if body in self.reading:
            self.reading.remove(body)
            self._arriving -= body.size

    def watch(self, body: Body) -> None:
        self.reading.add(body)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_SWEEP_SECONDS, self._sweep)

    def _sweep(self) -> None:
        now = time.monotonic()
        for body in list(self.reading):
            error = body.look(now)
            if error is not None:
                self.refuse(body, error)
        self._timer = None
        self._order.clear()
        if self.reading:
            self._timer = asyncio.get_running_loop().call_later(_SWEEP_SECONDS, self._sweep)

    def overloaded(self) -> Overloaded:
        """The refusal, counted."""
        self.refused += 1
        return Overloaded(
            "the server holds as many bytes of requests as it may (option.request_memory_mb): try again later",
            retry_after=_RETRY_AFTER,
        )


class Body:
    """One request's body. size: bytes of it that are held. `release` it when nobody holds its content any more."""

    def __init__(self, bodies: Bodies, headers: Mapping[str, str], limit: int, longest: float) -> None:
        """limit: most bytes. longest: seconds that reading may take."""
        self.size = 0
        self._bodies = bodies
        self._limit = limit
        self._longest = longest
        self._declared = declared_size(headers)
        self._began = self._window = self._last = time.monotonic()
        self._at_window = self._at_sweep = 0
        self._pace = 0.0
        self._task: asyncio.Task[Any] | None = None
        self._error: ServingError | None = None
        self._expected = False

    def expect(self) -> None:
        """Keep a place for its answer in mind until `settle`."""
        if not self._expected:
            self._expected = True
            self._bodies.expected += 1

    @property
    def expected(self) -> bool:
        return self._expected

    def settle(self) -> None:
        if self._expected:
            self._expected = False
            self._bodies.expected -= 1

    async def read(self, receive: Receive) -> bytes:
        """All of it. Kept in pieces and joined once, a large one in a thread.

        Raises ClientGone, BodyTimeout, Overloaded, and PayloadTooLarge as soon as `limit` is passed.
        """
        if self._declared > self._limit:
            raise self._too_large()
        if not self._bodies.fits(self._declared):
            raise self._bodies.overloaded()
        self._task = task = asyncio.current_task()
        self._bodies.watch(self)
        pieces: list[bytes | bytearray] = []
        try:
            await self._read(receive, pieces)
            if self.size <= _JOINED_HERE_BYTES:
                return b"".join(pieces)
            joining = asyncio.get_running_loop().run_in_executor(_JOINER, _joined, pieces)
            pieces = []  # they are the thread's
            return await joining
        except asyncio.CancelledError:
            if self._error is None or task is None:
                raise
            task.uncancel()
        finally:
            self._task = None
            self._bodies.forget(self)
            pieces.clear()  # An error keeps this frame alive.
        error, self._error = self._error, None
        try:
            raise error
        finally:
            del error

    async def _read(self, receive: Receive, pieces: list[bytes | bytearray]) -> None:
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            more = message.get("more_body", False)
            if self.size + len(part) > self._limit:
                raise self._too_large()
            self._last = time.monotonic()
            self._bodies.take(self, len(part))
            if not pieces or len(part) >= _PIECE_BYTES:
                pieces.append(part)
                continue
            last = pieces[-1]
            if isinstance(last, bytes):
                pieces.append(last := bytearray())
            last += part
            if len(last) >= _PIECE_BYTES:
                pieces[-1] = bytes(last)

    def keep(self, size: int) -> None:
        """Of one that arrived whole, `size` bytes are still held."""
        if size < self.size:
            self._bodies.held -= self.size - size
            self.size = size

    def release(self) -> None:
        """Safe to call twice."""
        self.settle()
        self._bodies.held -= self.size
        self.size = 0

    def fail(self, error: ServingError) -> None:
        if self._task is not None:
            self._error = error
            self._task.cancel()

    def cost(self) -> float:
        """Byte seconds that it may still hold: its rest at its pace, and once more as long as it has been silent.

        A body without a length counts as half complete.
        """
        now = time.monotonic()
        rest = self._declared - self.size if self._declared else self.size
        age = now - self._began
        pace = self.size / max(age, 0.01) if age < 2 * _SWEEP_SECONDS else self._pace
        return self.size * (max(rest, 1) / max(pace, 1.0) + now - self._last)

    def look(self, now: float) -> BodyTimeout | None:
        """Once a second: note its pace, and say whether it is too slow."""
        self._pace = (self._pace + self.size - self._at_sweep) / 2
        self._at_sweep = self.size
        if now - self._began > _PROMPT_SECONDS:
            self.settle()
        if now - self._began > self._longest:
            return BodyTimeout(
                f"the request's body took longer than {self._longest:.0f} s (predict_timeout); send less or faster"
            )
        seconds = now - self._window
        if seconds < FLOOR_SECONDS:
            return None
        if self.size - self._at_window < FLOOR_BYTES * FLOOR_SECONDS:
            return BodyTimeout(
                f"the request's body came slower than {FLOOR_BYTES} bytes/s for {seconds:.0f} s; send it again"
            )
        self._window, self._at_window = now, self.size
        return None

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(
            f"the request's body is larger than the {self._limit} bytes allowed (max_request_size)"
        )


def _joined(pieces: list[bytes | bytearray]) -> bytes:
    """The pieces as one, and none of them left. Python lets other threads run while it joins bytes, but not bytearrays;
    and between the pieces while they are freed."""
    pieces[:] = [bytes(piece) for piece in pieces]
    whole = b"".join(pieces)
    while pieces:
        pieces.pop()
    return whole


def declared_size(headers: Mapping[str, str]) -> int:
    """Content-Length, 0 where there is none."""
    declared = headers.get("content-length", "")
    return int(declared) if declared.isdecimal() else 0
