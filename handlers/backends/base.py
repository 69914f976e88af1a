"""What an engine must do (tokens in, tokens out), what each backend must do, and what a request gets from them.

`handlers.pipeline` stands between the two: it makes tokens of a `GenerationRequest` and `Delta`s of an engine's
tokens, for every engine. All of them raise `handlers.errors.ServingError`, and only that, for what clients can be told.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence, Set
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from engine.config import Vocabulary
from engine.messages import Logprobs
from handlers.backends.adapters import AdapterStore
from handlers.parsers.base import AnswerFormats
from handlers.request import Constraint, PicturePart
from handlers.sampling import RequestSampling
from properties.problem import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from engine.machine import Machine
    from handlers.backends.model_files import Findings
    from handlers.prompts.renderer import PromptRenderer
    from properties.configuration import Configuration
    from properties.settings import Settings

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

    embeddings: in place of images, where the model takes these. default_sampling: fields of `RequestSampling` that the
    model's generation_config.json sets, for requests that do not name them.
    image_placeholder: what stands for an image in a prompt in the model's own format, as text; None where that is not
    known. special_token_ids: tokens that are not text, such as the ends of turns. special_tokens: texts of all tokens
    that `skip_special_tokens` skips.
    dtype: of weights and activations. device_type: "cpu", "cuda". compute_type: the devices of one replica, as
    "1-nvidia-a10g". cache_tokens: how many have room in the key/value cache of all replicas together; 0 where that is
    not known. prompt_threads: how many prompts are prepared at the same time. chat_templates: names that requests may
    choose the model's own templates by, each with the variables that it reads. formats: how answers are read, where the
    options name parsers of the backend's own; None where they name ours.
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


class Lifecycle(Protocol):
    """Whatever answers requests, from its load to its close. `load` is called once; all runs on the event loop."""

    async def load(self) -> None:
        """Return when it can answer. Raises `ServingError` with what to do when it cannot be loaded."""

    @property
    def capabilities(self) -> Capabilities:
        """Valid once `load` has returned."""

    @property
    def adapters(self) -> AdapterStore | None:
        """What changes adapters while it serves, once `load` has returned; None where none can be changed."""

    def health(self) -> Health: ...

    def stats(self) -> BackendStats: ...

    async def close(self) -> None:
        """Abort what runs and release everything. Never raises."""


@dataclass(frozen=True, slots=True)
class PromptModel:
    """What the pipeline must know of an engine's model to make tokens of prompts and text of tokens.

    vocab_size: of the model's logits. threads: where long prompts are rendered. vocabulary: for compiling constraints;
    None where the engine compiles them by itself. json_whitespace: what `Constraint.whitespace_pattern` is where a
    request says nothing of it. spells_words: the engine makes tokens of `RequestSampling.bad_words` itself.
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

    params: checked; max_tokens is final once the prompt is prepared. n: choices. constraint: holds for each of them;
    grammar: the same as llguidance reads it, None where there is none or the engine compiles constraints by itself.
    adapter, model: names that a request may choose an adapter by.
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
    """A prompt as the engine takes it.

    token_ids: with all tokens of the images. images: (offset, length) of each in them, in order.
    """

    token_ids: list[int]
    images: Sequence[tuple[int, int]]

    def discard(self) -> None:
        """Give back what it holds: it is not handed to `Engine.generate`."""


@dataclass(slots=True)
class TokenOutput:
    """What a step added to choice `index`.

    finish: why the choice has ended, None while it goes on. stop_token: the stop id that ended it.
    by_token: its last token ended it, the model's end-of-sequence or a stop id. queued: seconds that the request waited
    for its first step. prompt_logprobs: once, an entry for each token of the prompt; the first is None.
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
        """No more is wanted of a choice; what still comes of it is not read."""

    async def aclose(self) -> None:
        """Abort what still runs, within one engine step. Safe to call twice and after the end."""


Prepared = TypeVar("Prepared", bound=PreparedPrompt)


class Engine(Lifecycle, Protocol[Prepared]):
    """Token ids and images in, token ids out."""

    @property
    def model(self) -> PromptModel:
        """Valid once `load` has returned."""

    async def prepare(
        self, token_ids: list[int], parts: Sequence[PicturePart], request: EngineRequest | None
    ) -> Prepared:
        """Put the images in the place of their tokens; the loaded images are released here.

        token_ids: of the rendered prompt, with one image token for each image. request: what is to be generated, which
        is refused before its images cost anything; None where only tokens are wanted.
        Raises InvalidRequest (ImageError for an image) and Unavailable.
        """

    async def generate(self, prompt: Prepared, request: EngineRequest) -> TokenStream:
        """Return when the engine has taken the request. The prompt is the engine's from then on."""


