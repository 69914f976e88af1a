"""What an engine must do: tokens in, tokens out.

`handlers.pipeline` turns a request into tokens and an engine's tokens into text, for every engine. For anything that a
client may learn, both raise `handlers.errors.ServingError` and nothing else.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence, Set
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from engine.config import Vocabulary
from engine.messages import Logprobs
from handlers.deltas import FinishReason
from handlers.errors import EngineFailed, Unavailable
from handlers.parsers.base import AnswerFormats
from handlers.request import Constraint, MediaPart, RequestSampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from handlers.backends.adapters import AdapterStore
    from handlers.prompts.renderer import PromptRenderer


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


def compute_type(device: str, count: int) -> str:
    """Return the devices of one replica as TGI's launcher names them: "1-nvidia-a10g", "cpu"."""
    return device if device == "cpu" else f"{count}-{device.lower().replace(' ', '-')}"


def no_engine(*, given_up: bool = False) -> Unavailable:
    """Return the error of a request that comes while there is no engine. given_up: whether there will be none."""
    text = "the engine failed too often" if given_up else "the engine is being restarted; try again"
    return Unavailable(text, retry_after=5)


def engine_died() -> EngineFailed:
    """Return the error of a request whose engine has died."""
    return EngineFailed("the engine process died while it worked on this request; try again")


class Lifecycle(Protocol):
    """A loaded model or handler that answers requests. All methods run on the event loop."""

    @property
    def capabilities(self) -> Capabilities:
        """What requests may ask for."""

    @property
    def adapters(self) -> AdapterStore | None:
        """The store that changes adapters while it serves; None if none can be changed."""

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
        """The model's tokenizer and renderer."""

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
