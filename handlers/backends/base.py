"""What an engine must do (tokens in, tokens out), what each backend must do, and what a request gets from them.

`handlers.pipeline` connects the two for every engine: it turns a `GenerationRequest` into tokens, and an engine's
tokens into `Delta`s. For anything that a client may learn, all of them raise `handlers.errors.ServingError` and nothing
else.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence, Set
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from engine.config import Vocabulary
from engine.messages import Logprobs
from handlers.parsers.base import AnswerFormats
from handlers.request import Constraint, MediaPart, RequestSampling
from properties.problem import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from engine.machine import Machine
    from handlers.backends.adapters import AdapterStore
    from handlers.backends.model_files import Findings
    from handlers.prompts.renderer import PromptRenderer
    from properties.configuration import Configuration

FinishReason = Literal["stop", "length", "abort"]
"""stop: end of sequence, stop id or stop string (see `stop_reason`); length: max_tokens or the end of the context."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One candidate at one position. `rank` counts from 1, the most likely token."""

    token_id: int
    text: str
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The token chosen at a position and the most likely alternatives there, best first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(slots=True)
class Delta:
    """What one step added to choice number `index` (0 to n-1).

    Attributes:
        index: The number of the choice.
        token_ids: The new tokens.
        text: Whole characters only; it may lag behind `token_ids` while a character or a stop string is undecided.
        logprobs: One entry for each new token, if they were asked for.
        finish_reason: Why the choice has ended; None while it continues.
        stop_reason: The stop string or stop id that ended it; None for end-of-sequence and for length.
        eos: Whether it ended with the model's own end-of-sequence token.
        pieces: The text that each token added; joined they are `text`. If that is not known, the last one holds all of
            it. There is one entry even without a token.
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
    """Counts and details of a prompt, complete once the first delta has arrived.

    Attributes:
        prompt_tokens: Including the placeholders of images.
        image_tokens: Those of the placeholders alone.
        cached_tokens: How many were found in the prefix cache.
        prompt_token_ids: The tokens.
        prompt_text: The text that they were made of.
        prompt_logprobs: If they were asked for; the first entry is None.
        first_token_text: The text of the first token, which goes with `prompt_logprobs`.
        queued: Seconds that the request waited for the engine to begin.
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
    """Return the sum of the counts of several prompts; a single prompt's own stats are returned as they are."""
    if len(stats) == 1:
        return stats[0]
    return PromptStats(
        prompt_tokens=sum(one.prompt_tokens for one in stats),
        image_tokens=sum(one.image_tokens for one in stats),
        cached_tokens=sum(one.cached_tokens for one in stats),
        queued=max((one.queued for one in stats), default=0.0),
    )


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the backend can generate now.

    Attributes:
        ready: Whether it can.
        reason: Why not; safe to show to a client.
        lost: It will never be able to again.
    """

    ready: bool
    reason: str
    lost: bool = False


@dataclass(slots=True)
class BackendStats:
    """A snapshot for metrics: current gauges, and counters since the start, which engine restarts do not reset.

    series holds the engine's own metric families of prometheus_client, which are exported unchanged.
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
    draft_tokens: int = 0
    accepted_tokens: int = 0
    engine_restarts: int = 0
    replicas: int = 0
    replicas_ready: int = 0
    series: Sequence[Any] = ()


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What requests may ask of this backend.

    Attributes:
        max_model_len: The context, in tokens.
        images: Whether the model accepts images.
        embeddings: Whether it accepts embeddings in place of images.
        default_sampling: Fields of `RequestSampling` that the model's generation_config.json sets, for requests that do
            not name them.
        adapters: Whether requests may name adapters.
        structured_outputs: Whether answers can be constrained.
        image_placeholder: The text that represents an image in a prompt in the model's own format; None if not known.
        special_token_ids: Tokens that are not text, such as the ends of turns.
        special_tokens: The texts of all tokens that `skip_special_tokens` skips.
        dtype: Of weights and activations.
        device_type: "cpu" or "cuda".
        compute_type: The devices of one replica, as "1-nvidia-a10g".
        cache_tokens: How many tokens fit into the key/value caches of all replicas together; 0 if not known.
        prompt_threads: How many prompts are prepared at the same time.
        chat_templates: The names of the model's own templates that requests may choose, with the variables that each
            reads.
        formats: How answers are parsed if the options name the backend's own parsers; None if they name ours.
    """

    max_model_len: int
    images: bool
    embeddings: bool = False
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
    """A prompt as the model reads it, including the tokens of its images.

    Attributes:
        text: What the tokens were made of, with a placeholder for each image.
        token_ids: The tokens.
        pieces: The tokens as the vocabulary spells them.
        spans: Where each token is in `text`, (start, stop) in characters; (0, 0) for one that was added to the text.
            All tokens of an image have the span of its placeholder.
    """

    text: str
    token_ids: list[int]
    pieces: list[str]
    spans: list[tuple[int, int]]

    @property
    def texts(self) -> list[str]:
        """The text that each token covers; the byte tokens of a single character each cover all of it."""
        return [self.text[start:stop] for start, stop in self.spans]


def compute_type(device: str, count: int) -> str:
    """Return the devices of one replica as TGI's launcher names them: "1-nvidia-a10g", "cpu"."""
    return device if device == "cpu" else f"{count}-{device.lower().replace(' ', '-')}"


