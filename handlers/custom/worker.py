"""The process of the user's handler: `python -m handlers.custom.worker FD`, where FD is the socket to the server.

The first message on the socket is the `Start`. Then calls arrive and answers are sent. The process ends when the server
is gone, for whatever reason.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import logging
import os
import queue
import sys
import threading
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from handlers.custom import djl
from handlers.custom.messages import (
    MAX_PART_BYTES,
    Call,
    Cancel,
    End,
    Failed,
    FromHandler,
    Head,
    LoadFailed,
    Part,
    Ready,
    Start,
    ToHandler,
)
from processes.inside import Parent

logger = logging.getLogger("handlers.custom")

_OUT_OF_MEMORY = ("MemoryError", "OutOfMemoryError")


class HandlerError(Exception):
    """The handler cannot be used; the message is for the operator."""


class Channel:
    """The handler's end of the connection. One thread reads; any thread may send."""

    def __init__(self, parent: Parent) -> None:
        self._parent = parent
        self._decoder = msgspec.msgpack.Decoder(ToHandler)

    def start(self) -> Start:
        return msgspec.msgpack.decode(self._parent.receive() or b"", type=Start)

    def send(self, message: FromHandler) -> None:
        self._parent.send(msgspec.msgpack.encode(message))

    def read(self, on_call: Callable[[Call], None], on_cancel: Callable[[int], None]) -> None:
        """Read until the server is gone; then end this process, even if it is busy."""
        try:
            while (frame := self._parent.receive()) is not None:
                message = self._decoder.decode(frame)
                if isinstance(message, Cancel):
                    on_cancel(message.id)
                else:
                    on_call(message)
        finally:
            os._exit(0)


def load(start: Start) -> Callable[[djl.Input], Any]:
    """Import the user's file and return its function. Raises whatever the file raises, and HandlerError."""
    os.chdir(start.directory)
    djl.install()
    path = Path(start.directory, start.file)
    sys.path[:0] = dict.fromkeys([str(path.parent), start.directory])
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise HandlerError(f"{start.file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    if start.function is None:
        return formatting(vars(module), start)
    function = getattr(module, start.function, None)
    if not callable(function):
        raise HandlerError(f"{start.file} defines no function {start.function!r}")
    return adapted(function) if start.standard else function


def formatting(members: dict[str, Any], start: Start) -> Callable[[djl.Input], Any]:
    """Return a handler that calls the formatter that a call names. Raises HandlerError."""
    found: dict[str, Callable[..., Any]] = {}
    for member in members.values():
        kind = getattr(member, djl.FORMATTER, None)
        if kind is not None and found.setdefault(kind, member) is not member:
            raise HandlerError(f"{start.file} has two functions with @{kind}_formatter")
    if not found:
        raise HandlerError(f"{start.file}: formatters are those of djl_python.input_parser and .output_formatter")
    more: dict[str, Any] = {}
    if "input" in found and "tokenizer" in inspect.signature(found["input"]).parameters:
        from transformers import AutoTokenizer

        more["tokenizer"] = AutoTokenizer.from_pretrained(start.properties["model_id"])

    def handle(inputs: djl.Input) -> Any:
        if inputs.is_empty():
            return None
        body = inputs.get_as_bytes() or b""
        asked = inputs.get_property("formatter")
        if asked == "input":
            changed = found["input"](json.loads(body), **more)
            if not isinstance(changed, dict):
                raise TypeError(f"the input formatter returned {type(changed).__name__}, not a dict")
            return changed
        given = djl.response_of(body) if asked == "output" else body.decode()
        changed = found["output"](given)
        if callable(dump := getattr(changed, "model_dump", None)):
            changed = dump()
        lines = asked == "event" and isinstance(changed, dict | list)
        return djl.to_json(changed) + b"\n" if lines else changed

    return handle


def adapted(function: Callable[..., Any]) -> Callable[[djl.Input], Awaitable[Any]]:
    """Return a handler in DJL's style that calls one written for AWS's vLLM and SGLang images. Raises ImportError.

    Such a handler (of the package model-hosting-container-standards) is called with Starlette's request, and returns a
    response of Starlette's or a value that becomes JSON. The handler's requirements.txt installs Starlette.
    """
    try:
        from starlette.exceptions import HTTPException
        from starlette.requests import Request
        from starlette.responses import Response
    except ImportError as error:
        raise ImportError("it needs fastapi or starlette: name one in requirements.txt") from error
    asynchronous = inspect.iscoroutinefunction(function)
    takes_request = bool(inspect.signature(function).parameters)

    async def handle(inputs: djl.Input) -> Any:
        if inputs.is_empty():
            return None
        given = [_request(Request, inputs)] if takes_request else []
        try:
            result = await (function(*given) if asynchronous else asyncio.to_thread(function, *given))
        except HTTPException as error:
            return djl.Output().error(str(error.detail), error.status_code)
        return _output(result) if isinstance(result, Response) else result

    return handle


def _request(kind: Any, inputs: djl.Input) -> Any:
    headers = [
        (name.lower().encode("latin-1"), value.encode("latin-1", "replace"))
        for name, value in inputs.get_properties().items()
    ]
    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": "/invocations",
        "raw_path": b"/invocations", "root_path": "", "query_string": b"", "headers": headers, "state": {},
    }  # fmt: skip
    body = inputs.get_as_bytes() or b""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return kind(scope, receive)


