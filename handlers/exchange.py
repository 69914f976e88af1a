"""What the HTTP server and the handlers exchange: a request in, a reply out, and events for metrics. No sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class Incoming:
    """A request as it arrived.

    Attributes:
        route: The matched route's template, e.g. "/invocations" or "/v1/chat/completions".
        body: Complete and within `max_request_size`, until it is taken.
        headers: With names in lower case.
        request_id: The caller's own id, or a new one.
        model: The model named in the path; None if the route names none.
        parsed: Called once the body has been parsed, just before the request enters the queue.
        keep: Called once the engine has all images, with the number of bytes of the body that are still held.
        method: The HTTP method.
        query: The first value of each parameter.
        adapter: The adapter named in the path; "" if the route names none.
        size: The size of the body, in bytes.
    """

    route: str
    body: bytes
    headers: Mapping[str, str]
    request_id: str
    model: str | None = None
    parsed: Callable[[], None] = lambda: None
    keep: Callable[[int], None] = lambda _: None
    method: str = "POST"
    query: Mapping[str, str] = field(default_factory=dict)
    adapter: str = ""
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = len(self.body)

    def take_body(self) -> bytes:
        """Return the body and drop it here, so that its memory is free once the caller has read it."""
        body, self.body = self.body, b""
        return body


@dataclass(slots=True)
class RequestFacts:
    """What one log record says about a request; complete once its reply has been sent or closed.

    Times are seconds from the request's arrival, and token counts are sums over the request's prompts; `first_token` is
    None until there is one. `prepared` is the time until the engine had the last prompt, and `queued` the time from
    then until it began. `error` is the kind of the error that ended the request, `reason` its message as far as the log
    may show it. `arrival` is in `time.monotonic()` seconds. `max_tokens` is the most that were asked for; 0 if not
    known.
    """

    request_id: str
    route: str
    model: str | None = None
    status: int = 0
    stream: bool = False
    images: int = 0
    prompt_tokens: int = 0
    image_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    prepared: float = 0.0
    queued: float = 0.0
    first_token: float | None = None
    total: float | None = None
    finish_reason: str | None = None
    error: str | None = None
    reason: str | None = None
    arrival: float = 0.0
    max_tokens: int = 0


@dataclass(slots=True)
class Reply:
    """A reply, complete (`body`) or streamed (`chunks`, already framed; exactly one of the two is used).

    `logged` says that another process has written the request's line to the log.

    Whoever holds a streamed reply must exhaust `chunks` or `aclose()` it: that frees the request's place in
    the queue and aborts it in the engine.
    """

    status: int
    content_type: str
    body: bytes = b""
    chunks: AsyncIterator[bytes] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    facts: RequestFacts | None = None
    logged: bool = False


class Observer:
    """Receives the events of requests, and ignores them where a method is not overridden.

    The methods are called on the event loop, `on_token_gap` for each step of each stream, so they must be cheap. Every
    admitted request ends in exactly one `on_finished`, failed or not; `on_error` also counts those that were never
    admitted. Times are seconds.
    """

    def on_admitted(self, facts: RequestFacts) -> None:
        """Note an admitted request. facts: they change until `on_finished`."""

    def on_first_token(self, seconds: float) -> None:
        """Note the time from the request's arrival to its first token."""

    def on_token_gap(self, seconds: float) -> None:
        """Note the time between two steps that brought tokens."""

    def on_finished(self, facts: RequestFacts) -> None:
        """Note the end of an admitted request."""

    def on_error(self, kind: str) -> None:
        """Note an error that a client got."""