class Lifecycle(Protocol):
    """Whatever answers requests, from load to close. `load` is called once, and everything runs on the event loop."""

    async def load(self) -> None:
        """Return when it can answer. Raises ServingError, with the remedy, if it cannot be loaded."""

    @property
    def capabilities(self) -> Capabilities:
        """What requests may ask for. Valid once `load` has returned."""

    @property
    def adapters(self) -> AdapterStore | None:
        """The store that changes adapters while it serves, once `load` has returned; None if none can be changed."""

    def health(self) -> Health: ...

    def stats(self) -> BackendStats: ...

    async def close(self) -> None:
        """Abort what is running and release everything. Never raises."""


@dataclass(frozen=True, slots=True)
class PromptModel:
    """What the pipeline must know of an engine's model to tokenise prompts and to make text of tokens.

    Attributes:
        tokenizer: The model's.
        renderer: Makes tokens of prompts.
        vocab_size: The size of the model's logits.
        threads: Where long prompts are rendered.
        vocabulary: For compiling constraints; None if the engine compiles them itself.
        json_whitespace: The `Constraint.whitespace_pattern` of requests that do not set one.
        spells_words: Whether the engine tokenises `RequestSampling.bad_words` itself.
    """

    tokenizer: PreTrainedTokenizerFast
    renderer: PromptRenderer
    vocab_size: int
    threads: Executor
    vocabulary: Vocabulary | None
    json_whitespace: str | None = None
    spells_words: bool = False


@dataclass(slots=True)
class EngineRequest:
    """What an engine is to generate from a prepared prompt.

    Attributes:
        request_id: For the engine's log.
        params: Checked; max_tokens is final once the prompt is prepared.
        n: The number of choices.
        constraint: Applies to each of them.
        grammar: The constraint as llguidance reads it; None without one, and if the engine compiles constraints itself.
        adapter: A name by which a request may choose an adapter.
        model: Likewise.
        priority: A smaller one is scheduled first.
    """

    request_id: str
    params: RequestSampling
    n: int = 1
    constraint: Constraint | None = None
    grammar: str | None = None
    adapter: str | None = None
    model: str | None = None
    priority: int = 0


class PreparedPrompt(Protocol):
    """A prompt as the engine accepts it.

    Attributes:
        token_ids: Including all tokens of the images.
        images: The (offset, length) of each image in `token_ids`, in order.
    """

    token_ids: list[int]
    images: Sequence[tuple[int, int]]

    def discard(self) -> None:
        """Release what it holds, for a prompt that is not passed to `Engine.generate`."""


@dataclass(slots=True)
class TokenOutput:
    """What a step added to choice `index`.

    Attributes:
        index: The number of the choice.
        token_ids: The new tokens.
        finish: Why the choice has ended; None while it continues.
        logprobs: One entry for each new token, if they were asked for.
        stop_token: The stop id that ended it.
        by_token: Whether its last token, end of sequence or stop id, ended it.
        cached_tokens: How many of the prompt's tokens were found in the prefix cache.
        queued: Seconds that the request waited for its first step.
        prompt_logprobs: Sent once, with an entry for each token of the prompt; the first is None.
    """

    index: int
    token_ids: list[int]
    finish: FinishReason | None = None
    logprobs: list[Logprobs] | None = None
    stop_token: int | None = None
    by_token: bool = False
    cached_tokens: int = 0
    queued: float = 0.0
    prompt_logprobs: list[Logprobs | None] | None = None


class TokenStream(Protocol):
    """The tokens of one request. Iterate to the end or call `aclose`. Raises ServingError."""

    def __aiter__(self) -> AsyncIterator[TokenOutput]: ...

    def abort(self, index: int) -> None:
        """Abort one choice; further output of it is not read."""

    async def aclose(self) -> None:
        """Abort what is still running, within one engine step. Safe to call twice and after the end."""


Prepared = TypeVar("Prepared", bound=PreparedPrompt)


