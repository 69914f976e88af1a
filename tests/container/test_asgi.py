"""One exchange without sockets: what ends it, and that nothing is left running or open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, MutableMapping
from typing import Any

import pytest

from container.exchange import Exchange
from handlers.request import Reply

Message = MutableMapping[str, Any]


class Wire:
    """The server's side of ASGI: `gone` set means that the client left."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.sent: list[Message] = []
        self.first_part = asyncio.Event()

    async def receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        if message["type"] == "http.response.body":
            self.first_part.set()


class Stream:
    """One part, then silence."""

    def __init__(self) -> None:
        self.closed = False
        self.given = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self.given:
            await asyncio.Event().wait()
        self.given = True
        return b"part"

    async def aclose(self) -> None:
        self.closed = True


def run(work: Coroutine[Any, Any, None]) -> None:
    """All tasks but the test's own must have ended with it."""

    async def main() -> None:
        await asyncio.wait_for(work, 5)
        await asyncio.sleep(0)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left

    asyncio.run(main())


async def ready(reply: Reply) -> Reply:
    return reply


def test_a_whole_reply_has_a_length_and_no_control_characters_in_its_headers() -> None:
    async def check() -> None:
        wire = Wire()
        exchange = Exchange(wire.receive, wire.send)
        reply = Reply(200, "application/json", b"{}", headers={"X-Odd": "a\r\nSet-Cookie: b"})
        await exchange.run(ready(reply), {}, longest=5, pause=5)
        start, body = wire.sent
        assert (b"content-length", b"2") in start["headers"]
        assert (b"x-odd", b"aSet-Cookie: b") in start["headers"]
        assert body == {"type": "http.response.body", "body": b"{}", "more_body": False}
        assert exchange.ending is None

    run(check())


def test_a_client_that_leaves_closes_the_stream() -> None:
    async def check() -> None:
        wire, stream = Wire(), Stream()
        exchange = Exchange(wire.receive, wire.send)
        running = asyncio.create_task(
            exchange.run(ready(Reply(200, "text/plain", chunks=stream)), {}, longest=5, pause=5)
        )
        await wire.first_part.wait()
        wire.gone.set()
        await running
        assert stream.closed
        assert exchange.ending == "client_gone"

    run(check())


def test_a_silent_stream_and_an_answer_that_never_comes_are_ended() -> None:
    async def check() -> None:
        wire, stream = Wire(), Stream()
        exchange = Exchange(wire.receive, wire.send)
        await exchange.run(ready(Reply(200, "text/plain", chunks=stream)), {}, longest=5, pause=0.02)
        assert stream.closed
        assert exchange.ending == "stalled"
        never: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        exchange = Exchange(wire.receive, wire.send)
        await exchange.run(never, {}, longest=0.02, pause=5)
        assert never.cancelled()
        assert (exchange.ending, exchange.status) == ("overdue", 0)

    run(check())


def test_a_cancellation_from_outside_stays_one() -> None:
    async def check() -> None:
        wire, stream = Wire(), Stream()
        exchange = Exchange(wire.receive, wire.send)
        running = asyncio.create_task(
            exchange.run(ready(Reply(200, "text/plain", chunks=stream)), {}, longest=5, pause=5)
        )
        await wire.first_part.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert stream.closed

    run(check())


def test_an_unexpected_error_of_the_handlers_comes_through() -> None:
    async def fails() -> Reply:
        raise RuntimeError("oops")

    async def check() -> None:
        wire = Wire()
        with pytest.raises(RuntimeError, match="oops"):
            await Exchange(wire.receive, wire.send).run(fails(), {}, longest=5, pause=5)
        assert not wire.sent

    run(check())
