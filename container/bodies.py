"""Request bodies as they arrive: the memory of all of them, and which one is refused when it is short."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from container.exchange import ClientGone, Receive
from handlers.errors import Overloaded, PayloadTooLarge, ServingError, overloaded


def has_body(headers: Mapping[str, str]) -> bool:
    """Whether a request with these headers has a body."""
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def declared_size(headers: Mapping[str, str]) -> int:
    """Return the value of Content-Length; 0 if there is none."""
    declared = headers.get("content-length", "")
    return int(declared) if declared.isdecimal() else 0


FLOOR_BYTES = 1024
"""The slowest allowed rate of a body, per second, averaged over `FLOOR_SECONDS`; mobile networks are faster."""

FLOOR_SECONDS = 30.0

SWEEP_SECONDS = 1.0
"""The time between two looks at the pace of every body."""

_RESERVED_SECONDS = 2.0
"""How long a body that is still arriving may reserve a place for its answer; a slower one competes again."""

_PARTS_PER_ORDER = 16
"""The bodies are sorted by cost again after one use of their order for every 16 of them."""

_PIECE_BYTES = 256 * 1024
"""Parts smaller than this are joined as they arrive, since each object costs memory; larger ones are not copied."""

_JOINED_HERE_BYTES = 2**20
"""A larger body is joined in a thread: 60 MB would block the event loop for tens of milliseconds."""

_JOINER = ThreadPoolExecutor(1, "join-body")
"""One thread, so that only one body at a time is in memory twice."""

_PARTS_AT_ONCE = 4
"""Parts of up to 256 KiB that one pass of the event loop reads; each takes half a millisecond."""


class BodyTimeout(ServingError):
    """The body arrives too slowly, or takes too long altogether."""

    status = 408
    kind = "body_timeout"


class Bodies:
    """The memory of all request bodies, and its limit.

    A body is held from its arrival until its reply has ended, its images only until the engine has them. Bytes are
    counted as they arrive, never as they are declared: a client that declares much and sends nothing takes nothing
    from the others.

    Attributes:
        limit: Bytes that may be held, `option.request_memory_mb`; one body of the largest size always fits.
        held: Bytes that are held now.
        reserved: Places in the queue that are reserved for requests whose bodies are still arriving.
        refused: Requests that were refused for lack of memory.
        reading: Bodies that have not arrived completely.
    """

    def __init__(self, floor_seconds: float = FLOOR_SECONDS, sweep_seconds: float = SWEEP_SECONDS) -> None:
        """floor_seconds, sweep_seconds: see the constants."""
        self.limit = 0
        self.floor_seconds = floor_seconds
        self.sweep_seconds = sweep_seconds
        self.held = 0
        self.reserved = 0
        self.refused = 0
        self.reading: set[Body] = set()
        self._arriving = 0  # bytes of `reading`
        self._order: list[Body] = []  # by cost, the costliest last
        self._uses = 0
        self._timer: asyncio.TimerHandle | None = None
        self._asked = 0  # parts, in this pass of the event loop
        self._turns: deque[asyncio.Future[None]] = deque()

    async def turn(self) -> None:
        """Wait until a body may be asked for its next part.

        With many large bodies at once, one pass of the event loop would otherwise read a part of each, and nothing else
        would run for tens of milliseconds.
        """
        loop = asyncio.get_running_loop()
        if self._asked == 0:
            loop.call_soon(self._next_pass)
        self._asked += 1
        if self._asked > _PARTS_AT_ONCE:
            turn = loop.create_future()
            self._turns.append(turn)
            await turn

    def _next_pass(self) -> None:
        given = 0
        while self._turns and given < _PARTS_AT_ONCE:
            turn = self._turns.popleft()
            if not turn.done():  # otherwise its request is gone
                turn.set_result(None)
                given += 1
        self._asked = given + len(self._turns)
        if self._asked:
            asyncio.get_running_loop().call_soon(self._next_pass)

    def fits(self, declared: int) -> bool:
        """Whether a body of `declared` bytes fits beside those that have arrived completely."""
        if self.held + declared <= self.limit:
            return True
        return self.held - self._arriving + declared <= self.limit

    def take(self, body: Body, size: int) -> None:
        """Count bytes of a body that is being read.

        When memory is short, the body is refused that would hold the most of it for the longest: its size times the
        time that its rest needs at its recent pace. So stalled bodies yield to fast ones and large ones to small ones,
        and a body that is nearly complete stays.

        Raises:
            Overloaded: This body itself costs the most, or has just been refused.
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
        """Return the body with the highest cost.

        The order is reused for a while (see `_PARTS_PER_ORDER`): computing the cost of thousands of bodies for every
        part would block the event loop.
        """
        self._uses += 1
        while self._order and self._order[-1] not in self.reading:
            self._order.pop()
        if not self._order or self._uses > len(self.reading) // _PARTS_PER_ORDER:
            self._order = sorted(self.reading, key=Body.cost)
            self._uses = 0
        return self._order[-1]

    def refuse(self, body: Body, error: ServingError) -> None:
        """Stop reading a body that another task awaits; that task raises the error."""
        self.forget(body)
        body.release()
        body.fail(error)

    def forget(self, body: Body) -> None:
        """Note that the body is no longer read. Safe to call twice."""
        if body in self.reading:
            self.reading.remove(body)
            self._arriving -= body.size

    def watch(self, body: Body) -> None:
        self.reading.add(body)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.sweep_seconds, self._sweep)

    def _sweep(self) -> None:
        now = time.monotonic()
        for body in list(self.reading):
            error = body.check_pace(now)
            if error is not None:
                self.refuse(body, error)
        self._timer = None
        self._order.clear()
        if self.reading:
            self._timer = asyncio.get_running_loop().call_later(self.sweep_seconds, self._sweep)

    def overloaded(self) -> Overloaded:
        """Count a refusal and return its error."""
        self.refused += 1
        return overloaded("the server holds as many bytes of requests as it may (option.request_memory_mb)")