@dataclass(frozen=True)
class Needs:
    """What a backend says of a model that it would serve on this machine.

    shapes: config.json, completed. token_bytes: keys and values of one token; None where the shapes tell them.
    image_bytes: kept for each image of a running request. beside_weights: bytes of what is held beside the weights.
    takes_all: the cache is as large as it was asked to be, whatever can fill it. encoder_cache: it follows
    option.encoder_cache_mb.
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
    """copies: replicas that are started, each on `per_copy` devices of the `available` ones on `machines` machines."""

    copies: int
    per_copy: int
    available: int
    machines: int = 1
    warnings: Sequence[Problem] = ()


@dataclass(frozen=True)
class PromptFacts:
    """What `lmi check` says of prompts. template: which chat template is used, for people; None where nobody was asked.

    image_tokens: size, as "336x336", -> tokens of such an image, None for a size that the model does not take; the
    whole is None for a model without images.
    """

    template: str | None = None
    image_tokens: Mapping[str, int | None] | None = None
    errors: Sequence[Problem] = ()
    warnings: Sequence[Problem] = ()


class Backend(Protocol):
    """A backend before anything is loaded: what it says of a model and a machine, and what makes its engine.

    Where nothing else is said, neither torch nor transformers nor the engine is imported.
    """

    @property
    def tool_parsers(self) -> Set[str]:
        """Names of parsers of its own."""

    @property
    def reasoning_parsers(self) -> Set[str]:
        """Names of parsers of its own."""

    takes_engine_arguments: bool
    """Options that are not ours reach its engine by their own names, and are judged there."""

    def build(self, configuration: Configuration, model_path: Path) -> Engine[Any]:
        """The engine, not yet loaded. Slow: imports what it needs. Raises ServingError."""

    def part(self, configuration: Configuration, model_path: Path) -> Lifecycle | None:
        """What runs here where another machine answers requests, not yet loaded; None where this one does."""

    def examine(
        self,
        found: Findings,
        configuration: Configuration,
        directory: Path,
        config: Mapping[str, Any],
        contents: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Add what is wrong with a model, as this backend serves it. contents: of the JSON files that are whole."""

    def weight_problems(
        self, settings: Settings, directory: Path, config: Mapping[str, Any]
    ) -> Iterator[str]:
        """Why the weights cannot be loaded, as far as their headers tell."""

    def chat_template(self, config: Mapping[str, Any]) -> object:
        """The template of the model's family, for a model whose files have none; None where there is none."""

    def plan(self, configuration: Configuration, machine: Machine, shapes: Mapping[str, Any]) -> DevicePlan:
        """Replicas and their devices. shapes: see `Needs`. Raises InvalidConfiguration for too few devices."""

    def estimate(
        self, configuration: Configuration, directory: Path, config: Mapping[str, Any], machine: Machine
    ) -> Needs:
        """What the model needs of memory. May import torch and transformers."""

    def format_warnings(self, configuration: Configuration, directory: Path) -> list[Problem]:
        """What is served otherwise than the options say, because of the format that the model is in."""

    def refused_options(
        self, configuration: Configuration, directory: Path | None, machine: Machine
    ) -> list[Problem]:
        """What the engine itself refuses before it loads a model; directory: None where there is none yet.

        May import the engine.
        """

    def prompt_facts(self, configuration: Configuration, directory: Path, machine: Machine) -> PromptFacts:
        """What the start would find out about prompts and images. Slow: may ask a process for it."""
