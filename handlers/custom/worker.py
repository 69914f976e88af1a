"""The process of the user's handler: `python -m handlers.custom.worker FD`, where FD is the socket to the server.

The first message on the socket is the `Start`; then calls arrive and answers are sent. When the server is gone, for
whatever reason, the process ends.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from handlers.custom import djl
from handlers.custom.answers import ReplyTooLarge, answer, answer_async
from handlers.custom.messages import (
    Call,
    Cancel,
    End,
    Failed,
    FromHandler,
    LoadFailed,
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
        self.cancelled = 0
        """The last call that was cancelled; ids increase."""

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
        raise HandlerError(f"{start.file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    if start.function is None:
        return formatting(vars(module), start)
    function = getattr(module, start.function, None)
    if not callable(function):
        raise HandlerError(f"{start.file} defines no function {start.function!r}")
    return function  # type: ignore[no-any-return]


def formatting(members: dict[str, Any], start: Start) -> Callable[[djl.Input], Any]:
    """Return a handler that calls the formatter that a call names. Raises HandlerError."""
    found: dict[str, Callable[..., Any]] = {}
    for member in members.values():
        kind = getattr(member, djl.FORMATTER, None)
        if kind is not None and found.setdefault(kind, member) is not member:
            raise HandlerError(f"{start.file} has two functions with @{kind}_formatter")
    wants = "tokenizer" in inspect.signature(found["input"]).parameters if "input" in found else False
    more = {"tokenizer": _tokenizer(start)} if wants else {}

    def handle(inputs: djl.Input) -> Any:
        if inputs.is_empty():
            return None
        body = inputs.get_as_bytes() or b""
        asked = inputs.get_property("formatter")
        if asked == "input":
            changed = found["input"](json.loads(body), **more)
            if not isinstance(changed, dict):
                raise TypeError(f"the input formatter returned {type(changed).__name__}, no dict")
            return changed
        given = djl.response_of(body) if asked == "output" else body.decode()
        changed = found["output"](given)
        dump = getattr(changed, "model_dump", None)
        changed = changed if dump is None else dump()
        lines = asked == "event" and isinstance(changed, dict | list)
        return djl.to_json(changed) + b"\n" if lines else changed

    return handle


def _tokenizer(start: Start) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(start.properties["model_id"])


def is_concurrent(function: Callable[..., Any]) -> bool:
    """Whether calls of the function may overlap, because it is `async def`."""
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


def first_input(start: Start) -> djl.Input:
    """The empty call at start, in which a handler loads its model."""
    inputs = djl.Input()
    inputs.function_name = start.function
    inputs.properties.update(start.properties)
    return inputs


def input_of(call: Call, function: str | None) -> djl.Input:
    """Return what the handler is called with for one request."""
    inputs = djl.Input()
    inputs.function_name = function
    inputs.properties.update(call.properties)
    inputs.content.add("data", call.body)
    return inputs


def check_first(result: Any) -> None:
    """Raise HandlerError if the handler refused its first, empty call."""
    if isinstance(result, djl.Output) and result.code >= 400:
        text = b" ".join(result.content.values).decode(errors="replace")
        raise HandlerError(f"its first, empty call was answered {result.code}: {result.message} {text}")


def serve_one_by_one(channel: Channel, start: Start, function: Callable[[djl.Input], Any]) -> None:
    """Answer calls in the order in which they arrive, in this thread."""
    check_first(function(first_input(start)))
    calls: queue.SimpleQueue[Call] = queue.SimpleQueue()

    def on_cancel(number: int) -> None:
        channel.cancelled = number

    threading.Thread(target=channel.read, args=(calls.put, on_cancel), daemon=True).start()
    channel.send(Ready(concurrent=False))
    while True:
        call = calls.get()
        try:
            for message in answer(call.id, function(input_of(call, start.function))):
                channel.send(message)
                if channel.cancelled == call.id:
                    break
            channel.send(End(call.id))
        except Exception as error:
            channel.send(failed(call.id, error))


async def serve_together(channel: Channel, start: Start, function: Callable[[djl.Input], Any]) -> None:
    """Answer each call in a task of its own."""
    check_first(await _result(function(first_input(start))))
    loop = asyncio.get_running_loop()
    tasks: dict[int, asyncio.Task[None]] = {}

    async def run(call: Call) -> None:
        try:
            result = await _result(function(input_of(call, start.function)))
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
    # otherwise this process's end would go unnoticed while a process lives that the handler has forked
    os.register_at_fork(after_in_child=parent.close)
    channel = Channel(parent)
    start = channel.start()
    try:
        function = load(start)
        if is_concurrent(function):
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
