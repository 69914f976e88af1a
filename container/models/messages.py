"""What the server and its child processes say to each other: one question and one answer each, as JSON."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class Failure(msgspec.Struct, tag=True):
    """It cannot be done. message: for the client. status: of the HTTP reply."""

    message: str
    status: int


class Prepare(msgspec.Struct):
    """Asks for a model to be unpacked, fetched and measured.

    Attributes:
        source: A directory, or an archive.
        place: An empty directory that an archive is unpacked into.
        options: As of a command line, each NAME=VALUE.
    """

    source: str
    place: str
    options: list[str]


class Prepared(msgspec.Struct, tag=True):
    """A model that is on this machine, and what it takes. Sizes in bytes.

    Attributes:
        directory: The model's.
        host: Host memory, of all of its processes.
        devices: Number of an accelerator -> its memory that is taken.
        device_memory: All of an accelerator's memory.
    """

    directory: str
    host: int
    devices: Mapping[int, int] = {}
    device_memory: int = 0


class Start(msgspec.Struct):
    """Asks for a model to be served.

    Attributes:
        name: What requests call it.
        directory: The model's.
        socket: The path of the Unix socket to listen on.
        options: As of a command line, each NAME=VALUE.
        log_format: The option.
        log_level: The option.
    """

    name: str
    directory: str
    socket: str
    options: list[str]
    log_format: str
    log_level: str


class Ready(msgspec.Struct, tag=True):
    """The model answers requests."""


Answer = Failure | Prepared | Ready
