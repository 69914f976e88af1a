"""The messages between the server and a process of the user's handler: msgpack in length-prefixed frames."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

MAX_PART_BYTES = 64 << 20
"""Greatest size of a whole reply, or of one part of a stream."""


class Start(msgspec.Struct, tag=True):
    """The first message to the handler's process.

    Attributes:
        directory: The model's directory, absolute.
        file: The handler's file in it.
        function: The function's name; None for formatters, which are called by the name in the property "formatter".
        properties: The options, as the handler's first, empty call gets them.
        standard: Whether it is written for model-hosting-container-standards (see `worker.adapted`).
    """

    directory: str
    file: str
    function: str | None
    properties: dict[str, str]
    standard: bool = False


class Call(msgspec.Struct, tag=True):
    """A request. properties: its headers and custom attributes."""

    id: int
    properties: dict[str, str]
    body: bytes


class Cancel(msgspec.Struct, tag=True):
    """The answer to a call is no longer wanted."""

    id: int


ToHandler: TypeAlias = Call | Cancel


class Ready(msgspec.Struct, tag=True):
    """The handler can be called. concurrent: whether many calls may overlap (`async def`), or only one at a time."""

    concurrent: bool


class LoadFailed(msgspec.Struct, tag=True):
    """The handler cannot be used. message: for the operator."""

    message: str


class Head(msgspec.Struct, tag=True):
    """The beginning of an answer. Parts follow, and an End or Failed.

    Attributes:
        id: The call's.
        status: The HTTP status.
        properties: The headers.
        streams: Whether the parts are sent on as they arrive.
    """

    id: int
    status: int
    properties: dict[str, str]
    streams: bool


class Part(msgspec.Struct, tag=True):
    """A piece of a reply's body."""

    id: int
    data: bytes


class End(msgspec.Struct, tag=True):
    """The end of a complete reply."""

    id: int


class Failed(msgspec.Struct, tag=True):
    """The handler raised.

    Attributes:
        id: The call's.
        status: 424; 507 when memory ran out; or 500 for a reply that is too large.
        error: The exception's class; for a 500, what is wrong with the reply.
    """

    id: int
    status: int
    error: str


FromHandler: TypeAlias = Ready | LoadFailed | Head | Part | End | Failed
Answer: TypeAlias = Head | Part | End | Failed
