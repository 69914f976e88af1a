"""What an API consists of: routes, readers that make a `Task` of a body, and the writer of the task's reply.

`handlers/service.py` lists the APIs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar

from msgspec import Meta, Struct, json

from engine.sampling_params import MAX_INTEGER
from handlers.deltas import Delta, FinishReason, PositionLogprobs, PromptStats
from handlers.errors import ServingError
from handlers.parsers.base import AnswerFormats
from handlers.request import GenerationRequest, Incoming, Reply
from properties.settings import OutputFormat, Settings

if TYPE_CHECKING:
    from handlers.service import Service


T = TypeVar("T")

READ = ("GET", "HEAD")
REFERENCE = "#/components/schemas/{name}"

JSON = "application/json"
JSON_LINES = "application/jsonlines"
SSE_TYPE = "text/event-stream"
SSE = f"{SSE_TYPE}; charset=utf-8"
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment in a stream of server-sent events."""

MAX_PROMPTS = 1024
"""The most prompts in one body."""

MAX_ANSWERS = 128
"""The most answers to one prompt (`n`): OpenAI's limit."""

TokenId = Annotated[int, Meta(ge=0, le=MAX_INTEGER)]
TokenCount = Annotated[int, Meta(ge=1, le=MAX_INTEGER)]


@dataclass(frozen=True, slots=True)
class ErrorFormat:
    """How one API writes errors.

    Attributes:
        body: Returns what is encoded as JSON for an error.
        status: The HTTP status of its reply, where that is not the error's own.
    """

    body: Callable[[ServingError], object]
    status: Callable[[ServingError], int] = attrgetter("status")


@dataclass(frozen=True, slots=True)
class Route:
    """One route and what it takes and gives. Several types of body, reply or event are alternatives.

    Attributes:
        path: `{name}` stands for a model's name, `{adapter}` for an adapter's.
        action: What answers it: "answer" for the model, a name in an API's `calls`, or one of the server's own.
        summary: One line for the document.
        template: What logs, metrics and handlers call the route; the path itself unless several paths share one name.
        light: Answered from the head of the request, unlimited and without a line in the log, as monitoring asks it.
        queued: Takes a place in the queue.
        open: Answered without the server's key, as the platform asks it.
        timed: Its replies have headers with TGI's counts and times, whichever API has read the body.
        appended: Also answered where a client appends the path to that of any route that answers.
        plain_text: The body may also be a prompt as plain text.
        query: Parameter of the query -> its description.
        replies: Structs of the reply, or lists of them.
        texts: Content types of replies that are not JSON.
        events: Content type of a stream -> the structs of its events or lines.
        errors: Structs of errors, in addition to `ERRORS_ANYWHERE`.
        not_ready: Structs of the reply with 503, if they are not those of `errors`.
        codes: Statuses of errors, if they are not those of every route with such a body.
    """

    path: str
    action: str
    summary: str
    methods: tuple[str, ...] = ("POST",)
    template: str = ""
    light: bool = False
    queued: bool = False
    open: bool = False
    timed: bool = False
    appended: bool = False
    bodies: Sequence[type] = ()
    plain_text: bool = False
    query: Mapping[str, str] = field(default_factory=dict)
    replies: Sequence[Any] = ()
    texts: Sequence[str] = ()
    events: Mapping[str, Sequence[type]] = field(default_factory=dict)
    errors: Sequence[type] = ()
    not_ready: Sequence[type] = ()
    codes: Sequence[int] = ()

    def __post_init__(self) -> None:
        if not self.template:
            object.__setattr__(self, "template", self.path)


def described(*parts: type[Struct], **schema: Any) -> Meta:
    """Return what `/openapi.json` says of a field beyond its type, where its reader checks or takes it apart by hand.

    parts: structs that the schema names with `reference`. schema: keywords of JSON Schema.
    """
    return Meta(extra_json_schema=schema, extra={"parts": parts} if parts else None)


def described_as(part: type[Struct]) -> Meta:
    """Return what `/openapi.json` says of an object, or null, that is read as a struct of its own afterwards."""
    return described(part, anyOf=[reference(part), {"type": "null"}])


def reference(part: type[Struct]) -> dict[str, str]:
    """Return the JSON Schema that names a struct."""
    return {"$ref": REFERENCE.format(name=part.__name__)}


async def in_thread_if(long: bool, work: Callable[..., T], *given: Any) -> T:
    """Return the result of some work, done in a thread if it takes long, so that other requests do not wait."""
    return await asyncio.to_thread(work, *given) if long else work(*given)


def struct_reply(body: Struct, status: int = 200) -> Reply:
    """Return the reply that consists of a struct, as JSON with a line end."""
    return Reply(status, JSON, json.encode(body) + b"\n")