def _output(response: Any) -> djl.Output:
    output = djl.Output(response.status_code)
    output.properties.update(response.headers)
    stream = getattr(response, "body_iterator", None)
    if stream is None:
        return output.add(response.body)
    return output.add_stream_content(stream, lambda part: part if isinstance(part, str) else bytes(part))


def input_of(start: Start, call: Call | None = None) -> djl.Input:
    """Return the input of a call; without one, that of the first, empty call, in which a handler loads its model."""
    inputs = djl.Input()
    inputs.function_name = start.function
    inputs.properties.update(start.properties if call is None else call.properties)
    if call is not None:
        inputs.content.add("data", call.body)
    return inputs


def check_first(result: Any) -> None:
    """Raise HandlerError if the handler refused its first, empty call."""
    if isinstance(result, djl.Output) and result.code >= 400:
        text = b" ".join(result.content.values).decode(errors="replace")
        raise HandlerError(f"its first, empty call was answered {result.code}: {result.message} {text}")


def serve_one_by_one(channel: Channel, start: Start, function: Callable[[djl.Input], Any]) -> None:
    """Answer calls in the order in which they arrive, in this thread."""
    check_first(function(input_of(start)))
    calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
    cancelled: deque[int] = deque(maxlen=1)  # the last one; calls come one at a time
    threading.Thread(target=channel.read, args=(calls.put, cancelled.append), daemon=True).start()
    channel.send(Ready(concurrent=False))
    while True:
        call = calls.get()
        try:
            for message in answer(call.id, function(input_of(start, call))):
                channel.send(message)
                if call.id in cancelled:
                    break
            channel.send(End(call.id))
        except Exception as error:
            channel.send(failed(call.id, error))


async def serve_together(channel: Channel, start: Start, function: Callable[[djl.Input], Any]) -> None:
    """Answer each call in a task of its own."""
    check_first(await _result(function(input_of(start))))
    loop = asyncio.get_running_loop()
    tasks: dict[int, asyncio.Task[None]] = {}

    async def run(call: Call) -> None:
        try:
            result = await _result(function(input_of(start, call)))
            async for message in answer_async(call.id, result):
                channel.send(message)
            channel.send(End(call.id))
        except asyncio.CancelledError:
            channel.send(End(call.id))
        except Exception as error:
            channel.send(failed(call.id, error))
        finally:
            tasks.pop(call.id, None)

    def on_call(call: Call) -> None:
        tasks[call.id] = loop.create_task(run(call))

    def on_cancel(number: int) -> None:
        if (task := tasks.get(number)) is not None:
            task.cancel()

    threading.Thread(
        target=channel.read,
        args=(
            lambda call: loop.call_soon_threadsafe(on_call, call),
            lambda number: loop.call_soon_threadsafe(on_cancel, number),
        ),
        daemon=True,
    ).start()
    channel.send(Ready(concurrent=True))
    await asyncio.Event().wait()


