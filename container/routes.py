"""The table of routes, by path and method.

Clients build paths of their own from the address that they are given: what they make of one that ends in `/v1`,
`/invocations` or `/generate`, and a slash too many, finds the route that they mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from handlers.errors import NotFound, ServingError

Action = Literal[
    "openapi", "ping", "health", "metrics", "models", "version", "info", "answer", "tokenize", "detokenize",
    "adapters",
]  # fmt: skip

READ = ("GET", "HEAD")


class MethodNotAllowed(ServingError):
    """route: the first one of the path. allowed: the methods of all of them."""

    status = 405
    kind = "method_not_allowed"

    def __init__(self, method: str, routes: tuple[Route, ...]) -> None:
        self.allowed = tuple(one for route in routes for one in route.methods)
        super().__init__(f"{method[:20]} is not allowed here; use {' or '.join(self.allowed)}")
        self.route = routes[0]


@dataclass(frozen=True, slots=True)
class Route:
    """One route.

    Attributes:
        template: What logs, metrics and the handlers call it, never what the client typed.
        action: What answers it.
        methods: The HTTP methods that it answers.
        open: Answered without the server's key, which the platform does not have.
    """

    template: str
    action: Action
    methods: tuple[str, ...] = ("POST",)
    open: bool = False


@dataclass(frozen=True, slots=True)
class Match:
    """A route, and the names of a model and of an adapter in the path; "" if there are none."""

    route: Route
    name: str = ""
    adapter: str = ""


PING = Route("/ping", "ping", (*READ, "POST"), open=True)
HEALTH = Route("/health", "health", READ, open=True)
METRICS = Route("/metrics", "metrics", READ, open=True)
MODELS = Route("/v1/models", "models", READ)
CHAT = Route("/v1/chat/completions", "answer")
COMPLETIONS = Route("/v1/completions", "answer")
ROOT = Route("/", "answer")
PREDICTIONS = Route("/predictions/{model}", "answer")
INVOKE = Route("/models/{model}/invoke", "answer")

_ADAPTERS = (
    Route("/adapters", "adapters", READ),
    Route("/adapters", "adapters"),
)
_ADAPTER = (
    Route("/adapters/{adapter}", "adapters", READ),
    Route("/adapters/{adapter}", "adapters", ("DELETE",)),
)
_UPDATE = (Route("/adapters/{adapter}/update", "adapters"),)

ROUTES: dict[str, tuple[Route, ...]] = {
    "/ping": (PING,),
    "/health": (HEALTH,),
    "/metrics": (METRICS,),
    "/server/metrics": (METRICS,),
    "/version": (Route("/version", "version", READ),),
    "/info": (Route("/info", "info", READ),),
    "/openapi.json": (Route("/openapi.json", "openapi", READ),),
    # SageMaker and LMI
    "/invocations": (Route("/invocations", "answer"),),
    # LMI's adapters; SageMaker calls them for inference components
    "/adapters": _ADAPTERS,
    # OpenAI
    "/v1/models": (MODELS,),
    "/v1/chat/completions": (CHAT,),
    "/v1/completions": (COMPLETIONS,),
    # TGI; Hugging Face's Python client also asks for text at the address it was given for chat
    "/": (ROOT, HEALTH),
    "/v1": (ROOT,),
    "/generate": (Route("/generate", "answer"),),
    "/generate_stream": (Route("/generate_stream", "answer"),),
    "/chat_tokenize": (Route("/chat_tokenize", "tokenize"),),
    # TGI and vLLM
    "/tokenize": (Route("/tokenize", "tokenize"),),
    "/detokenize": (Route("/detokenize", "detokenize"),),
}
"""Path -> its routes, which differ in their methods."""

_NAMED: tuple[tuple[re.Pattern[str], tuple[Route, ...]], ...] = (
    (re.compile(r"/v1/models/(?P<name>.+)"), (MODELS,)),
    (re.compile(r"/adapters/(?P<adapter>[^/]+)/update"), _UPDATE),
    (re.compile(r"/adapters/(?P<adapter>[^/]+)"), _ADAPTER),
    (re.compile(r"/models/(?P<name>.+)/adapters"), _ADAPTERS),
    (re.compile(r"/models/(?P<name>.+)/adapters/(?P<adapter>[^/]+)/update"), _UPDATE),
    (re.compile(r"/models/(?P<name>.+)/adapters/(?P<adapter>[^/]+)"), _ADAPTER),
    (re.compile(r"/models/(?P<name>.+)/invoke"), (INVOKE,)),
    (re.compile(r"/predictions/(?P<name>.+)"), (PREDICTIONS,)),
)
_GROUP = re.compile(r"\(\?P<(\w+)>[^)]+\)")
_APPENDED = {CHAT.template: CHAT, COMPLETIONS.template: COMPLETIONS}
"""Paths that Hugging Face's clients append to whatever address they are given."""

_SLASHES = re.compile(r"//+")


def every() -> Iterator[tuple[str, Route]]:
    """All routes with their paths, in which `{name}` is a model's name and `{adapter}` an adapter's."""
    for path, routes in ROUTES.items():
        for route in routes:
            yield path, route
    for pattern, routes in _NAMED:
        for route in routes:
            yield _GROUP.sub(r"{\1}", pattern.pattern), route


def find(path: str, method: str) -> Match:
    """The route of a request. Raises NotFound, and MethodNotAllowed if the path has routes for other methods only."""
    found, names = _at(_SLASHES.sub("/", path).rstrip("/") or "/")
    if not found:
        raise NotFound(
            "no such route; POST /v1/chat/completions, /v1/completions, /invocations, /generate and / answer requests"
        )
    for route in found:
        if method in route.methods:
            return Match(route, **names)
    raise MethodNotAllowed(method, found)


def _at(path: str) -> tuple[tuple[Route, ...], dict[str, str]]:
    found, names = _listed(path)
    for tail, route in _APPENDED.items():
        if path.endswith(tail) and path != tail:
            found, names = _listed(path.removesuffix(tail))
            return ((route,), names) if any(one.action == "answer" for one in found) else ((), {})
    return found, names


def _listed(path: str) -> tuple[tuple[Route, ...], dict[str, str]]:
    if path in ROUTES:
        return ROUTES[path], {}
    for pattern, routes in _NAMED:
        if match := pattern.fullmatch(path):
            return routes, match.groupdict()
    return (), {}
