"""All routes, and the replies to requests without a body: probes, the page, metrics and lists."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any
from urllib.parse import parse_qs

from container import page
from container.exchange import Call
from container.metrics import Metrics
from container.models.models import ROUTES as MODEL_ROUTES
from container.openapi import document
from container.page import ModelPage
from container.state import Answers, EngineState, Healthy, Ping, ServerState, Unhealthy, Version, json_reply
from handlers.errors import NotFound, Unavailable
from handlers.protocols.base import JSON, READ, Route
from handlers.protocols.lmi.replies import LmiError
from handlers.protocols.openai.replies import OpenAIError
from handlers.request import Incoming, Reply
from handlers.service import ROUTES as API_ROUTES
from handlers.version import VERSION
from properties.configuration import Configuration


def _own(path: str, action: str, summary: str, *, methods: tuple[str, ...] = READ, **more: Any) -> Route:
    return Route(path, action, summary, methods=methods, light=True, errors=(OpenAIError, LmiError), **more)


_HEALTH: dict[str, Any] = {"open": True, "replies": (Healthy,), "not_ready": (Unhealthy,)}

_METRICS = ("text/plain", "application/openmetrics-text")

ROUTES = (
    *API_ROUTES,
    _own(
        "/ping",
        "ping",
        "Whether the model can answer, as SageMaker asks it",
        methods=(*READ, "POST"),
        open=True,
        replies=(Ping,),
        not_ready=(Ping,),
    ),
    _own("/health", "health", "Whether the model can answer", **_HEALTH),
    _own(
        "/", "health", "The page, or whether the model can answer", template="/health", texts=("text/html",), **_HEALTH
    ),
    _own("/metrics", "metrics", "Metrics for Prometheus", open=True, texts=_METRICS),
    _own("/server/metrics", "metrics", "Metrics for Prometheus", template="/metrics", open=True, texts=_METRICS),
    _own("/version", "version", "The version of this server", replies=(Version,)),
    _own("/engine/state", "state", "The requests that run now", replies=(EngineState,)),
    _own("/engine/model", "model", "The model, for the page", replies=(dict[str, Any],), codes=(404,)),
    _own("/page", "page", "The page for people", open=True, texts=("text/html",), codes=(404,)),
    _own(
        "/page/{name}",
        "page",
        "Its files",
        template="/page",
        open=True,
        texts=("text/css", "text/javascript"),
        codes=(404,),
    ),
    _own("/openapi.json", "openapi", "This document", replies=(dict[str, Any],)),
)
"""All routes of a server of one model. Routes that share a path have different methods."""

_OF_ONE = frozenset({"state", "model", "page"})
"""Actions of routes that only the server of one model has."""

ROUTES_OF_SEVERAL = (*(route for route in ROUTES if route.action not in _OF_ONE), *MODEL_ROUTES)
"""All routes of a server of several models."""


@cache
def _document(several: bool) -> bytes:
    return document(ROUTES_OF_SEVERAL if several else ROUTES)


class LightReplies:
    """Makes the replies of the routes that are `light`.

    Attributes:
        model_page: What the page shows of the model, once it is loaded; None if there is nothing to show.
    """

    def __init__(self, state: ServerState, metrics: Metrics, service: Callable[[], Answers]) -> None:
        """service: returns what answers, or raises Unavailable."""
        self.model_page: ModelPage | None = None
        self._state = state
        self._metrics = metrics
        self._service = service
        self._public: Sequence[str] = ()
        self._several = False
        self._page_is_on = False

    def configure(self, configuration: Configuration) -> None:
        self._several = configuration.settings.multi_model
        self._public = () if self._several else configuration.public_names
        self._page_is_on = page.is_on(configuration) and not self._several

    async def reply(self, call: Call, action: str, name: str) -> Reply:
        """Return the reply to a request without a body.

        Args:
            call: The request.
            action: The action of its route.
            name: What the path names.

        Raises:
            ServingError: There is no such thing here, or not yet.
        """
        state = self._state
        match action:
            case "ping":
                return state.ping()
            case "health":
                wanted = call.path == "/" and "text/html" in call.headers.get("accept", "")
                return page.file("index.html") if wanted and self._page_is_on else state.health_page()
            case "metrics":
                return await self._metrics_page(call)
            case "models":
                models = state.several
                return state.models(self._public if models is None else models.names, name)
            case "version":
                return json_reply(Version(VERSION))
            case "openapi":
                return Reply(200, JSON, await asyncio.to_thread(_document, self._several))
            case "page" if call.path.endswith("/page/"):
                return Reply(308, JSON, b"{}\n", headers={"location": "../page"})
            case "page" | "model" if not self._page_is_on:
                raise NotFound("there is no page here (option.page)")
            case "page" if name.startswith("examples/") and self.model_page is not None:
                return self.model_page.example(name.removeprefix("examples/"))
            case "page":
                return page.file(name or "index.html")
            case "model":
                return self._model_page()
            case "state":
                return state.requests(self._metrics.running.values())
            case _:
                incoming = Incoming(call.template, b"", call.headers, call.request_id, method=call.method)
                return await self._service().call(action, incoming)

    def _model_page(self) -> Reply:
        if self._state.phase == "loading":
            raise Unavailable(f"not ready: {self._state.health().reason}", retry_after=5)
        self._service()
        if self.model_page is None or self._state.backend is None:
            raise NotFound("the model's own code answers: the page has nothing to show of it")
        return self.model_page.describe(self._state.backend)

    async def _metrics_page(self, call: Call) -> Reply:
        names = parse_qs(call.query).get("name[]", [])
        models = self._state.several
        texts = None if models is None else await models.metrics()
        body, content_type = self._metrics.export(call.headers.get("accept", ""), names, texts)
        return Reply(200, content_type, body)
