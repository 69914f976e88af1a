"""The seam between requests and whatever generates: one small protocol, one file per backend.

A backend turns a `GenerationRequest`, whose pictures are already loaded, into a `Generation`: a stream of
`Delta`s. It raises `handlers.errors.ServingError` (and only that) for everything a client can be told.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from handlers.backends.adapters import AdapterStore
from handlers.parsers.base import AnswerFormats
from handlers.request import GenerationRequest, Prompt

FinishReason = Literal["stop", "length", "abort"]
"""stop: end-of-sequence, a stop id or a stop string (see `stop_reason`); length: max_tokens or the context's end."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One candidate at one position. `rank` counts from 1 (the most likely token)."""

    token_id: int
    text: str
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """What was chosen at a position and the most likely alternatives there, best first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(slots=True)
class Delta:
    """What one step added to answer number `index` (0 to n-1).

    text: whole characters only; may lag behind token_ids while a character or a stop string is undecided.
    pieces: what each token added to the text, which they add up to; where that is not known, the last one has
    added it all. One entry also where there is no token.
    stop_reason: the stop string or stop id that ended the answer; None for end-of-sequence and for length.
    eos: the answer ended with the model's own end-of-sequence token.
    """

    index: int
    token_ids: list[int]
    text: str
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    eos: bool = False
    pieces: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.pieces:
            self.pieces = [""] * (len(self.token_ids) - 1) + [self.text]


@dataclass(slots=True)
class PromptStats:
    """Facts about the prompt, complete once the first delta has arrived.

    prompt_tokens counts the placeholders of pictures; image_tokens is their part of it; cached_tokens is how
    many were found in the prefix cache. first_token_text goes with prompt_logprobs, whose first entry is None.
    queued: seconds that it waited for the engine to begin.
    """

    prompt_tokens: int
    image_tokens: int = 0
    cached_tokens: int = 0
    prompt_token_ids: list[int] = field(default_factory=list)
    prompt_text: str = ""
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    first_token_text: str = ""
    queued: float = 0.0


def total(stats: Sequence[PromptStats]) -> PromptStats:
    """The counts of several prompts added up; those of one are its own stats."""
    if len(stats) == 1:
        return stats[0]
    return PromptStats(
        prompt_tokens=sum(one.prompt_tokens for one in stats),
        image_tokens=sum(one.image_tokens for one in stats),
        cached_tokens=sum(one.cached_tokens for one in stats),
        queued=max((one.queued for one in stats), default=0.0),
    )


class Generation(Protocol):
    """One admitted request. Iterate to the end or call `aclose`, which aborts what is still running."""

    stats: PromptStats

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    async def aclose(self) -> None:
        """Abort within one engine step. Safe to call twice and after the end."""


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the backend can generate now. `reason` is safe to show to a client.

    lost: it never will again.
    """

    ready: bool
    reason: str
    lost: bool = False


@dataclass(slots=True)
class BackendStats:
    """A snapshot for metrics: gauges now, counters since start (they go on counting over engine restarts).

    series: the engine's own metric families of prometheus_client, shown as they are.
    """

    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    encoder_cache_queries: int = 0
    encoder_cache_hits: int = 0
    preemptions: int = 0
    engine_restarts: int = 0
    replicas: int = 0
    replicas_ready: int = 0
    series: Sequence[Any] = ()


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What requests may ask of this backend.

    default_sampling: fields of `SamplingParams` that the model's generation_config.json sets, for requests that
    do not name them.
    image_placeholder: what stands for a picture in a prompt in the model's own format, as text; None where that
    is not known. special_token_ids: tokens that are no text, such as the ends of turns. special_tokens: texts of
    all tokens that `skip_special_tokens` skips.
    dtype: of weights and activations. device_type: "cpu", "cuda". compute_type: the devices of one copy of the model,
    as "1-nvidia-a10g". cache_tokens: how many have room in the key/value cache of all copies together; 0 where that is
    not known. prompt_threads: how many prompts are prepared at the same time. chat_templates: names that
    requests may choose the model's own templates by, each with the variables that it reads. formats: how answers are
    read, where the options name parsers of the backend's own; None where they name ours.
    """

    max_model_len: int
    images: bool
    default_sampling: Mapping[str, float | int] = field(default_factory=dict)
    adapters: bool = False
    structured_outputs: bool = False
    image_placeholder: str | None = None
    special_token_ids: Set[int] = frozenset()
    special_tokens: Set[str] = frozenset()
    dtype: str = ""
    device_type: str = ""
    compute_type: str = ""
    cache_tokens: int = 0
    prompt_threads: int = 1
    chat_templates: Mapping[str, Set[str]] = field(default_factory=dict)
    formats: AnswerFormats | None = None


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt as the model reads it, the tokens of its pictures included.

    text: what the tokens were made of, each picture as its placeholder. pieces: the tokens as the vocabulary spells
    them. spans: where each stands in `text`, (start, stop) in characters; (0, 0) for one that was added to the text;
    all tokens of a picture stand where its placeholder does.
    """

    text: str
    token_ids: list[int]
    pieces: list[str]
    spans: list[tuple[int, int]]

    @property
    def texts(self) -> list[str]:
        """What each token covers; pieces of one character each cover all of it."""
        return [self.text[start:stop] for start, stop in self.spans]


def compute_type(device: str, count: int) -> str:
    """How TGI's launcher names the devices of one copy of the model: "1-nvidia-a10g", "cpu"."""
    return device if device == "cpu" else f"{count}-{device.lower().replace(' ', '-')}"


class Backend(Protocol):
    """A loaded (or loading) model. `load` is called once; all methods run on the server's event loop."""

    async def load(self) -> None:
        """Return when the model can generate. Raises `ServingError` with what to do when it cannot be loaded."""

    @property
    def capabilities(self) -> Capabilities:
        """Valid once `load` has returned."""

    @property
    def adapters(self) -> AdapterStore | None:
        """What changes adapters while it serves, once `load` has returned; None where none can be changed."""

    async def generate(self, request: GenerationRequest) -> Generation:
        """Template, tokenise, check lengths and admit. Everything a client did wrong is raised here, before
        any reply has begun."""

    async def tokenize(self, prompt: Prompt) -> TokenizedPrompt:
        """What `generate` would have the model read; the prompt's pictures are loaded, and let go of here.

        Raises InvalidRequest. Its length is not checked.
        """

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones included. Raises InvalidRequest for an id outside the vocabulary."""

    def health(self) -> Health: ...

    def stats(self) -> BackendStats: ...

    async def close(self) -> None:
        """Abort what runs and release everything. Never raises."""
