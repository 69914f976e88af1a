"""A lean HTTP/1.1 client for streamed chat replies, so that the load costs the server little of the machine."""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass, field
from typing import cast

import httptools
import msgspec


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw(b"")


_decode = msgspec.json.Decoder(_Event).decode


@dataclass
class Reply:
    """The reply to one request; times are seconds on ``time.perf_counter``'s clock."""

    start: float
    status: int = 0  # 0: the connection failed
    contents: list[float] = field(default_factory=list)  # arrival of every chunk that carried content
    end: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""

    @property
    def ok(self) -> bool:
        return self.status == 200 and not self.error

    @property
    def outcome(self) -> str:
        """The status as text, "200" only for a whole reply, or what went wrong in the stream."""
        if self.status != 200:
            return str(self.status or "connection")
        return "200" if self.ok else "broken stream"


class Connection(asyncio.Protocol):
    """One keep-alive connection, one request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.usable = False
        self._parser = httptools.HttpResponseParser(self)
        self._reply: Reply | None = None
        self._done: asyncio.Future[None] | None = None
        self._rest = b""
        self._now = 0.0

    async def send(self, request: bytes, reply: Reply, patience: float) -> None:
        """Send one whole HTTP request and fill in its reply, read to the end; never raises."""
        assert self.transport is not None
        self._reply = reply
        self._rest = b""
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        try:
            await asyncio.wait_for(self._done, patience)
        except TimeoutError:
            self._fail(f"no complete reply within {patience:g} s")
            self.close()
        if reply.status == 200 and not reply.error and not reply.completion_tokens:
            reply.error = "the stream ended without its usage"

    def close(self) -> None:
        self.usable = False
        if self.transport is not None:
            self.transport.abort()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.usable = True

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"not HTTP: {error}")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        self._fail(f"connection lost: {exc}" if exc else "connection closed")

    # httptools' side

    def on_body(self, body: bytes) -> None:
        reply = self._reply
        assert reply is not None
        reply.status = self._parser.get_status_code()
        if reply.status != 200:
            reply.error = (reply.error + body.decode(errors="replace"))[:500]
            return
        *lines, self._rest = (self._rest + body).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(reply, line[5:].strip())

    def on_message_complete(self) -> None:
        if self._reply is not None:
            self._reply.status = self._parser.get_status_code()
        self.usable = self._parser.should_keep_alive()
        self._finish()

    def _event(self, reply: Reply, data: bytes) -> None:
        if data == b"[DONE]":
            return
        try:
            event = _decode(data)
        except msgspec.MsgspecError as error:
            reply.error = f"an event of the stream is not OpenAI's: {error}"
            return
        if event.error and bytes(event.error) != b"null":
            reply.error = bytes(event.error).decode(errors="replace")[:500]
        if event.usage is not None:
            reply.prompt_tokens = event.usage.prompt_tokens
            reply.completion_tokens = event.usage.completion_tokens
        for choice in event.choices:
            delta = choice.delta
            if delta.content or delta.reasoning or delta.reasoning_content:
                reply.contents.append(self._now)

    def _fail(self, why: str) -> None:
        if self._done is not None and not self._done.done():
            assert self._reply is not None
            self._reply.error = why
            self._finish()

    def _finish(self) -> None:
        if self._done is not None and not self._done.done():
            assert self._reply is not None
            self._reply.end = time.perf_counter()
            self._done.set_result(None)


class Connections:
    """A pool of keep-alive connections to one server, grown as needed."""

    def __init__(self, host: str, port: int, tls: bool = False, patience: float = 300.0) -> None:
        self._host, self._port, self._patience = host, port, patience
        self._tls = ssl.create_default_context() if tls else None
        self._idle: list[Connection] = []

    async def send(self, request: bytes, reply: Reply) -> None:
        """Send one request and fill in its reply as it arrives; never raises.

        The reply's ``start`` is when the request is sent or, for a load that arrives at a rate, was due.
        """
        try:
            connection = await self._connection()
        except OSError as error:
            reply.error, reply.end = str(error), time.perf_counter()
            return
        await connection.send(request, reply, self._patience)
        if connection.usable:
            self._idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _connection(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self._host, self._port, ssl=self._tls)
        return connection
