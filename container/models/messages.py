"""The messages between the server and the process of a model: one question and one answer, as JSON."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from properties.problem import ConfigurationError


class Failure(msgspec.Struct, tag=True):
    """Answers that it cannot be done. message: for the client. status: of the HTTP reply."""

    message: str
    status: int

    @classmethod
    def of_configuration(cls, error: ConfigurationError) -> Failure:
        """Return the answer for options with which the model cannot be served."""
        return cls("the model cannot be served: " + "; ".join(map(str, error.problems)), 400)


class Prepare(msgspec.Struct):
    """Asks to unpack, fetch and measure a model.

    Attributes:
        source: A directory, or an archive.
        place: An empty directory that an archive is unpacked into.
        options: As on a command line, each NAME=VALUE.
    """

    source: str
    place: str
    options: list[str]


class Prepared(msgspec.Struct, tag=True):
    """Answers that a model is on this machine, and what it needs, in bytes.

    Attributes:
        directory: The model's.
        host: The host memory of all its processes.
        devices: Number of an accelerator -> the memory that the model needs there.
        device_memory: The whole memory of one accelerator.
    """

    directory: str
    host: int
    devices: Mapping[int, int] = {}
    device_memory: int = 0


class Start(msgspec.Struct):
    """Asks to serve a model.

    Attributes:
        name: The model's name in requests.
        directory: The model's directory.
        socket: The path of the Unix socket to listen on.
        options: As on a command line, each NAME=VALUE.
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
    """Answers that the model can be asked."""


Answer = Failure | Prepared | Ready
