"""The events of running requests that metrics are made of."""

from __future__ import annotations

from typing import Protocol

from handlers.exchange import RequestFacts


class Observer(Protocol):
    """Receives the events on the event loop; `on_token_gap` for each step of each stream, so it must be cheap.

    Every admitted request ends in exactly one `on_finished`, failed or not; `on_error` also counts those that
    were never admitted. Times are seconds.
    """

    def on_admitted(self, facts: RequestFacts) -> None:
        """Note an admitted request. facts: they change until `on_finished`."""

    def on_first_token(self, seconds: float) -> None:
        """Note the time from the request's arrival to its first token."""

    def on_token_gap(self, seconds: float) -> None: ...

    def on_finished(self, facts: RequestFacts) -> None: ...

    def on_error(self, kind: str) -> None: ...


class Unobserved:
    """Ignores all events."""

    def on_admitted(self, facts: RequestFacts) -> None:
        pass

    def on_first_token(self, seconds: float) -> None:
        pass

    def on_token_gap(self, seconds: float) -> None:
        pass

    def on_finished(self, facts: RequestFacts) -> None:
        pass

    def on_error(self, kind: str) -> None:
        pass
