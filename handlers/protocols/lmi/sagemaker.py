"""What SageMaker asks of a container beyond answers: its headers, stateful sessions, and batch transform.

A session is a name that SageMaker sends to the same instance again, where the prefixes and images of earlier turns are
still cached; the server keeps nothing but the name.

Batch transform sends JSON lines, each a request of its own, and gets a line for each in the same order. A mistake in a
line becomes an error on the line of its answer, so that it costs no other line. A failure of the server fails them all:
the platform then sends the same lines again, but would keep an error that it finds in a reply.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from msgspec import Struct

from handlers.errors import RETRY_AFTER, InvalidRequest, MalformedBody, Overloaded, PayloadTooLarge
from handlers.protocols.base import JSON, JSON_LINES
from handlers.protocols.body import shown_value
from handlers.request import Incoming, Reply, RequestFacts

if TYPE_CHECKING:
    from handlers.service import Service

INVOKE_ROUTES = frozenset({"/invocations", "/predictions/{model}", "/models/{model}/invoke"})
"""The routes on which LMI takes every schema."""

PREFIX = "x-amzn-sagemaker-"
_ADAPTER = f"{PREFIX}adapter-identifier"
_ATTRIBUTES = f"{PREFIX}custom-attributes"
ADAPTER_HEADERS = (_ADAPTER, _ATTRIBUTES)
_MOST_ATTRIBUTES = 1024
"""The most characters of the header: SageMaker's own limit."""


def accept_of(headers: Mapping[str, str]) -> str:
    """Return the media types that the client accepts, in lower case; empty if it does not say.

    Asynchronous and streamed invocations may name them in a header of SageMaker's own.

    Args:
        headers: With names in lower case.
    """
    return (headers.get("accept") or headers.get(f"{PREFIX}accept") or "").lower()


def adapter_of(incoming: Incoming) -> str | None:
    """Return the adapter that SageMaker's header, the query or a custom attribute names."""
    return request_properties(incoming).get(_ADAPTER) or None


def request_properties(incoming: Incoming) -> dict[str, str]:
    """Return the headers, and under other names the query's adapter and the custom attributes.

    Attributes have the form `name=value;name=value`; their names are read in lower case, as in LMI.
    """
    text = incoming.headers.get(_ATTRIBUTES, "")[:_MOST_ATTRIBUTES]
    pairs = (part.partition("=") for part in text.split(";") if "=" in part)
    attributes = {name.strip().lower(): value.strip() for name, _, value in pairs}
    queried = {_ADAPTER: incoming.query["adapter"]} if incoming.query.get("adapter") else {}
    return {**attributes, **queried, **incoming.headers}


MOST_SESSIONS = 100_000
"""Most sessions that are open at a time."""

_ID = "x-amzn-sagemaker-session-id"
_NEW = "NEW_SESSION"
_CLOSE = "CLOSE"
_MOST_BYTES = 128
"""Longest body that may open or close a session, `{"requestType": "NEW_SESSION"}`; few others are as short."""

_SCHEMAS = frozenset({"messages", "prompt", "inputs"})
"""Keys of bodies that ask for an answer."""


class SessionBody(Struct):
    """Opens or closes a session."""

    requestType: Literal["NEW_SESSION", "CLOSE"]


class SessionReply(Struct, forbid_unknown_fields=True):
    """Says what has been done."""

    result: str


