"""From what a handler returned to the messages of its answer, in the handler's process."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import Any

from handlers.custom import djl
from handlers.custom.messages import MOST_PART_BYTES, FromHandler, Head, Part


class ReplyTooLarge(Exception):
    """The message is for the client too."""


def answer(number: int, result: Any) -> Iterator[FromHandler]:
    """The messages of an answer, but for its end."""
    output = as_output(result)
    if output.stream_content is None:
        yield from whole(number, output)
        return
    if not isinstance(output.stream_content, Iterable):
        raise TypeError("an asynchronous stream needs an asynchronous handler")
    begun = output is result
    if begun:
        yield head(number, output)
    for item in output.stream_content:
        if not begun:
            begun = True
            yield head_of_generated(number, item, output)
        yield part(number, formatted(item, output), "part of its stream")
    if not begun:
        yield head(number, djl.Output(204))


async def answer_async(number: int, result: Any) -> AsyncIterator[FromHandler]:
    """The same for an asynchronous handler, whose streams may be either kind."""
    output = as_output(result)
    if not isinstance(output.stream_content, AsyncIterable):
        for message in answer(number, result):
            yield message
        return
    begun = output is result
    if begun:
        yield head(number, output)
    async for item in output.stream_content:
        if not begun:
            begun = True
            yield head_of_generated(number, item, output)
        yield part(number, formatted(item, output), "part of its stream")
    if not begun:
        yield head(number, djl.Output(204))


def whole(number: int, output: djl.Output) -> Iterator[FromHandler]:
    """Yield the messages of a reply that is not a stream. Raises TypeError and ReplyTooLarge."""
    if output.content.size() > 1:
        raise TypeError(f"the output holds {output.content.size()} contents; a reply can hold one")
    parts = [part(number, bytes(value), "reply") for value in output.content.get_values()]
    yield head(number, output)
    yield from parts


def part(number: int, data: bytes, what: str) -> Part:
    """Raises ReplyTooLarge: it would be held in the server's memory too."""
    if len(data) > MOST_PART_BYTES:
        raise ReplyTooLarge(
            f"a {what} of {len(data)} bytes is larger than {MOST_PART_BYTES} bytes, the most that is sent on; "
            "stream it in smaller parts"
        )
    return Part(number, data)


def as_output(result: Any) -> djl.Output:
    """What handlers return, also without an Output around it. Raises TypeError."""
    if isinstance(result, djl.Output):
        return result
    if result is None:
        return djl.Output(204, "No content")
    if isinstance(result, dict | list | int | float | bool):
        return djl.Output().add_as_json(result)
    if isinstance(result, str):
        return djl.Output().add_property("content-type", "text/plain; charset=utf-8").add(result)
    if isinstance(result, bytes):
        return djl.Output().add(result)
    if isinstance(result, Iterator | AsyncIterator):
        return djl.Output().add_stream_content(result, lambda item: item)
    raise TypeError(f"the handler returned {type(result).__name__}; return an Output")


def head_of_generated(number: int, first: Any, stream: djl.Output) -> Head:
    """Of a handler that is a generator: its first Output says status and headers."""
    if isinstance(first, djl.Output):
        stream.code, stream.properties = first.code, first.properties
    return head(number, stream)


def head(number: int, output: djl.Output) -> Head:
    """Return the message with which the reply for an Output begins; 424 stands for a status that is not one."""
    code = output.code if isinstance(output.code, int) and 200 <= output.code <= 599 else 424
    properties = {str(name): str(value) for name, value in output.properties.items()}
    streams = output.stream_content is not None
    if streams and not any(name.lower() == "content-type" for name in properties):
        properties["content-type"] = "application/jsonlines"
    return Head(number, code, properties, streams)


def formatted(item: Any, output: djl.Output) -> bytes:
    """One part of a stream."""
    if isinstance(item, djl.Output):
        return b"".join(item.content.get_values())
    if output.stream_formatter is not None:
        item = output.stream_formatter(item)
        if isinstance(item, str):
            return item.encode()
        return bytes(item) if isinstance(item, bytes | bytearray) else djl.to_json(item) + b"\n"
    return djl.to_json({"outputs": item}) + b"\n"
