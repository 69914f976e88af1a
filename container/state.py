"""The state of the server: how far it is between start and stop, whether it can answer, and the replies about it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Literal, Protocol

import msgspec
from msgspec import UNSET, Struct

from handlers.backends.base import BackendStats, Health, Lifecycle
from handlers.errors import NotFound
from handlers.progress import Progress
from handlers.protocols.base import JSON
from handlers.protocols.openai.replies import Model, Models
from handlers.request import Incoming, Reply, RequestFacts

if TYPE_CHECKING:
    from container.models import models

Phase = Literal["loading", "serving", "draining", "failed"]


class Ping(Struct, forbid_unknown_fields=True):
    """The reply to `/ping`."""

    status: str
    reason: str


class Healthy(Struct, forbid_unknown_fields=True):
    """The reply to `/health` while the model can answer."""

    status: Literal["ok"]


class Unhealthy(Struct, forbid_unknown_fields=True):
    """The reply to `/health` while it cannot. error, error_type: TGI's."""

    error: str
    error_type: str
    status: str
    reason: str


class Version(Struct, forbid_unknown_fields=True):
    """The reply to `/version`."""

    version: str


class RunningRequest(Struct, forbid_unknown_fields=True):
    """A request in `/engine/state`, without its prompt and its answer. id: the request's id, which clients may choose.

    Attributes:
        phase: `image` while its images are fetched, decoded and prepared; `queued` while a prompt without images is
            prepared, and in the engine's queue; `prefill` until its first token; then `decode`.
        tokens: How many have been generated, for all its choices.
        max_tokens: The most that it may get; 0 if that is not known.
        seconds: The time since it arrived.
    """

    id: str
    phase: Literal["image", "queued", "prefill", "decode"]
    images: int
    tokens: int
    max_tokens: int
    seconds: float
    stream: bool


class EngineState(Struct, forbid_unknown_fields=True):
    """The reply to `/engine/state`: the admitted requests without a complete answer, the oldest first."""

    requests: list[RunningRequest]


class Answers(Protocol):
    """What the server needs of a service. free: how many more answers it can accept now."""

    @property
    def free(self) -> int: ...

    async def answer(self, incoming: Incoming) -> Reply: ...

    async def call(self, action: str, incoming: Incoming) -> Reply: ...

    def needs_no_place(self, route: str, size: int, content: bytes | None = None) -> bool: ...

    async def close(self) -> None:
        """Close the backend, and what belongs to the service alone. Never raises."""


@dataclass(slots=True)
class ServerState:
    """The state that every route reads.

    Attributes:
        phase: How far the process is.
        reason: Why it is not serving; safe to show to a client.
        backend: None until the model can generate.
        service: None until then; it stays None on a machine that holds a part of the model for another machine.
        several: The models of a server of several, once it is ready; None for any other server.
        progress: How far loading is, which is reported with the reason; None before and after it.
        created: When the process started, in Unix seconds.
    """

    phase: Phase = "loading"
    reason: str = "the model is loading"
    backend: Lifecycle | None = None
    service: Answers | None = None
    several: models.Models | None = None
    progress: Progress | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def serve(self, backend: Lifecycle, service: Answers | None) -> None:
        """Begin to answer requests, or to report which machine does."""
        self.phase, self.reason = "serving", "ready"
        if service is None:
            self.reason = "this machine holds a part of the model: requests are answered by the first one (node_rank 0)"
        self.backend, self.service = backend, service

    def drain(self) -> None:
        self.phase, self.reason = "draining", "the server is stopping"

    def fail(self, reason: str) -> None:
        self.phase, self.reason = "failed", reason

    def health(self) -> Health:
        """Whether a request can be answered now. Returns at once."""
        if self.phase != "serving" or self.backend is None:
            progress = "" if self.phase != "loading" or self.progress is None else str(self.progress)
            return Health(ready=False, reason=f"{self.reason}: {progress}" if progress else self.reason)
        return self.backend.health()

    def stats(self) -> BackendStats | None:
        return None if self.backend is None else self.backend.stats()

    def ping(self) -> Reply:
        """Return the reply to `/ping`."""
        health = self.health()
        status = self.phase.capitalize()
        if self.phase == "serving":
            status = "Healthy" if health.ready else "Unhealthy"
        return json_reply(Ping(status, health.reason), 200 if health.ready else 503)

    def health_page(self) -> Reply:
        """Return the reply to `/health`."""
        health = self.health()
        if health.ready:
            return json_reply(Healthy("ok"))
        return json_reply(Unhealthy("unhealthy", "healthcheck", "unavailable", health.reason), 503)

    def requests(self, running: Iterable[RequestFacts]) -> Reply:
        """Return the reply to `/engine/state`. running: the admitted requests without a complete answer."""
        stats = self.stats()
        now = time.monotonic()
        found = [_described(facts, now) for facts in sorted(running, key=attrgetter("arrival"))]
        # The engine reports only how many requests are waiting; they are assumed to be the last ones without a token.
        without = [request for request in found if request.phase == "prefill"]
        for request in without[len(without) - min(len(without), 0 if stats is None else stats.waiting) :]:
            request.phase = "queued"
        return json_reply(EngineState(found))

    def models(self, names: Sequence[str], wanted: str) -> Reply:
        """Return the reply to `/v1/models`, or to a request for one model.

        Args:
            names: The names of the served model, its own name first.
            wanted: The model that is asked for; "" for all.

        Raises:
            NotFound: No model of this name is served.
        """
        backend = self.backend
        longest = 0 if backend is None else backend.capabilities.max_model_len
        store = None if backend is None else backend.adapters
        adapters = [] if store is None else [info.name for info in store.infos()]
        models = [
            Model(name, "model", self.created, "lmi", name, names[0] if i >= len(names) else UNSET, longest or UNSET)
            for i, name in enumerate((*names, *adapters))
        ]
        if not wanted:
            return json_reply(Models("list", models))
        for model in models:
            if model.id == wanted:
                return json_reply(model)
        raise NotFound(f"no model {wanted[:200]!r} is served here; GET /v1/models lists the names")


def _described(facts: RequestFacts, now: float) -> RunningRequest:
    phase: Literal["image", "queued", "prefill", "decode"] = "decode"
    if not facts.prepared:
        phase = "image" if facts.images else "queued"
    elif facts.first_token is None:
        phase = "prefill"
    return RunningRequest(
        facts.request_id,
        phase,
        facts.images,
        facts.completion_tokens,
        facts.max_tokens,
        round(now - facts.arrival, 3),
        facts.stream,
    )


def json_reply(body: Struct, status: int = 200) -> Reply:
    """Return a reply with spaces after commas and colons and a final line end, for people who read it in a terminal."""
    return Reply(status, JSON, msgspec.json.format(msgspec.json.encode(body), indent=0) + b"\n")
