"""What passes between the HTTP server and the handlers: one request in, one reply out, no sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class Incoming:
    """A request as it came over the wire.

    route: the matched route's template, e.g. "/invocations" or "/v1/chat/completions".
    headers: names in lower case. body: whole and within `max_request_size`, until it is taken. size: its bytes.
    model: the model named in the path, None where the route names none.
    parsed: called once the body has been understood, just before the request asks for its places in the queue.
    keep: called once the engine has all images, with the bytes of the body that are still held: those of its texts.
    query: the first value of each parameter. adapter: the adapter named in the path, "" where the route names none.
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
        """The body, which nobody holds any longer once the caller has read it."""
        body, self.body = self.body, b""
        return body


@dataclass(slots=True)
class RequestFacts:
    """What one log record says about a request; complete once its reply has been sent or closed.

    Times are seconds from the request's arrival; `first_token` is None until there is one. Tokens are sums
    over the prompts of the request. `prepared`: until the engine had the last of them; `queued`: from then on until it
    began. `error` is the kind of the error that ended it, `reason` what its client was told, fit for the log.
    `arrival`: `time.monotonic()` seconds. `max_tokens`: the most that were asked for; 0 if that is not known.
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
    """A reply, whole (`body`) or streamed (`chunks`, already framed; exactly one of the two is used).

    Whoever holds a streamed reply must exhaust `chunks` or `aclose()` it: that frees the request's place in
    the queue and aborts it in the engine.
    """

    status: int
    content_type: str
    body: bytes = b""
    chunks: AsyncIterator[bytes] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    facts: RequestFacts | None = None
