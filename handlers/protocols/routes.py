"""What a route is: each API folder lists its own, and the router and `/openapi.json` are made from these lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Action = Literal[
    "openapi", "ping", "health", "metrics", "models", "version", "info", "answer", "tokenize", "detokenize",
    "adapters",
]  # fmt: skip

READ = ("GET", "HEAD")
SSE_TYPE = "text/event-stream"


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
        errors: Structs of a refusal.
        not_ready: Structs of the reply with 503, where it is not one of `errors`.
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
