"""SageMaker's batch transform: bodies of JSON lines.

Each line is a request of its own, and is answered by a line of the reply, in the same order. A client's mistake in a
line is answered by an error on its line; the other lines are answered as usual. A failure of the server fails the whole
body: the platform then sends the same lines again, whereas it would keep an error that it finds in a reply.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from handlers.errors import RETRY_AFTER, MalformedBody, PayloadTooLarge
from handlers.protocols.base import JSON, JSON_LINES
from handlers.request import Incoming, Reply, RequestFacts

if TYPE_CHECKING:
    from handlers.service import Service

MOST_LINES = 10_000
MOST_REPLY_BYTES = 64 * 2**20

MOST_SECONDS = 3600.0
"""The time limit of all lines together: the longest that batch transform waits. Each line has `predict_timeout`."""

_TYPES = frozenset({JSON_LINES, "application/jsonl", "application/x-jsonlines", "application/x-ndjson"})
_LONGEST_BLANK = 4096
"""A longer line counts as a request even if it is blank: looking through all of it would hold up the event loop."""

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
