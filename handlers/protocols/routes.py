"""What a route is: each API folder lists its own, and the router and `/openapi.json` are made from these lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from msgspec import Meta, Struct

Action = Literal[
    "openapi", "ping", "health", "metrics", "models", "version", "info", "answer", "tokenize", "detokenize",
    "adapters", "page", "model", "state",
]  # fmt: skip

READ = ("GET", "HEAD")
SSE_TYPE = "text/event-stream"
REFERENCE = "#/components/schemas/{name}"


@dataclass(frozen=True, slots=True)
class Route:
    """One route and what it takes and gives. Several types of body, reply or event are alternatives.

    Attributes:
        path: `{name}` stands for a model's name, `{adapter}` for an adapter's.
        action: What answers it.
        summary: One line for the document.
        methods: The HTTP methods that it answers.
        template: What logs, metrics and handlers call the route; the path itself unless several paths share one name.
        open: Answered without the server's key, as the platform asks it.
        appended: Also answered where a client appends the path to that of any route that answers.
        bodies: Structs of the request's body.
        plain_text: The body may be a prompt alone.
        query: Parameter of the query -> what it means.
        replies: Structs of the reply, or lists of them.
        events: Content type of a stream -> the structs of its events or lines.
        errors: Structs of a refusal, beside those that every route may answer with.
        not_ready: Structs of the reply with 503, where they are not those of `errors`.
        codes: Statuses of errors, where they are not those of every route with such a body.
    """

    path: str
    action: Action
    summary: str
    methods: tuple[str, ...] = ("POST",)
    template: str = ""
    open: bool = False
    appended: bool = False
    bodies: Sequence[type] = ()
    plain_text: bool = False
    query: Mapping[str, str] = field(default_factory=dict)
    replies: Sequence[Any] = ()
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
