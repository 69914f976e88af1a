"""What an API is to the rest of the server: its routes, and what reads and answers them. `select.py` lists the APIs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from msgspec import Meta, Struct

from handlers.exchange import Incoming, Reply
from handlers.protocols.base import ReplyHeaders, ServerContext, Task
from handlers.protocols.errors import ErrorFormat
from properties.settings import Settings

if TYPE_CHECKING:
    from handlers.service import Service

READ = ("GET", "HEAD")
SSE_TYPE = "text/event-stream"
REFERENCE = "#/components/schemas/{name}"


@dataclass(frozen=True, slots=True)
class Route:
    """One route and what it takes and gives. Several types of body, reply or event are alternatives.

    Attributes:
        path: `{name}` stands for a model's name, `{adapter}` for an adapter's.
        action: What answers it: "answer" for the model, a name in an API's `calls`, or one of the server's own.
        summary: One line for the document.
        methods: The HTTP methods that it answers.
        template: What logs, metrics and handlers call the route; the path itself unless several paths share one name.
        light: Answered from the head of the request, unlimited and without a line in the log, as monitoring asks it.
        queued: Takes a place in the queue.
        open: Answered without the server's key, as the platform asks it.
        appended: Also answered where a client appends the path to that of any route that answers.
        bodies: Structs of the request's body.
        plain_text: The body may be a prompt alone.
        query: Parameter of the query -> what it means.
        replies: Structs of the reply, or lists of them.
        texts: Content types of replies that are not JSON.
        events: Content type of a stream -> the structs of its events or lines.
        errors: Structs of a refusal, beside those that every route may answer with.
        not_ready: Structs of the reply with 503, where they are not those of `errors`.
        codes: Statuses of errors, where they are not those of every route with such a body.
    """

    path: str
    action: str
    summary: str
    methods: tuple[str, ...] = ("POST",)
    template: str = ""
    light: bool = False
    queued: bool = False
    open: bool = False
    appended: bool = False
    bodies: Sequence[type] = ()
    plain_text: bool = False
    query: Mapping[str, str] = field(default_factory=dict)
    replies: Sequence[Any] = ()
    texts: Sequence[str] = ()
    events: Mapping[str, Sequence[type]] = field(default_factory=dict)
    errors: Sequence[type] = ()
    not_ready: Sequence[type] = ()
    codes: Sequence[int] = ()

    def __post_init__(self) -> None:
        if not self.template:
            object.__setattr__(self, "template", self.path)


def described(*parts: type[Struct], **schema: Any) -> Meta:
    """Returns what `/openapi.json` says of a field beyond its type, where its reader checks or takes it apart by hand.

    parts: structs that the schema names with `reference`. schema: keywords of JSON Schema.
    """
    return Meta(extra_json_schema=schema, extra={"parts": parts} if parts else None)


def described_as(part: type[Struct]) -> Meta:
    """Returns what `/openapi.json` says of an object, or null, that is read as a struct of its own afterwards."""
    return described(part, anyOf=[reference(part), {"type": "null"}])


def reference(part: type[Struct]) -> dict[str, str]:
    """Returns the JSON Schema that names a struct."""
    return {"$ref": REFERENCE.format(name=part.__name__)}


Reader = Callable[[dict[str, Any], ServerContext, Incoming, str | None], Task]
"""Makes a task of a body, for the adapter that the request's head names. Raises InvalidRequest naming the field."""

Frame = Callable[[Reader, dict[str, Any], ServerContext, Incoming, str | None], Task]
"""Reads a body with its API's own reader and changes how the reply is framed."""


Call = Callable[["Service", Incoming], Awaitable[Reply]]
"""Answers a request with what the service knows. Raises ServingError."""


class Gate(Protocol):
    """Sees every request for an answer before it is parsed, and may answer it without the model."""

    def answer(self, body: Mapping[str, Any], incoming: Incoming) -> Reply | None:
        """Returns the reply to a body that does not ask the model; None for all others.

        Raises:
            ServingError: The request cannot be answered.
        """

    def may_answer(self, route: str, size: int, content: bytes | None = None) -> bool:
        """Whether `answer` may reply to a body of this size, or to this very body: it needs no queue place."""


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