async def _result(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


class ReplyTooLarge(Exception):
    """A reply, or a part of one, is too large. The message is also for the client."""


def answer(number: int, result: Any) -> Iterator[FromHandler]:
    """Yield the messages of an answer, except for the last one."""
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
        yield from messages_of(number, item, output, first=not begun)
        begun = True
    if not begun:
        yield head(number, djl.Output(204))


async def answer_async(number: int, result: Any) -> AsyncIterator[FromHandler]:
    """Do the same for an asynchronous handler, whose streams may be of either kind."""
    output = as_output(result)
    if not isinstance(output.stream_content, AsyncIterable):
        for message in answer(number, result):
            yield message
        return
    begun = output is result
    if begun:
        yield head(number, output)
    async for item in output.stream_content:
        for message in messages_of(number, item, output, first=not begun):
            yield message
        begun = True
    if not begun:
        yield head(number, djl.Output(204))


def messages_of(number: int, item: Any, stream: djl.Output, *, first: bool) -> Iterator[FromHandler]:
    """Yield an item of a stream. first: the reply begins with it, so an Output sets status and headers."""
    if first:
        if isinstance(item, djl.Output):
            stream.code, stream.properties = item.code, item.properties
        yield head(number, stream)
    yield part(number, formatted(item, stream), "part of its stream")


def whole(number: int, output: djl.Output) -> Iterator[FromHandler]:
    """Yield the messages of a reply that is not a stream. Raises TypeError and ReplyTooLarge."""
    if output.content.size() > 1:
        raise TypeError(f"the output holds {output.content.size()} contents; a reply can hold one")
    parts = [part(number, bytes(value), "reply") for value in output.content.get_values()]
    yield head(number, output)
    yield from parts


def part(number: int, data: bytes, what: str) -> Part:
    """Make a message. Raises ReplyTooLarge, since the server would hold the data in memory, too."""
    if len(data) > MAX_PART_BYTES:
        raise ReplyTooLarge(
            f"a {what} of {len(data)} bytes is larger than {MAX_PART_BYTES} bytes, the most that is sent on; "
            "stream it in smaller parts"
        )
    return Part(number, data)


def as_output(result: Any) -> djl.Output:
    """Wrap what a handler returned in an Output, unless it is one. Raises TypeError."""
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


def head(number: int, output: djl.Output) -> Head:
    """Return the message with which the reply for an Output begins; 424 stands for a status that is not one."""
    code = output.code if isinstance(output.code, int) and 200 <= output.code <= 599 else 424
    properties = {str(name): str(value) for name, value in output.properties.items()}
    streams = output.stream_content is not None
    if streams and not any(name.lower() == "content-type" for name in properties):
        properties["content-type"] = "application/jsonlines"
    return Head(number, code, properties, streams)


def formatted(item: Any, output: djl.Output) -> bytes:
    """Return the bytes of one part of a stream."""
    if isinstance(item, djl.Output):
        return b"".join(item.content.get_values())
    if output.stream_formatter is not None:
        item = output.stream_formatter(item)
        if isinstance(item, str):
            return item.encode()
        return bytes(item) if isinstance(item, bytes | bytearray) else djl.to_json(item) + b"\n"
    return djl.to_json({"outputs": item}) + b"\n"


def failed(number: int, error: Exception) -> Failed:
    """Return the message for an exception of the handler: its class for the client; text and trace are only logged."""
    logger.error("the handler failed", exc_info=error)
    if isinstance(error, ReplyTooLarge):
        return Failed(number, 500, str(error))
    name = type(error).__name__
    return Failed(number, 507 if name in _OUT_OF_MEMORY else 424, name)


def main() -> int:
    """Load the handler and serve its calls until the server is gone; returns the exit code."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    parent = Parent()
    # Otherwise the end of this process would go unnoticed while a process that the handler forked is alive.
    os.register_at_fork(after_in_child=parent.close)
    channel = Channel(parent)
    start = channel.start()
    try:
        function = load(start)
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            asyncio.run(serve_together(channel, start, function))
        else:
            serve_one_by_one(channel, start, function)
    except BaseException as error:
        logger.error("%s cannot serve", start.file, exc_info=error)
        text = str(error) if isinstance(error, HandlerError) else f"{type(error).__name__}: {error}"
        channel.send(LoadFailed(f"{start.file}: {text}"))
        return 1
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # whatever threads the handler has left running
