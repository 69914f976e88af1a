"""The types of a request: as it arrived (`Incoming`), as every API reads it (`GenerationRequest`), and its `Reply`.

Metrics get the events of requests through an `Observer`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

from engine.sampling_params import MAX_BAD_WORDS, MAX_BREAKERS, SamplingParams, bounded

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL.Image import Image


L = TypeVar("L")
G = TypeVar("G")


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
        query: The first value of each parameter.
        adapter: The adapter named in the path; "" if the route names none.
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


Role = str
"""system, developer, user, assistant, tool, or another word that the model's chat template knows."""


class MemoryShare(Protocol):
    """A part's share of the memory for decoded images (see `handlers.images.limits`)."""

    def release(self) -> None:
        """Give it back. Safe to call twice."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class LoadedImage:
    """A decoded image: upright, RGB, shared and therefore never changed.

    Attributes:
        digest: SHA-256 of the encoded file, which determines the pixels, or of the pixels; it is the key of every
            cache.
    """

    image: Image
    digest: bytes


Grid = tuple[int, int, int]
"""How an image's patches are arranged: frames, rows and columns, as the Qwen2-VL family counts them."""


@dataclass(frozen=True, slots=True)
class LoadedEmbeddings:
    """What a model's vision encoder and projector made of an image elsewhere. Never changed.

    Attributes:
        rows: float32, [tokens, hidden size], all finite.
        largest: The largest magnitude in `rows`.
        grid: For models that need it.
        digest: SHA-256 of the encoded tensors; it cannot equal the digest of an image.
    """

    rows: npt.NDArray[np.float32]
    largest: float
    grid: Grid | None
    digest: bytes


@dataclass(frozen=True, slots=True)
class TextPart:
    """A piece of text between images."""

    text: str


@dataclass(slots=True, kw_only=True)
class _Loaded(Generic[L, G]):
    """What both kinds of image have in common.

    Attributes:
        loaded: None until `handlers.images` has fetched and decoded it.
        share: Its share of the memory for decoded images, while it is loaded.
        given: A script's own image or tensors, instead of what a client sends; never changed.
        characters: The length of this part in the request's body.
    """

    loaded: L | None = None
    share: MemoryShare | None = field(default=None, repr=False)
    given: G | None = field(default=None, repr=False)
    characters: int = field(init=False)

    def release(self) -> None:
        """Drop what is loaded and its memory as soon as nothing needs it; safe to call twice."""
        self.loaded = None
        if self.share is not None:
            self.share.release()


@dataclass(slots=True)
class ImagePart(_Loaded[LoadedImage, "Image"]):
    """An image named by the client, or a script's own, of any mode.

    Attributes:
        url: `https:`, `http:` or `data:`, exactly as the client wrote it (never logged).
    """

    url: str

    def __post_init__(self) -> None:
        self.characters = len(self.url)

    def forget(self) -> None:
        """Drop the url, since a `data:` url holds the whole file: the image cannot be loaded again."""
        self.url = ""


@dataclass(slots=True)
class EmbeddingsPart(_Loaded[LoadedEmbeddings, LoadedEmbeddings]):
    """An image sent as its embeddings.

    Attributes:
        rows: The output of `torch.save`, in base64, exactly as the client sent it (never logged).
        grid: Likewise, or the numbers themselves.
    """

    rows: str = field(repr=False)
    grid: str | Grid | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.characters = len(self.rows) + (len(self.grid) if isinstance(self.grid, str) else 0)

    def forget(self) -> None:
        """Drop what the client sent: the embeddings cannot be loaded again."""
        self.rows, self.grid = "", None


MediaPart = ImagePart | EmbeddingsPart
"""What a prompt shows between its texts: an image, or its embeddings."""

Part = TextPart | MediaPart


@dataclass(slots=True)
class Message:
    """One turn.

    Attributes:
        parts: The texts and images, in reading order.
        text_only: Whether the client sent a string instead of a list of parts.
        tool_calls: As OpenAI writes them, with the arguments as JSON text.
        tool_call_id: The call that this turn answers.
        reasoning: The reasoning of an earlier answer, for templates that show it.
    """

    role: Role
    parts: list[Part]
    text_only: bool = False
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None


@dataclass(slots=True)
class ChatPrompt:
    """Turns to which the model's chat template has not been applied yet.

    Attributes:
        add_generation_prompt: Whether the template begins the answer's turn.
        continue_final_message: Whether the answer continues the last message.
        template: The request's own template; None for the model's.
        add_special_tokens: Whether the tokenizer adds its special tokens to the template's text; None for the default
            of the model's processor.
        tools: The functions that the model may call, as OpenAI describes them.
    """

    messages: list[Message]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template: str | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    add_special_tokens: bool | None = None
    tools: list[dict[str, Any]] | None = None


