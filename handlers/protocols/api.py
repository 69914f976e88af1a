"""What each API tells the common part of itself; `select.py` lists the APIs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from handlers.exchange import Incoming, Reply
from handlers.protocols.base import Conventions, ReplyHeaders, Task
from handlers.protocols.errors import ErrorFormat
from handlers.protocols.routes import Route
from properties.settings import Settings

if TYPE_CHECKING:
    from handlers.service import Service

Reader = Callable[[dict[str, Any], Conventions, Incoming, str | None], Task]
"""Makes a task of a body, for the adapter that the request's head names. Raises InvalidRequest naming the field."""

Frame = Callable[[Reader, dict[str, Any], Conventions, Incoming, str | None], Task]
"""Reads a body with its API's own reader and changes how the reply is framed."""


Call = Callable[["Service", Incoming], Awaitable[Reply]]
"""Answers a request with what the service knows. Raises ServingError."""


class Gate(Protocol):
    """Sees every request for an answer before it is read."""

    def answer(self, body: Mapping[str, Any], incoming: Incoming) -> Reply | None:
        """Returns the reply to a body that does not ask the model; None for all others.

        Raises:
            ServingError: The request cannot be answered.
        """

    def may_answer(self, route: str, size: int, content: bytes | None = None) -> bool:
        """Whether `answer` may have a reply to a body of this size, or to this very body: such take no place."""


@dataclass(frozen=True, slots=True)
class Api:
    """One API.

    Attributes:
        errors: How it writes errors.
        claims: Whether it writes the errors of a request, by the route's template, the headers (names in lower case)
            and the keys of the body, which are empty before the body has been read.
        reads: What reads a body with these keys on a route; None where it is another API's.
        routes: Its routes, for the router and the OpenAPI document.
        headers: Route -> what it adds to the headers of replies there, whichever API has read the body.
        frames: Route -> how replies are framed there, whichever API has read the body.
        adapter: The adapter that a request's head names.
        calls: Name of an action, as routes have it -> what answers it, where that is not a text of the model's.
        request_id: The header in which the caller names the request.
        gate: Makes the gate of a server.
    """

    errors: ErrorFormat
    claims: Callable[[str, Mapping[str, str], Collection[str]], bool]
    reads: Callable[[Collection[str], str], Reader | None]
    routes: Sequence[Route]
    headers: Mapping[str, ReplyHeaders] = field(default_factory=dict)
    frames: Mapping[str, Frame] = field(default_factory=dict)
    adapter: Callable[[Incoming], str | None] | None = None
    calls: Mapping[str, Call] = field(default_factory=dict)
    request_id: str = ""
    gate: Callable[[Settings], Gate] | None = None
