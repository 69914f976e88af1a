"""The one request type in the middle: every API is read into it, every backend is driven by it.

The functions at the end check what a request asks for against the model: the length of its prompt, its token ids, and
the words that samplers match.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from engine.sampling_params import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_BREAKERS, SamplingParams, bounded
from handlers.errors import ContextExceeded, InvalidParameter, InvalidRequest

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerFast

    from handlers.images.memory import Share


Role = str
"""system, developer, user, assistant, tool, or another word that the model's chat template knows."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class LoadedImage:
    """A decoded image: upright, RGB, shared and therefore never changed.

    Attributes:
        image: The pixels.
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


@dataclass(slots=True)
class ImagePart:
    """An image named by the client; `loaded` is None until `handlers.images` has fetched and decoded it.

    Attributes:
        url: `https:`, `http:` or `data:`, exactly as the client wrote it (never logged).
        loaded: The decoded image.
        share: Its share of the memory for decoded images, while it is loaded.
        given: The image itself instead of a url. It is the caller's, of any mode, and never changed.
    """

    url: str
    loaded: LoadedImage | None = None
    share: Share | None = field(default=None, repr=False)
    given: Image | None = field(default=None, repr=False)
    characters: int = field(init=False)
    """The length of this part in the request's body, in characters."""

    def __post_init__(self) -> None:
        self.characters = len(self.url)

    def forget(self) -> None:
        """Drop the url, since a `data:` url holds the whole file: the image cannot be loaded again."""
        self.url = ""

    def release(self) -> None:
        """Drop the decoded image and its memory as soon as nobody needs it; safe to call twice."""
        self.loaded = None
        if self.share is not None:
            self.share.release()


@dataclass(slots=True)
class EmbeddingsPart:
    """An image sent as its embeddings; `loaded` and `share` are like those of an `ImagePart`.

    Attributes:
        rows: The output of `torch.save`, in base64, exactly as the client sent it (never logged).
        grid: Likewise, or the numbers themselves.
        loaded: The decoded tensors.
        share: Their share of the memory for decoded images, while they are loaded.
        given: The tensors instead of `rows` and `grid`; they are the caller's.
    """

    rows: str = field(repr=False)
    grid: str | Grid | None = field(default=None, repr=False)
    loaded: LoadedEmbeddings | None = None
    share: Share | None = field(default=None, repr=False)
    given: LoadedEmbeddings | None = field(default=None, repr=False)
    characters: int = field(init=False)
    """The length of this part in the request's body, in characters."""

    def __post_init__(self) -> None:
        self.characters = len(self.rows) + (len(self.grid) if isinstance(self.grid, str) else 0)

    def forget(self) -> None:
        """Drop what the client sent: the embeddings cannot be loaded again."""
        self.rows, self.grid = "", None

    def release(self) -> None:
        """Drop the tensors and their memory as soon as nobody needs them; safe to call twice."""
        self.loaded = None
        if self.share is not None:
            self.share.release()


MediaPart = ImagePart | EmbeddingsPart
"""What a prompt shows between its texts: an image, or its embeddings."""

Part = TextPart | MediaPart


@dataclass(slots=True)
class Message:
    """One turn.

    Attributes:
        role: Who speaks.
        parts: The texts and images, in reading order.
        text_only: Whether the client sent a string instead of a list of parts.
        name: The speaker's name.
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
        messages: The turns.
        add_generation_prompt: Whether the template begins the answer's turn.
        continue_final_message: Whether the answer continues the last message.
        template: The request's own template; None for the model's.
        template_kwargs: Further variables of the template.
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
        kind: How `value` is read.
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
        prompt: The chat or the text.
        sampling: How tokens are chosen.
        n: The number of choices.
        stream: Whether the reply is a stream.
        model: The model's name as the client wrote it.
        adapter: The adapter's name.
        priority: A smaller one is scheduled first.
        truncate_prompt_tokens: Keep only this many tokens of a prompt without images; -1 for as many as fit into the
            context.
        truncation_side: The side that is cut off.
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
        skip_special_tokens: Leave special tokens out of the text.
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

MOST_ALLOWED_TOKENS = 2**20
"""Some vocabularies are 260,000 tokens; a million hold the others up for about half a second."""

MOST_BAD_WORDS = 2**14
"""Spelled with a space and without, these take about as long."""

DRY_BREAKERS = ("\n", ":", '"', "*")
"""DRY's own sequence breakers, for requests that name none."""

MANY_CHARACTERS = 2000
"""Of words: more are tokenised in a thread, not on the event loop."""

_CHARACTERS_PER_TOKEN = 32
"""Far more than the tokens of any text have on average."""

_FEWEST = 2**17
"""Where the context is short. While it is tokenised, a character takes about 210 bytes."""


def longest_prompt(max_model_len: int) -> int:
    """Return the number of characters, or of a client's own token ids, beyond which a prompt is not processed.

    Tokenising a body of 60 MB would take a thread a minute and the process 8 GB, only to find that the tokens are too
    many.
    """
    return max(_FEWEST, _CHARACTERS_PER_TOKEN * max_model_len)


def require_known(request: GenerationRequest, vocab_size: int, image_token_id: int | None = None) -> None:
    """Raise InvalidRequest for token ids from the client that the model does not know.

    image_token_id may lie outside the vocabulary.
    """
    prompt = request.prompt
    if not isinstance(prompt, TextPrompt) or prompt.token_ids is None:
        return
    bad = next((t for t in prompt.token_ids if not 0 <= t < vocab_size and t != image_token_id), None)
    if bad is not None:
        raise InvalidRequest(
            f"the prompt holds the token id {str(bad)[:40]}; this model's are 0 to {vocab_size - 1}",
            param="prompt",
        )


