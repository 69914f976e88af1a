"""What OpenAI's turns and replies look like. The writers build them by hand; tests hold each to the shapes here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

_Finish = Literal["stop", "length", "tool_calls", "function_call"]


class ImageUrl(Struct):
    """url: https:, http: or data:. detail: without effect."""

    url: Annotated[str, Meta(min_length=1)]
    detail: str | None = None


class ImagePart(Struct):
    type: Literal["image_url", "input_image"]
    image_url: ImageUrl | Annotated[str, Meta(min_length=1)]


class Embeddings(Struct):
    """Each what torch.save writes of one tensor, in base64; the grid as numbers, too."""

    image_embeds: Annotated[str, Meta(min_length=1)]
    image_grid_thw: str | list[int | list[int]] | None = None


class EmbeddingsPart(Struct):
    """A picture's embeddings, [tokens, hidden size], where option.enable_mm_embeds allows them."""

    type: Literal["image_embeds"]
    image_embeds: Annotated[str, Meta(min_length=1)] | Embeddings


class TextPart(Struct):
    type: Literal["text", "input_text", "output_text"]
    text: str


class Message(Struct):
    """One turn. Roles are those that the model's chat template knows: system, user, assistant, tool, …"""

    role: Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,64}$")]
    content: str | list[str | dict[str, Any]]
    name: str | None = None
    tool_call_id: str | None = None


class AssistantMessage(Struct):
    """An earlier answer of the model's, which may be calls alone."""

    role: Literal["assistant"]
    tool_calls: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    content: str | None = None


class PromptTokensDetails(Struct, forbid_unknown_fields=True):
    """Parts of the prompt's tokens: found in the prefix cache, and pictures."""

    cached_tokens: int
    image_tokens: int


class Usage(Struct, forbid_unknown_fields=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Candidate(Struct, forbid_unknown_fields=True):
    """bytes: null for a piece of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenToken(Struct, forbid_unknown_fields=True):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[Candidate]


class ChatLogprobs(Struct, forbid_unknown_fields=True):
    content: list[ChosenToken]
    refusal: None


class CalledFunction(Struct):
    name: str
    arguments: str


class ToolCall(Struct):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Struct, forbid_unknown_fields=True):
    role: str
    content: str | None
    refusal: str | None = None
    tool_calls: list[ToolCall] = []
    function_call: CalledFunction | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class ChatChoice(Struct, forbid_unknown_fields=True):
    """stop_reason: the stop string or token id that ended the answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: _Finish
    stop_reason: str | int | None = None
    token_ids: list[int] = []


class PromptCandidate(Struct, forbid_unknown_fields=True):
    logprob: float
    rank: int
    decoded_token: str


class ChatCompletion(Struct, forbid_unknown_fields=True):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] = []
    prompt_text: str | None = None
    prompt_logprobs: list[dict[str, PromptCandidate] | None] = []
    system_fingerprint: str | None = None


class ChunkDelta(Struct, forbid_unknown_fields=True):
    role: str | None = None
    content: str | None = None
    tool_calls: list[dict[str, Any]] = []
    function_call: dict[str, str] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class ChunkChoice(Struct, forbid_unknown_fields=True):
    index: int
    delta: ChunkDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: _Finish | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] = []


class ChatCompletionChunk(Struct, forbid_unknown_fields=True):
    """`data:` of one event; the last event is `[DONE]`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] = []
    prompt_text: str | None = None
    system_fingerprint: str | None = None


class LegacyLogprobs(Struct, forbid_unknown_fields=True):
    """One entry for each token; the first token of an echoed prompt has no probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Struct, forbid_unknown_fields=True):
    """The choices of prompt p have the indexes p * n to p * n + n - 1."""

    index: int
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: _Finish | None
    stop_reason: str | int | None = None
    token_ids: list[int] = []
    prompt_token_ids: list[int] = []
    prompt_logprobs: list[dict[str, PromptCandidate] | None] = []


class Completion(Struct, forbid_unknown_fields=True):
    """Also the `data:` of one event of a stream; the last event is `[DONE]`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None


class Model(Struct, forbid_unknown_fields=True):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int = 0
    parent: str | None = None


class Models(Struct, forbid_unknown_fields=True):
    object: Literal["list"]
    data: list[Model]


class OpenAIErrorFields(Struct, forbid_unknown_fields=True):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(Struct, forbid_unknown_fields=True):
    error: OpenAIErrorFields
