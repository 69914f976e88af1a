"""Where the process stands between start and stop, and whether it can answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from handlers.backends.base import Backend, BackendStats, Health
from handlers.exchange import AdapterCall, Incoming, Reply

Phase = Literal["loading", "serving", "draining", "failed"]


class Answers(Protocol):
    """What the server asks of the handlers. free: answers that they could take in now."""

    @property
    def free(self) -> int: ...

    async def answer(self, incoming: Incoming) -> Reply: ...

    async def tokenize(self, incoming: Incoming) -> Reply: ...

    async def detokenize(self, incoming: Incoming) -> Reply: ...

    async def adapters(self, call: AdapterCall) -> Reply: ...

    def info(self) -> Reply: ...


@dataclass(slots=True)
class Life:
    """The one changing fact that every route looks at.

    reason: safe to show to a client. backend and service: None until the model can generate.
    """

    phase: Phase = "loading"
    reason: str = "the model is loading"
    backend: Backend | None = None
    service: Answers | None = None

    def serve(self, backend: Backend, service: Answers) -> None:
        self.phase, self.reason = "serving", "ready"
        self.backend, self.service = backend, service

    def drain(self) -> None:
        self.phase, self.reason = "draining", "the server is stopping"

    def fail(self, reason: str) -> None:
        self.phase, self.reason = "failed", reason

    def health(self) -> Health:
        """Whether a request can be answered now; waits for nothing."""
        if self.phase != "serving" or self.backend is None:
            return Health(ready=False, reason=self.reason)
        return self.backend.health()

    def stats(self) -> BackendStats | None:
        return None if self.backend is None else self.backend.stats()

    def status_word(self) -> str:
        """One word for `/ping`'s body."""
        if self.phase == "serving":
            return "Healthy" if self.health().ready else "Unhealthy"
        return self.phase.capitalize()