def checked_tokens(
    request: GenerationRequest, token_ids: list[int], max_model_len: int, vocab_size: int
) -> list[int]:
    """Return the tokens of a prompt without images, truncated as the request says. Raises as `require_known`.

    `checked_sampling`, which counts the tokens, refuses whatever is longer than the context.
    """
    if request.truncate_prompt_tokens is None and len(token_ids) >= max_model_len:
        return token_ids
    require_known(request, vocab_size)
    most = request.truncate_prompt_tokens
    if most is None:
        return token_ids
    if most == -1:
        most = max_model_len - (request.sampling.max_tokens or 1)
        # A default leaves the prompt half of the context at least.
        most = max(1, most, max_model_len // 2 if request.max_tokens_is_default else 1)
    return token_ids[:most] if request.truncation_side == "right" else token_ids[-most:]


def checked_sampling(
    request: GenerationRequest, used: int, max_model_len: int, vocab_size: int
) -> RequestSampling:
    """Return the sampling parameters to use. used: tokens of the prompt, including images.

    Raises:
        InvalidRequest: The engine would have to refuse them.
    """
    params = request.sampling
    wanted = params.max_tokens
    if used == 0:
        raise InvalidRequest("the prompt is empty")
    if used >= max_model_len:
        raise ContextExceeded(prompt_tokens=used, max_tokens=None, context=max_model_len)
    if wanted is not None and used + wanted > max_model_len:
        if not request.max_tokens_is_default:
            raise ContextExceeded(prompt_tokens=used, max_tokens=wanted, context=max_model_len)
        params = msgspec.structs.replace(params, max_tokens=max_model_len - used)
    for name, ids in (("logit_bias", params.logit_bias or ()), ("stop_token_ids", params.stop_token_ids)):
        if len(ids) > MOST_TOKEN_IDS:
            raise InvalidParameter(name, f"names {len(ids)} tokens; allowed: {MOST_TOKEN_IDS}")
        if (bad := next((t for t in ids if not 0 <= t < vocab_size), None)) is not None:
            raise InvalidParameter(name, f"names a token that is not in the vocabulary: {str(bad)[:40]}")
    for name, ids in (
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("bad_words_token_ids", tuple(token for run in params.bad_words_token_ids for token in run)),
        ("dry_sequence_breaker_ids", params.dry_sequence_breaker_ids),
    ):
        if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
            bad = max(ids) if min(ids) >= 0 else min(ids)
            raise InvalidParameter(name, f"names a token that is not in the vocabulary: {str(bad)[:40]}")
    try:
        params.validate()
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
    return params


def check_totals(requests: Sequence[GenerationRequest]) -> None:
    """Raise InvalidRequest if the requests of one body ask for too much together."""
    answers = sum(request.n for request in requests)
    sampling = requests[0].sampling
    allowed = sampling.allowed_token_ids or ()
    for name, size, times, of, most in (
        ("allowed_token_ids", len(allowed), answers, "answers", MOST_ALLOWED_TOKENS),
        ("bad_words", len(sampling.bad_words), len(requests), "prompts", MOST_BAD_WORDS),
    ):
        if size * times > most:
            raise InvalidParameter(
                name, f"has {size} entries, for {times} {of}; allowed: {most} for all of them together"
            )


def count_characters(params: RequestSampling) -> int:
    """Return how many characters of bad words and sequence breakers have to be tokenised."""
    return sum(map(len, params.bad_words)) + sum(map(len, params.dry_sequence_breakers or ()))


def spelled(
    params: RequestSampling, tokenizer: PreTrainedTokenizerFast, *, words: bool = True
) -> RequestSampling:
    """Return the parameters with token ids instead of the words; unchanged if there are none. words: also bad_words.

    A bad word is matched as it is tokenised at the beginning of a text and after a space (as in vLLM), a breaker by
    the last token that it ends with inside a text (as DRY's author does).

    Raises:
        InvalidRequest: There are too many words, or they are too long.
    """
    if params.bad_words and words:
        runs = dict.fromkeys(params.bad_words_token_ids)
        for word in params.bad_words:
            for spelling in (word.lstrip(), f" {word.lstrip()}"):
                if run := tuple(_encode(tokenizer, spelling)):
                    runs[run] = None
        if (total := sum(map(len, runs))) > MAX_BAD_WORD_TOKENS:
            raise InvalidParameter(
                "bad_words",
                f"are {total} tokens, as they begin a text and after a space; allowed: {MAX_BAD_WORD_TOKENS} in all",
            )
        params = msgspec.structs.replace(params, bad_words=(), bad_words_token_ids=tuple(runs))
    texts = params.dry_sequence_breakers
    if params.dry_multiplier > 0.0 and (texts or (texts is None and not params.dry_sequence_breaker_ids)):
        ends = [_encode(tokenizer, f"a{text}")[-1:] for text in (DRY_BREAKERS if texts is None else texts)]
        ids = {*params.dry_sequence_breaker_ids, *(token for end in ends for token in end)}
        params = msgspec.structs.replace(
            params, dry_sequence_breakers=None, dry_sequence_breaker_ids=tuple(sorted(ids))
        )
    return params


def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
