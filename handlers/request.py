"""The one request type in the middle: every API is read into it, every backend is driven by it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from handlers.sampling import RequestSampling

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL.Image import Image

    from handlers.images.memory import Share

Role = str
"""system, developer, user, assistant, tool, or another word that the model's chat template knows."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class LoadedImage:
    """A decoded picture: upright, RGB, shared and so never changed.

    digest: SHA-256 of the encoded file, from which the pixels follow, or of the pixels; it keys every cache.
    """

    image: Image
    digest: bytes


Grid = tuple[int, int, int]
"""How a picture's patches stand: frames, rows and columns, as Qwen2-VL and its kin count them."""


@dataclass(frozen=True, slots=True)
class LoadedEmbeddings:
    """What a model's vision encoder and projector made of a picture, elsewhere; finite numbers, never changed.

    rows: float32, [tokens, hidden size]. largest: magnitude of any of them. grid: for models that want it.
    digest: SHA-256 of the files they came in, and no picture's digest.
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
    """A picture named by the client; `loaded` is None until `handlers.images` has fetched and decoded it.

    url: `https:`, `http:` or `data:`, exactly as the client wrote it (never logged).
    share: of the memory for decoded pictures, while it is loaded.
    given: the picture itself, in place of a url: the caller's own, of any mode, and never changed.
    """

    url: str
    loaded: LoadedImage | None = None
    share: Share | None = field(default=None, repr=False)
    given: Image | None = field(default=None, repr=False)
    characters: int = field(init=False)
    """That it takes in the request's body."""

    def __post_init__(self) -> None:
        self.characters = len(self.url)

    def forget(self) -> None:
        """Let go of the url, of which a `data:` one holds the whole file: the image cannot be loaded again."""
        self.url = ""

    def release(self) -> None:
        """Let go of the decoded picture and of its memory, as early as nobody needs it; safe to call twice."""
        self.loaded = None
        if self.share is not None:
            self.share.release()


@dataclass(slots=True)
class EmbeddingsPart:
    """A picture sent as its embeddings; `loaded` and `share` are like those of an `ImagePart`.

    rows, grid: what `torch.save` wrote, in base64, exactly as the client sent it (never logged); the second also as
    the numbers themselves. given: the numbers, in place of both: the caller's own.
    """

    rows: str = field(repr=False)
    grid: str | Grid | None = field(default=None, repr=False)
    loaded: LoadedEmbeddings | None = None
    share: Share | None = field(default=None, repr=False)
    given: LoadedEmbeddings | None = field(default=None, repr=False)
    characters: int = field(init=False)
    """That it takes in the request's body."""

    def __post_init__(self) -> None:
        self.characters = len(self.rows) + (len(self.grid) if isinstance(self.grid, str) else 0)

    def forget(self) -> None:
        """Let go of what the client sent: the embeddings cannot be loaded again."""
        self.rows, self.grid = "", None

    def release(self) -> None:
        """Let go of the numbers and of their memory, as early as nobody needs them; safe to call twice."""
        self.loaded = None
        if self.share is not None:
            self.share.release()


PicturePart = ImagePart | EmbeddingsPart
Part = TextPart | PicturePart


@dataclass(slots=True)
class Message:
    """One turn. `text_only` remembers that the client sent a bare string instead of a list of parts.

    tool_calls: OpenAI's, arguments as JSON text. reasoning: that of an earlier answer, for templates that show it.
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
    """Turns that still have to go through the model's chat template.

    add_special_tokens: those that the tokenizer puts around a text, beside the template's own; None as the model's
    processor does it.
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
    """A prompt without turns: text and pictures in order. `token_ids` replaces `parts` when the client sent ids."""

    parts: list[Part]
    token_ids: list[int] | None = None
    add_special_tokens: bool = True


Prompt = ChatPrompt | TextPrompt


def prompt_parts(prompt: Prompt) -> Iterator[Part]:
    """Its texts and pictures in reading order."""
    if isinstance(prompt, ChatPrompt):
        for message in prompt.messages:
            yield from message.parts
    else:
        yield from prompt.parts


def pictures(prompt: Prompt) -> Iterator[PicturePart]:
    """Its pictures in reading order."""
    return (part for part in prompt_parts(prompt) if not isinstance(part, TextPart))


@dataclass(frozen=True, slots=True)
class Constraint:
    """What every answer to a request must look like, token by token.

    kind, value: `json_object` None; `json_schema` the schema as JSON text; `regex` one that matches the whole answer;
    `choice` the allowed answers as a JSON array; `grammar` Lark, or GBNF-like EBNF as vLLM takes it.
    param: the client's field it came from, for error messages.
    whitespace_pattern: a regular expression for the white space inside JSON; "" for none, None for any.
    """

    kind: Literal["json_object", "json_schema", "regex", "choice", "grammar"]
    value: str | None = None
    param: str = "response_format"
    whitespace_pattern: str | None = None


@dataclass(slots=True)
class GenerationRequest:
    """One prompt to answer `n` times.

    deadline: `time.monotonic()` seconds after which the answer is worthless and is aborted; None for never.
    truncate_prompt_tokens: keep only this many tokens of a prompt without pictures, the last ones unless
    truncation_side says that the right is cut off; -1 for as many as the context has room for.
    max_tokens_is_default: the client did not ask for `sampling.max_tokens`: where the context has less room,
    the answer is shorter. text_bytes: size of the body it came in without its pictures: what rendering may cost.
    constraint: holds for each of the n answers; None for free text.
    """

    request_id: str
    prompt: Prompt
    sampling: RequestSampling
    n: int = 1
    stream: bool = False
    model: str | None = None
    adapter: str | None = None
    priority: int = 0
    deadline: float | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] = "left"
    max_tokens_is_default: bool = False
    text_bytes: int = 0
    constraint: Constraint | None = None
    arrival: float = field(default_factory=time.monotonic)

    def images(self) -> Iterator[PicturePart]:
        """The request's pictures in reading order: the order of their index in error messages.

        All are pictures or all are embeddings.
        """
        return pictures(self.prompt)