class Sessions:
    """The open sessions of this server, in the order in which they end: each lasts equally long. See `Gate`."""

    routes: Collection[str] = INVOKE_ROUTES
    header = _ID

    def __init__(
        self,
        *,
        enabled: bool = True,
        expiration: float = 1200.0,
        most: int = MOST_SESSIONS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open no session yet.

        Args:
            enabled: Whether sessions may be opened.
            expiration: Seconds from a session's opening to its end, used or not.
            most: How many may be open at a time.
            clock: Returns seconds since 1970.
        """
        self._most = most
        self._enabled = enabled
        self._expiration = expiration
        self._clock = clock
        self._ends: dict[str, float] = {}

    def answer(self, body: Mapping[str, Any], incoming: Incoming) -> Reply | None:
        """Return the reply to a body that opens or closes a session; None for all others.

        Raises:
            InvalidRequest: The body, or the session that a header names, is not valid.
            Overloaded: Too many sessions are open.
        """
        named = incoming.headers.get(_ID, "")
        if incoming.route in INVOKE_ROUTES and "requestType" in body and not _SCHEMAS & body.keys():
            return self._control(body["requestType"], named)
        if named:
            self._require_enabled()
            self._find(named)
        return None

    def may_answer(self, size: int, content: bytes | None = None) -> bool:
        fits = self._enabled and 0 < size <= _MOST_BYTES
        return fits and (content is None or b'"requestType"' in content)

    def _control(self, asked: object, named: str) -> Reply:
        if asked not in (_NEW, _CLOSE):
            raise InvalidRequest(
                f"requestType is {shown_value(asked)}; allowed: {_NEW!r}, {_CLOSE!r}", param="requestType"
            )
        self._require_enabled()
        return self._open() if asked == _NEW else self._close(named)

    def _open(self) -> Reply:
        self._forget_ended()
        if len(self._ends) >= self._most:
            raise Overloaded("too many sessions are open: close some, or try again later", retry_after=60)
        name, end = str(uuid.uuid4()), self._clock() + self._expiration
        self._ends[name] = end
        expires = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(end))
        value = f"{name}; Expires={expires}"
        # SageMaker's guide names the first header, its own container standard the second.
        headers = {"X-Amzn-SageMaker-Session-Id": value, "X-Amzn-SageMaker-New-Session-Id": value}
        return _result(f"Session {name} created", headers)

    def _close(self, name: str) -> Reply:
        if not name:
            raise InvalidRequest("name the session to close in the header X-Amzn-SageMaker-Session-Id")
        self._find(name)
        del self._ends[name]
        return _result(f"Session {name} closed", {"X-Amzn-SageMaker-Closed-Session-Id": name})

    def _find(self, name: str) -> None:
        self._forget_ended()
        if name == _NEW:
            raise InvalidRequest(f'to open a session send {{"requestType": "{_NEW}"}}', param="requestType")
        if name not in self._ends:
            raise InvalidRequest(f"session not found, or expired: {name[:80]}")

    def _forget_ended(self) -> None:
        now = self._clock()
        while self._ends and self._ends[first := next(iter(self._ends))] <= now:
            del self._ends[first]

    def _require_enabled(self) -> None:
        if not self._enabled:
            raise InvalidRequest("this server keeps no sessions (option.enable_stateful_sessions)")


def _result(text: str, headers: dict[str, str]) -> Reply:
    return Reply(200, JSON, msgspec.json.encode(SessionReply(text)), headers=headers)


MOST_LINES = 10_000
MOST_REPLY_BYTES = 64 * 2**20

MOST_SECONDS = 3600.0
"""The time limit of all lines together: the longest that batch transform waits. Each line has `predict_timeout`."""

_TYPES = frozenset({JSON_LINES, "application/jsonl", "application/x-jsonlines", "application/x-ndjson"})
_LONGEST_BLANK = 4096
"""A longer line is a request whatever it holds: looking through all of it would hold up the event loop."""

_PAYLOAD_MB = 6
"""What batch transform sends at most where its user says nothing."""

_MOST_TOGETHER_MB = 100
"""What SageMaker allows MaxConcurrentTransforms times MaxPayloadInMB to be."""

_SUMS = ("images", "prompt_tokens", "image_tokens", "cached_tokens", "completion_tokens")


class ExecutionParameters(Struct, forbid_unknown_fields=True):
    """The reply to `/execution-parameters`: how batch transform sends records if its user does not say.

    One record a request: then a failure costs one record, and no request is longer than its record's answer.
    """

    MaxConcurrentTransforms: int
    BatchStrategy: str
    MaxPayloadInMB: int


class _Refused(Exception):
    """The reply that all lines get."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply


def are_lines(headers: Mapping[str, str]) -> bool:
    """Whether a body on one of `INVOKE_ROUTES` is JSON lines, by its declared type. headers: names in lower case."""
    return headers.get("content-type", "").partition(";")[0].strip().lower() in _TYPES


async def execution_parameters(service: Service, incoming: Incoming) -> Reply:
    """Answer `GET /execution-parameters`."""
    return execution_reply(service.settings.max_rolling_batch_size)


def execution_reply(most: int) -> Reply:
    """Return the reply to it. most: requests that the server works on at a time."""
    together = min(_MOST_TOGETHER_MB // _PAYLOAD_MB, most)
    return Reply(200, JSON, msgspec.json.encode(ExecutionParameters(together, "SINGLE_RECORD", _PAYLOAD_MB)))


async def answer_lines(
    incoming: Incoming,
    answer: Callable[[Incoming], Awaitable[Reply]],
    *,
    together: int,
    seconds: float,
    facts: RequestFacts,
) -> Reply:
    """Return the reply to a body of JSON lines; lines without anything but spaces are no requests.

    Args:
        incoming: The request.
        answer: Answers one line.
        together: The most lines that are answered at a time.
        seconds: How long a line waits for a place in the queue.
        facts: Filled in with the sums of the lines.

    Raises:
        InvalidRequest: There is no line, or there are too many.
        PayloadTooLarge: The answers are too large together.
    """
    body = incoming.take_body()
    if body.count(b"\n") > MOST_LINES:
        raise MalformedBody(
            f"the body has more than {MOST_LINES} lines; send fewer at a time (MaxPayloadInMB, or SingleRecord)"
        )
    together = min(together, 1 + body.count(b"\n"))
    lines = _lines(body)
    del body
    incoming.parsed()
    # A body's memory is the request's until all of it is answered.
    headers = {**incoming.headers, "content-type": JSON, "accept": JSON}
    alone: dict[str, Any] = {"headers": headers, "parsed": lambda: None, "keep": lambda _: None}
    answers: list[bytes] = []
    turn = asyncio.Lock()
    size = 0

    async def work() -> None:
        nonlocal size
        while True:
            async with turn:  # one line in each pass of the event loop: reading all at once would hold it up
                await asyncio.sleep(0)
                if (line := next(lines, None)) is None:
                    return
                number = len(answers)
                answers.append(b"")
            answers[number] = _one_line(await answered(line, number))
            size += len(answers[number])
            if size > MOST_REPLY_BYTES:
                raise PayloadTooLarge(
                    f"the answers have more than {MOST_REPLY_BYTES} bytes together; send fewer lines at a time"
                )

    async def answered(line: bytes, number: int) -> bytes:
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while True:
            reply = await answer(replace(incoming, body=line, request_id=f"{incoming.request_id}-{number}", **alone))
            if reply.status == 429 and loop.time() < end:
                await asyncio.sleep(RETRY_AFTER)
                continue
            if reply.status == 429 or reply.status >= 500:
                raise _Refused(reply)
            if reply.facts is not None:
                for name in _SUMS:
                    setattr(facts, name, getattr(facts, name) + getattr(reply.facts, name))
            return reply.body

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(together):
                group.create_task(work())
    except ExceptionGroup as failures:
        first = failures.exceptions[0]
        if isinstance(first, _Refused):
            return first.reply
        raise first from None
    if not answers:
        raise MalformedBody("the body has no line: send one JSON object on each")
    facts.status = 200
    return Reply(200, JSON_LINES, b"\n".join([*answers, b""]), facts=facts)


def _lines(body: bytes) -> Iterator[bytes]:
    """Yield the lines one by one: cutting a long body at once would hold up the event loop."""
    start = 0
    while start < len(body):
        end = body.find(b"\n", start)
        line = body[start : len(body) if end < 0 else end]
        start += len(line) + 1
        if len(line) > _LONGEST_BLANK or line.strip():
            yield line


def _one_line(body: bytes) -> bytes:
    """Return a reply without line ends; one that a formatter of the user's wrote may be any text."""
    body = body.strip()
    if b"\n" not in body:
        return body
    try:
        return msgspec.json.format(body, indent=-1)
    except msgspec.DecodeError:
        return msgspec.json.encode(body.decode(errors="replace"))
