"""The process of one model: the server as it serves a single model, on a Unix socket that the parent alone opens."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import cast

import msgspec

from container.config import configured
from container.logs import LogFormat, LogLevel, logging_to
from container.models.messages import Answer, Failure, Ready, Start
from container.server import LoadFailed, Server
from handlers.errors import InvalidConfiguration, ServingError
from processes.inside import Parent
from processes.shortage import shortage
from properties.configuration import Configuration
from properties.problem import ConfigurationError

logger = logging.getLogger(__name__)

_BACKLOG = 2048
_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "memoryerror")
"""In messages of torch, CUDA and vLLM, whose exceptions have no class of their own for this, and of other processes."""


def main() -> None:
    """Serve the model that the parent names until the parent closes the connection."""
    parent = Parent()
    question = parent.receive()
    if question is None:
        return
    order = msgspec.json.decode(question, type=Start)
    form, level = cast(LogFormat, order.log_format), cast(LogLevel, order.log_level)
    with logging_to(form=form, level=level, model=order.name):
        status = _serve(order, parent)
    sys.stdout.flush()
    os._exit(status)  # Unloading torch takes seconds, and a thread still reads the connection.


def configuration_of(order: Start, environ: Mapping[str, str]) -> Configuration:
    """Return the options of a model's server. Raises ConfigurationError."""
    defaults = {"served_model_name": order.name, "page": "false"}
    found = configured(order.directory, order.options, environ, defaults)
    # Memory is for as many models as possible: no spare process of each, and one replica.
    return found.with_default("spare_engine", False).with_default("min_workers", 1)


def _serve(order: Start, parent: Parent) -> int:
    import uvloop

    def answer(message: Answer) -> None:
        parent.send(msgspec.json.encode(message))

    try:
        configuration = configuration_of(order, os.environ)
    except ConfigurationError as error:
        answer(Failure.of_configuration(error))
        return 1
    for problem in configuration.warnings:
        logger.warning("%s", problem)

    async def run() -> int:
        with suppress(FileNotFoundError):  # left by an earlier process of this model
            os.unlink(order.socket)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(order.socket)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
        server = Server(configuration, listener=listener, ready=lambda: answer(Ready()))
        threading.Thread(
            target=_until_the_parent_ends, args=(parent, asyncio.get_running_loop(), server), daemon=True
        ).start()
        status = await server.run()
        if server.failure is not None:
            with suppress(OSError):  # the parent is gone
                answer(_failure(server.failure))
        return status

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


def _until_the_parent_ends(parent: Parent, loop: asyncio.AbstractEventLoop, server: Server) -> None:
    while parent.receive() is not None:
        pass
    loop.call_soon_threadsafe(server.request_stop)


def _failure(error: BaseException) -> Failure:
    if isinstance(error, ConfigurationError):
        return Failure.of_configuration(error)
    if shortage(error) == "memory" or any(text in str(error).lower() for text in _NO_MEMORY):
        return Failure("there was not enough memory to load the model", 507)
    if isinstance(error, InvalidConfiguration):
        return Failure(error.message, 400)
    if isinstance(error, LoadFailed | ServingError):
        return Failure(str(error), 500)
    return Failure("the model could not be loaded; the log says why", 500)


if __name__ == "__main__":
    main()
