"""Which API answers a request; each API says which requests it reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from handlers.errors import InvalidRequest
from handlers.protocols.base import ErrorFormat, Gate, ServerContext, Task
from handlers.protocols.lmi.requests import LMI
from handlers.protocols.openai.requests import OPENAI
from handlers.protocols.tgi.replies import TgiError
from handlers.protocols.tgi.requests import TGI
from handlers.protocols.tokens import TOKENS
from handlers.request import Incoming
from properties.settings import Settings

APIS = (TGI, OPENAI, LMI, TOKENS)
"""In order: the first API that claims a request gets it."""

ROUTES = tuple(route for api in APIS for route in api.routes)
"""All routes of all APIs."""

ERRORS_ANYWHERE = (TgiError,)
"""Structs of errors that a client may get on every route: TGI's own clients, which are known by a header."""

REQUEST_ID_HEADERS = (*(api.request_id for api in APIS if api.request_id), "x-request-id")
"""The headers in which a caller may name a request, the one that wins first."""

CALLS = {name: call for api in APIS for name, call in api.calls.items()}
"""What answers a route's action, by the action's name."""

_ADAPTERS = tuple(api.adapter for api in APIS if api.adapter is not None)
_HEADERS = {route: headers for api in APIS for route, headers in api.headers.items()}
_FRAMES = {route: frame for api in APIS for route, frame in api.frames.items()}


def read_task(body: dict[str, Any], server: ServerContext, incoming: Incoming) -> Task:
    """Parse a body with the API that it belongs to. Raises InvalidRequest naming the field at fault."""
    route = incoming.route
    read = next((found for api in APIS if (found := api.reads(body.keys(), route)) is not None), None)
    if read is None:
        raise InvalidRequest("the body has neither messages, prompt nor inputs", param="messages")
    adapter = next((name for find in _ADAPTERS if (name := find(incoming)) is not None), None)
    if (frame := _FRAMES.get(route)) is None:
        task = read(body, server, incoming, adapter)
    else:
        task = frame(read, body, server, incoming, adapter)
    task.route_headers = _HEADERS.get(route)
    return task


def error_format(route: str, headers: Mapping[str, str], keys: Collection[str] = ()) -> ErrorFormat:
    """Return the format of errors for a request. keys: those of its body, as soon as they are known."""
    return next(api.errors for api in APIS if api.claims(route, headers, keys))


def gates(settings: Settings) -> tuple[Gate, ...]:
    """Return the gates of a server, one for each API that has one."""
    return tuple(api.gate(settings) for api in APIS if api.gate is not None)