class Engine(Lifecycle, Protocol[Prepared]):
    """Token ids and images in, token ids out."""

    @property
    def model(self) -> PromptModel:
        """The model's tokenizer and renderer. Valid once `load` has returned."""

    async def prepare(
        self, token_ids: list[int], parts: Sequence[MediaPart], request: EngineRequest | None
    ) -> Prepared:
        """Replace the image tokens by those of the images; the loaded images are released here.

        Args:
            token_ids: Those of the rendered prompt, with one image token for each image.
            parts: The images, loaded.
            request: What is to be generated; it is refused before its images cost anything. None if only tokens are
                wanted.

        Raises:
            InvalidRequest: The engine does not accept the request (ImageError for an image).
            Unavailable: The engine cannot prepare it now.
        """

    async def generate(self, prompt: Prepared, request: EngineRequest) -> TokenStream:
        """Return when the engine has accepted the request. It owns the prompt from then on."""


@dataclass(frozen=True)
class Needs:
    """What a model would need on this machine, according to a backend.

    Attributes:
        dtype: Of the weights.
        dtype_reason: Why this one, for people.
        shapes: config.json, with the defaults filled in.
        token_bytes: Keys and values of one token; None if they follow from the shapes.
        image_bytes: Bytes kept for each image of a running request.
        beside_weights: Bytes of what is held beside the weights.
        takes_all: Whether the cache is as large as it was asked to be, even if nothing can fill it.
        encoder_cache: Whether option.encoder_cache_mb has an effect.
        errors: Why it cannot be served.
        warnings: What else the operator should know.
    """

    dtype: str
    dtype_reason: str
    shapes: Mapping[str, Any]
    token_bytes: int | None = None
    image_bytes: int | None = None
    beside_weights: int = 0
    takes_all: bool = False
    encoder_cache: bool = True
    errors: Sequence[Problem] = ()
    warnings: Sequence[Problem] = ()


@dataclass(frozen=True)
class DevicePlan:
    """How many replicas are started, each on `per_replica` of the `available` devices on `machines` machines."""

    replicas: int
    per_replica: int
    available: int
    machines: int = 1
    warnings: Sequence[Problem] = ()


@dataclass(frozen=True)
class PromptCheck:
    """What `lmi check` reports about prompts.

    Attributes:
        template: Which chat template is used, for people; None if it was not determined.
        image_tokens: The tokens of an image of a size such as "336x336", None for a size that the model does not
            accept. The whole is None for a model without images.
        errors: What would fail.
        warnings: What else the operator should know.
    """

    template: str | None = None
    image_tokens: Mapping[str, int | None] | None = None
    errors: Sequence[Problem] = ()
    warnings: Sequence[Problem] = ()


class Backend(Protocol):
    """A backend before anything is loaded: what it says of a model and a machine, and what makes its engine.

    Unless a method says otherwise, neither torch nor transformers nor the engine is imported.
    """

    @property
    def tool_parsers(self) -> Set[str]:
        """The names of its own tool parsers."""

    @property
    def reasoning_parsers(self) -> Set[str]:
        """The names of its own reasoning parsers."""

    takes_engine_arguments: bool
    """Whether unknown options are passed to its engine by their own names and checked there."""

    def build(self, configuration: Configuration, model_path: Path) -> Engine[Any]:
        """Return the engine, not yet loaded. Slow, since it imports what it needs. Raises ServingError."""

    def part(self, configuration: Configuration, model_path: Path) -> Lifecycle | None:
        """Return what runs here when another machine answers requests, not yet loaded; None if this one answers."""

    def examine(
        self,
        found: Findings,
        configuration: Configuration,
        directory: Path,
        config: Mapping[str, Any],
        contents: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Add this backend's objections to a model and to its weights, as far as their headers show.

        contents: the JSON files that are complete.
        """

    def chat_template(self, config: Mapping[str, Any]) -> object:
        """Return the template of the model's family, for a model without one; None if there is none."""

    def plan(
        self, configuration: Configuration, directory: Path, machine: Machine, shapes: Mapping[str, Any]
    ) -> DevicePlan:
        """Return replicas and their devices. shapes: see `Needs`. Raises InvalidConfiguration for too few devices."""

    def estimate(
        self, configuration: Configuration, directory: Path, config: Mapping[str, Any], machine: Machine
    ) -> Needs:
        """Return how much memory the model needs. May import torch and transformers."""

    def refused_options(
        self, configuration: Configuration, directory: Path | None, machine: Machine
    ) -> list[Problem]:
        """Return what the engine itself refuses before it loads a model. May import the engine.

        Args:
            configuration: The options.
            directory: The model's; None if it is not on this machine yet.
            machine: Where the engine would run.
        """

    def check_prompts(self, configuration: Configuration, directory: Path, machine: Machine) -> PromptCheck:
        """Return what a start would find out about prompts and images. Slow: it may start a process."""