class Body:
    """One request's body; call `release` when its content is no longer held. size: bytes of it that are held."""

    def __init__(self, bodies: Bodies, headers: Mapping[str, str], limit: int, longest: float) -> None:
        """limit: largest size in bytes. longest: seconds that reading may take."""
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
        self.reserved = False

    def reserve_place(self) -> None:
        """Reserve a place for its answer until `end_reservation`."""
        if not self.reserved:
            self.reserved = True
            self._bodies.reserved += 1

    def end_reservation(self) -> None:
        """Give up the reserved place, if there is one: the request is in the queue now, or has failed."""
        if self.reserved:
            self.reserved = False
            self._bodies.reserved -= 1

    async def read(self, receive: Receive) -> bytes:
        """Read the whole body. It is kept in pieces and joined once, a large one in a thread.

        Raises:
            ClientGone: The client closed the connection.
            BodyTimeout: The body arrives too slowly or takes too long.
            Overloaded: There is no memory for it.
            PayloadTooLarge: It is larger than the limit; raised as soon as that is known.
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
            pieces = []  # the thread frees them
            return await joining
        except asyncio.CancelledError:
            if self._error is None or task is None:
                raise
            task.uncancel()
        finally:
            self._task = None
            self._bodies.forget(self)
            _free(pieces)  # An error keeps this frame alive.
        error, self._error = self._error, None
        try:
            raise error
        finally:
            del error

    async def _read(self, receive: Receive, pieces: list[bytes | bytearray]) -> None:
        more = True
        while more:
            if self.size:  # otherwise its first part was read together with the head
                await self._bodies.turn()
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
        """Note that only `size` bytes of a complete body are still held."""
        if size < self.size:
            self._bodies.held -= self.size - size
            self.size = size

    def release(self) -> None:
        """Release its memory and its place in the queue. Safe to call twice."""
        self.end_reservation()
        self._bodies.held -= self.size
        self.size = 0

    def fail(self, error: ServingError) -> None:
        if self._task is not None:
            self._error = error
            self._task.cancel()

    def cost(self) -> float:
        """Return the byte seconds that this body is expected to hold.

        That is its size times the time until the rest has arrived, plus the time since the client last sent
        anything. A body without a declared length counts as half complete.
        """
        now = time.monotonic()
        rest = self._declared - self.size if self._declared else self.size
        age = now - self._began
        pace = self.size / max(age, 0.01) if age < 2 * self._bodies.sweep_seconds else self._pace
        return self.size * (max(rest, 1) / max(pace, 1.0) + now - self._last)

    def check_pace(self, now: float) -> BodyTimeout | None:
        """Measure its pace; called once a second. Returns an error if the body is too slow."""
        self._pace = (self._pace + self.size - self._at_sweep) / 2
        self._at_sweep = self.size
        if now - self._began > _RESERVED_SECONDS:
            self.end_reservation()
        if now - self._began > self._longest:
            return BodyTimeout(
                f"the request's body took longer than {self._longest:.0f} s (predict_timeout); send less or faster"
            )
        seconds = now - self._window
        if seconds < self._bodies.floor_seconds:
            return None
        if self.size - self._at_window < FLOOR_BYTES * self._bodies.floor_seconds:
            return BodyTimeout(
                f"the request's body came slower than {FLOOR_BYTES} bytes/s for {seconds:.0f} s; send it again"
            )
        self._window, self._at_window = now, self.size
        return None

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"the request's body is larger than the {self._limit} bytes allowed (max_request_size)")


def _joined(pieces: list[bytes | bytearray]) -> bytes:
    """Join the pieces and free them.

    Other threads can run while bytes are joined, but not while bytearrays are; they can also run between two pieces
    that are freed.
    """
    pieces[:] = [bytes(piece) for piece in pieces]
    whole = b"".join(pieces)
    _drop(pieces)
    return whole


def _free(pieces: list[bytes | bytearray]) -> None:
    """Free the memory of a body that was not read to its end; many large ones are freed in a thread."""
    if sum(map(len, pieces)) > _JOINED_HERE_BYTES:
        _JOINER.submit(_drop, list(pieces))
    pieces.clear()


def _drop(pieces: list[bytes | bytearray]) -> None:
    """Free the pieces one by one, so that other threads can run in between."""
    while pieces:
        pieces.pop()