@dataclass(slots=True)
class TextPrompt:
    """A prompt without turns: texts and images in order. `token_ids` replaces `parts` when the client sent ids."""

    parts: list[Part]
    token_ids: list[int] | None = None
    add_special_tokens: bool = True


Prompt = ChatPrompt | TextPrompt


def prompt_parts(prompt: Prompt) -> Iterator[Part]:
    """Yield the prompt's texts and images in reading order."""
    if isinstance(prompt, ChatPrompt):
        for message in prompt.messages:
            yield from message.parts
    else:
        yield from prompt.parts


def media_parts(prompt: Prompt) -> Iterator[MediaPart]:
    """Its images and embeddings of images, in reading order."""
    return (part for part in prompt_parts(prompt) if not isinstance(part, TextPart))


@dataclass(frozen=True, slots=True)
class Constraint:
    """The form that every answer to a request must have, enforced token by token.

    Attributes:
        value: None for `json_object`; the schema as JSON text for `json_schema`; for `regex` a regular expression that
            matches the whole answer; for `choice` the allowed answers as a JSON array; for `grammar` Lark, or GBNF-like
            EBNF as vLLM accepts it.
        param: The field of the client's that it came from, for error messages.
        whitespace_pattern: A regular expression for the white space inside JSON; "" for none, None for any.
    """

    kind: Literal["json_object", "json_schema", "regex", "choice", "grammar"]
    value: str | None = None
    param: str = "response_format"
    whitespace_pattern: str | None = None


@dataclass(slots=True)
class GenerationRequest:
    """One prompt to answer `n` times.

    Attributes:
        request_id: For the log and the replies.
        model: The model's name as the client wrote it.
        priority: A smaller one is scheduled first.
        truncate_prompt_tokens: Keep only this many tokens of a prompt without images; -1 for as many as fit into the
            context.
        max_tokens_is_default: The client did not ask for `sampling.max_tokens`: the answer is shortened to what fits
            into the context.
        text_bytes: The size of the body without its images, a measure of what rendering may cost.
        constraint: Applies to each of the n answers; None for free text.
    """

    request_id: str
    prompt: Prompt
    sampling: RequestSampling
    n: int = 1
    stream: bool = False
    model: str | None = None
    adapter: str | None = None
    priority: int = 0
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] = "left"
    max_tokens_is_default: bool = False
    text_bytes: int = 0
    constraint: Constraint | None = None

    def images(self) -> Iterator[MediaPart]:
        """Return the request's images in reading order, by which error messages number them.

        All of them are images, or all are embeddings.
        """
        return media_parts(self.prompt)


MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1000
"""The longest stop string, since that much text may be held back until it is decided."""


class RequestSampling(SamplingParams, kw_only=True, omit_defaults=True, frozen=True):
    """The engine's sampling parameters, and those that concern only the text of prompts and completions.

    Attributes:
        stop: Strings that end the completion; not part of the text unless include_stop_str_in_output.
        include_stop_str_in_output: Keep the stop string, or the stop token's text, at the end of the text.
        bad_words: Texts that the completion must not contain, as far as their usual tokens go; they become
            bad_words_token_ids.
        dry_sequence_breakers: Texts that end a repetition, which become dry_sequence_breaker_ids; None means DRY's
            own list.
    """

    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    bad_words: tuple[str, ...] = ()
    dry_sequence_breakers: tuple[str, ...] | None = None

    def for_engine(self) -> SamplingParams:
        """Return the part that an engine, which knows only token ids, understands."""
        return SamplingParams(**{name: getattr(self, name) for name in SamplingParams.__struct_fields__})

    def validate(self) -> None:
        """Check all fields.

        Raises:
            ValueError: Names the first field that is out of range, its value, and what is allowed.
        """
        if len(self.stop) > MAX_STOP_STRINGS:
            raise ValueError(f"stop holds {len(self.stop)} strings; allowed: at most {MAX_STOP_STRINGS}")
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
                raise ValueError(
                    f"stop holds a string of {len(text)} characters; allowed: from 1 to {MAX_STOP_CHARACTERS}"
                )
        _require_texts("bad_words", self.bad_words, MAX_BAD_WORDS)
        _require_texts("dry_sequence_breakers", self.dry_sequence_breakers or (), MAX_BREAKERS)
        SamplingParams.validate(self)


def _require_texts(name: str, texts: Sequence[str], most: int) -> None:
    bounded(name, len(texts), "texts", 0, most)
    for text in texts:
        bounded(name, len(text), "characters in a text", 1, MAX_STOP_CHARACTERS)


MOST_TOKEN_IDS = 1024
"""The most tokens that logit_bias or stop_token_ids may name."""


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

    The holder of a streamed reply must exhaust `chunks` or `aclose()` it: that frees the request's place in
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
