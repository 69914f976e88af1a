"""Where the process is between start and stop, whether it can answer, and the replies that say so."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal, Protocol

import msgspec

from container.routes import EngineState, RunningRequest
from handlers.backends.base import Backend, BackendStats, Health
from handlers.errors import NotFound
from handlers.exchange import Incoming, Reply, RequestFacts

Phase = Literal["loading", "serving", "draining", "failed"]


class Answers(Protocol):
    """What the server asks of the handlers. free: how many more answers they can accept now."""

    @property
    def free(self) -> int: ...

    async def answer(self, incoming: Incoming) -> Reply: ...

    async def call(self, action: str, incoming: Incoming) -> Reply: ...

    def takes_no_place(self, route: str, size: int, content: bytes | None = None) -> bool: ...


@dataclass(slots=True)
class ServerState:
    """The state that every route looks at.

    Attributes:
        phase: Where the process is.
        reason: Why it is not serving; safe to show to a client.
        backend: None until the model can generate.
        service: Likewise.
        created: When the process started, in Unix seconds.
    """

    phase: Phase = "loading"
    reason: str = "the model is loading"
    backend: Backend | None = None
    service: Answers | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def serve(self, backend: Backend, service: Answers) -> None:
        self.phase, self.reason = "serving", "ready"
        self.backend, self.service = backend, service

    def drain(self) -> None:
        self.phase, self.reason = "draining", "the server is stopping"

    def fail(self, reason: str) -> None:
        self.phase, self.reason = "failed", reason

    def health(self) -> Health:
        """Whether a request can be answered now. Returns at once."""
        if self.phase != "serving" or self.backend is None:
            return Health(ready=False, reason=self.reason)
        return self.backend.health()

    def stats(self) -> BackendStats | None:
        return None if self.backend is None else self.backend.stats()

    def ping(self) -> Reply:
        """The reply to `/ping`."""
        health = self.health()
        status = self.phase.capitalize()
        if self.phase == "serving":
            status = "Healthy" if health.ready else "Unhealthy"
        return json_reply({"status": status, "reason": health.reason}, 200 if health.ready else 503)

    def health_page(self) -> Reply:
        """The reply to `/health`; `error` and `error_type` are TGI's."""
        health = self.health()
        if health.ready:
            return json_reply({"status": "ok"})
        error = {"error": "unhealthy", "error_type": "healthcheck"}
        return json_reply({**error, "status": "unavailable", "reason": health.reason}, 503)

    def requests(self, running: Iterable[RequestFacts]) -> Reply:
        """The reply to `/engine/state`. running: the requests that were admitted and are not answered yet."""
        stats = self.stats()
        now = time.monotonic()
        found = [_described(facts, now) for facts in sorted(running, key=attrgetter("arrival"))]
        # Which of those without a token still wait, the engine does not say: the last ones, as many as it says.
        without = [request for request in found if request.phase == "prefill"]
        for request in without[len(without) - min(len(without), 0 if stats is None else stats.waiting) :]:
            request.phase = "queued"
        return json_reply(msgspec.to_builtins(EngineState(found)))

    def models(self, names: Sequence[str], wanted: str) -> Reply:
        """The reply to `/v1/models`, or of the one model that is wanted. Raises NotFound.

        names: those of the served model, the first one its own.
        """
        backend = self.backend
        longest = 0 if backend is None else backend.capabilities.max_model_len
        length = {"max_model_len": longest} if longest else {}
        store = None if backend is None else backend.adapters
        named: list[tuple[str, dict[str, str]]] = [(name, {}) for name in names]
        for info in () if store is None else store.infos():
            named.append((info.name, {"parent": names[0]}))
        common = {"object": "model", "created": self.created, "owned_by": "lmi"}
        models = [{"id": name, **common, "root": name, **parent, **length} for name, parent in named]
        if not wanted:
            return json_reply({"object": "list", "data": models})
        for model in models:
            if model["id"] == wanted:
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


def json_reply(body: object, status: int = 200) -> Reply:
    return Reply(status, "application/json", json.dumps(body).encode() + b"\n")
