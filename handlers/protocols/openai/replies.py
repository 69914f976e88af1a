"""OpenAI's replies: the structs that are both written and described by `/openapi.json`.

Their fields are written in this order. A field that is left out unless the client asks for it is `UNSET`; None is
written as null.
"""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from handlers.deltas import PositionLogprobs, PromptStats, TokenLogprob
from handlers.errors import ServingError
from handlers.protocols.base import ErrorFormat

FinishReason = Literal["stop", "length", "tool_calls", "function_call"]

_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    424: "model_code_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class PromptTokensDetails(Struct, forbid_unknown_fields=True):
    """Parts of the prompt's tokens: those found in the prefix cache, and those of images."""

    cached_tokens: int
    image_tokens: int


class Usage(Struct, forbid_unknown_fields=True):
    """Images count among the prompt's tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, stats: PromptStats, completion_tokens: int) -> Usage:
        """Return the usage of a prompt and its choices."""
        details = PromptTokensDetails(stats.cached_tokens, stats.image_tokens)
        return cls(stats.prompt_tokens, completion_tokens, stats.prompt_tokens + completion_tokens, details)


class Candidate(Struct, forbid_unknown_fields=True):
    """A token that was likely. `bytes` is null for part of a character, which its text cannot show."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenToken(Candidate, forbid_unknown_fields=True):
    """A token of the answer, and the candidates that were most likely in its place."""

    top_logprobs: list[Candidate]


class ChatLogprobs(Struct, forbid_unknown_fields=True):
    """The `logprobs` object of a chat's choice."""

    content: list[ChosenToken]
    refusal: None = None

    @classmethod
    def of(cls, positions: list[PositionLogprobs] | None, top: int, *, as_ids: bool) -> ChatLogprobs:
        """Return the object of some tokens, with `top` candidates for each. as_ids: see `token_text`."""
        return cls(
            [
                ChosenToken(
                    *_token(position.chosen, as_ids),
                    [Candidate(*_token(candidate, as_ids)) for candidate in position.top[:top]],
                )
                for position in positions or ()
            ]
        )


class PromptCandidate(Struct, forbid_unknown_fields=True):
    """A token at a position of the prompt, in vLLM's shape."""

    logprob: float
    rank: int
    decoded_token: str


PromptPosition = dict[str, PromptCandidate] | None
"""The token of the prompt and the likeliest others, by token id; None for the first token."""


class CalledFunction(Struct):
    """A function that is called; `arguments` is a JSON object as text."""

    name: str
    arguments: str


class ToolCall(Struct):
    """A call in a whole message."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class CalledFunctionDelta(Struct, kw_only=True):
    """What a chunk adds to a call: the name comes first, then pieces of the arguments' text."""

    name: str | UnsetType = UNSET
    arguments: str


class ToolCallDelta(Struct, kw_only=True):
    """What a chunk adds to a call; the first chunk of a call has its id and type."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: CalledFunctionDelta


class ChatMessage(Struct, forbid_unknown_fields=True):
    """A whole answer. `reasoning` is vLLM's name; `reasoning_content` its former name, for DeepSeek's clients."""

    role: str
    content: str | None
    refusal: str | None = None
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    function_call: CalledFunction | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatDelta(Struct, forbid_unknown_fields=True):
    """What a chunk adds to the message; the role is in a choice's first chunk."""

    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    function_call: CalledFunctionDelta | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChoice(Struct, forbid_unknown_fields=True):
    """One choice; `stop_reason` is the stop string or token id that ended it."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    token_ids: list[int] | UnsetType = UNSET


class ChunkChoice(Struct, forbid_unknown_fields=True):
    """What a chunk adds to a choice; `stop_reason` comes with the finish_reason."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class CompletionLogprobs(Struct, forbid_unknown_fields=True):
    """One entry for each token; the first token of an echoed prompt has no probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Struct, forbid_unknown_fields=True):
    """The choices of prompt p have the indexes p * n to p * n + n - 1."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: list[PromptPosition] | UnsetType = UNSET


class _Head(Struct, forbid_unknown_fields=True):
    """The first fields of every reply and chunk; `created` is in seconds since the epoch."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(_Head):
    """A whole reply to a chat; `prompt_text` is the prompt as the chat template rendered it."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_text: str | UnsetType = UNSET
    prompt_logprobs: list[PromptPosition] | UnsetType = UNSET


class ChatCompletionChunk(_Head):
    """The `data:` of one event; the last event is `[DONE]`. The first chunk has what is shown of the prompt."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_text: str | UnsetType = UNSET
    usage: Usage | UnsetType | None = UNSET


class Completion(_Head):
    """A text completion; also the `data:` of one event of a stream, whose last event is `[DONE]`."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class Model(Struct, forbid_unknown_fields=True):
    """A served model, or an adapter, whose `parent` is its model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | UnsetType = UNSET
    max_model_len: int | UnsetType = UNSET


class Models(Struct, forbid_unknown_fields=True):
    """The served models and their adapters."""

    object: Literal["list"]
    data: list[Model]


class OpenAIErrorFields(Struct, forbid_unknown_fields=True):
    """An error; `param` is the path of the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(Struct, forbid_unknown_fields=True):
    """A refusal, or the last event of a stream that broke."""

    error: OpenAIErrorFields

    @classmethod
    def of(cls, error: ServingError) -> OpenAIError:
        """Return what is written of an error."""
        kind = _ERROR_TYPES.get(error.status, "invalid_request_error")
        return cls(OpenAIErrorFields(error.message, kind, error.param, error.kind))


OPENAI_ERRORS = ErrorFormat(OpenAIError.of)


def prompt_position(position: PositionLogprobs | None, top: int | None = None) -> PromptPosition:
    """Return the token and the `top` most likely others, or all others for None, by token id."""
    if position is None:
        return None
    return {
        str(token.token_id): PromptCandidate(token.logprob, token.rank, token.text)
        for token in (position.chosen, *position.top[:top])
    }


def token_text(token: TokenLogprob, as_id: bool) -> str:
    """Return a token's text; with as_id its id, for clients that must distinguish tokens that look the same."""
    return f"token_id:{token.token_id}" if as_id else token.text


def _token(token: TokenLogprob, as_id: bool) -> tuple[str, float, list[int] | None]:
    piece = "\ufffd" in token.text
    return token_text(token, as_id), token.logprob, None if piece else list(token.text.encode())