@dataclass(frozen=True, slots=True)
class ServerContext:
    """What holds for every request of a server.

    Attributes:
        model_name: Shown in replies to requests that name no model.
        sampling: The model's own defaults (generation_config.json), by the names of RequestSampling.
        trust_chat_templates: Requests may bring a chat template of their own.
        max_model_len: The model's context, in tokens; 0 where it is not known.
        special_token_ids: The model's special tokens.
        special_tokens: Their texts, which are left out of answers where special tokens are skipped.
        formats: How answers with calls and reasoning are parsed.
        custom_output: Replies go through the user's output formatter, which knows OpenAI's format.
        embeddings: Clients may send embeddings in place of images.
        chat_templates: Names of the model's own chat templates -> the variables that each reads.
    """

    model_name: str
    sampling: Mapping[str, Any] = field(default_factory=dict)
    output_formatter: OutputFormat | None = None
    tgi_compat: bool = False
    trust_chat_templates: bool = False
    max_model_len: int = 0
    special_token_ids: Set[int] = frozenset()
    special_tokens: Set[str] = frozenset()
    formats: AnswerFormats = field(default_factory=AnswerFormats)
    custom_output: bool = False
    embeddings: bool = False
    chat_templates: Mapping[str, Set[str]] = field(default_factory=dict)


@dataclass(slots=True)
class Answer:
    """One complete answer: the sum of its deltas. pieces: the text that each token added."""

    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    eos: bool = False

    def add(self, delta: Delta) -> None:
        if delta.token_ids or not self.pieces:
            self.pieces += delta.pieces
        else:
            self.pieces[-1] += delta.text
        self.token_ids += delta.token_ids
        if delta.logprobs:
            self.logprobs += delta.logprobs
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason, self.eos = delta.finish_reason, delta.stop_reason, delta.eos

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def logprob(self) -> float:
        """The log probability of all tokens together."""
        return sum(position.chosen.logprob for position in self.logprobs)

    @property
    def mean_logprob(self) -> float:
        return self.logprob / max(1, len(self.logprobs))


@dataclass(slots=True)
class Answered:
    """One prompt and its n answers."""

    stats: PromptStats
    answers: list[Answer]


class Writer(Protocol):
    """Writes one task's reply, complete or in chunks that are already framed.

    keep_alive: what may be sent during silence; empty if the framing has nothing for that.
    """

    @property
    def stream_type(self) -> str:
        """The content type of a streamed reply; a complete reply is JSON."""

    @property
    def keep_alive(self) -> bytes: ...

    def whole(self, answered: list[Answered]) -> bytes: ...

    def chunk(self, delta: Delta, stats: PromptStats) -> bytes:
        """Return the next chunk; empty if the delta shows nothing."""

    def end(self, stats: PromptStats) -> bytes: ...

    def failed(self, error: ServingError) -> bytes:
        """Return the last part of a stream that failed after its first chunk."""


@dataclass(slots=True)
class Task:
    """What a body asks for. Several requests are several prompts, answered together and in order.

    Attributes:
        misspelt: A sentence for each name in the body that is not read (`handlers.protocols.known_names`).
        names: A field of `SamplingParams` -> what the client calls it, where that is another name.
    """

    requests: list[GenerationRequest]
    writer: Writer
    misspelt: Sequence[str] = ()
    names: Mapping[str, str] = field(default_factory=dict)


Reader = Callable[[dict[str, Any], ServerContext, Incoming, str | None], Task]
"""Makes a task of a body; nothing has been fetched or generated yet. Raises InvalidRequest naming the field at fault.

Arguments: the JSON object; what holds for every request; the request; and the adapter that the request's head names,
which takes precedence over one in the body.
"""

Frame = Callable[[Reader, dict[str, Any], ServerContext, Incoming, str | None], Task]
"""Reads a body with its API's own reader and changes how the reply is framed."""


Call = Callable[["Service", Incoming], Awaitable[Reply]]
"""Answers a request with what the service knows. Raises ServingError."""


class Gate(Protocol):
    """Sees requests for an answer before their bodies are read into tasks, and may answer them without the model.

    Attributes:
        routes: The routes whose requests it sees.
        header: It also sees every other request with this header.
    """

    routes: Collection[str]
    header: str

    def answer(self, body: Mapping[str, Any], incoming: Incoming) -> Reply | None:
        """Return the reply to a body that does not ask the model; None for all others.

        Raises:
            ServingError: The request cannot be answered.
        """

    def may_answer(self, size: int, content: bytes | None = None) -> bool:
        """Whether `answer` may reply to a body of this size, or to this very body, which then needs no queue place.

        It is asked about requests on its routes.
        """


@dataclass(frozen=True, slots=True)
class Api:
    """One API.

    Attributes:
        claims: Says whether it writes the errors of a request, by the route's template, the headers (names in lower
            case) and the keys of the body, which are empty before the body has been read.
        routes: Its routes, for the router and the OpenAPI document.
        reads: Returns the reader of a body with these keys on a route; None if the body belongs to another API.
        reads_on: The only routes on which it reads bodies; empty for all.
        frames: Route -> how replies are framed there, whichever API has read the body.
        headers: The headers of its platform that may name an adapter.
        adapter: Returns the adapter that the head of a request with one of them names.
        calls: Action of a route -> what answers it, for routes that generate no text.
        request_id: The header in which the caller names the request.
    """

    errors: ErrorFormat
    claims: Callable[[str, Mapping[str, str], Collection[str]], bool]
    routes: Sequence[Route]
    reads: Callable[[Collection[str], str], Reader | None] = lambda keys, route: None
    reads_on: Collection[str] = ()
    frames: Mapping[str, Frame] = field(default_factory=dict)
    headers: Collection[str] = ()
    adapter: Callable[[Incoming], str | None] | None = None
    calls: Mapping[str, Call] = field(default_factory=dict)
    request_id: str = ""
    gate: Callable[[Settings], Gate] | None = None
