"""The bodies of chat and text completions, as OpenAI documents and vLLM extends them, and what both have in common."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from engine.sampling_params import MAX_INTEGER, MAX_LOGPROBS, shown
from handlers.errors import InvalidParameter, InvalidRequest
from handlers.protocols.base import MAX_ANSWERS, MAX_PROMPTS, TokenId, described, reference
from handlers.protocols.body import refuse_unknown
from handlers.protocols.constraints import GUIDED
from handlers.protocols.known_names import KnownNames
from handlers.protocols.openai.events import ReplyOptions
from handlers.protocols.openai.messages import AssistantMessage, RequestMessage
from handlers.protocols.sampler_fields import (
    Bias,
    ChoiceCount,
    LogprobsCount,
    MaxTokens,
    SamplerFields,
    StopStrings,
    sampler_values,
    stop_strings,
)
from handlers.request import MOST_TOKEN_IDS, Constraint, GenerationRequest, Prompt, RequestSampling

Name = Annotated[str, Meta(max_length=512)]
_Priority = Annotated[int, Meta(ge=-MAX_INTEGER - 1, le=MAX_INTEGER)]

_SIDES = ("left", "right")

_Truncation = Annotated[int, Meta(ge=-1, le=MAX_INTEGER)]
"""-1 for as much as fits into the context."""

IGNORED = frozenset({
    "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "prompt_cache_options", "verbosity", "prediction",
    "spaces_between_special_tokens", "guided_decoding_backend", "length_penalty", "early_stopping",
    "session_id", "stream_interval", "return_token_offsets", "return_mm_kwargs", "mm_payload",
    "routed_experts_prompt_start",
})  # fmt: skip
READ_ELSEWHERE = frozenset({*GUIDED, "guided_whitespace_pattern"})
UNSUPPORTED = frozenset({
    "audio", "web_search_options", "moderation", "mm_processor_kwargs", "media_io_kwargs", "cache_salt",
    "prompt_embeds", "kv_transfer_params", "ec_transfer_params", "logprob_token_ids", "logits_processors",
    "vllm_xargs", "thinking_token_budget", "repetition_detection",
})  # fmt: skip
FALSE_ONLY = ("use_beam_search", "watermarking")

_Logprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": MAX_INTEGER}, "minItems": 1}


class StreamOptions(msgspec.Struct):
    """What a stream contains beside the answer."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class CommonBody(SamplerFields, kw_only=True):
    """Fields of both bodies beside the sampler's. Those of the first block are OpenAI's, the others vLLM's."""

    model: Name | None = None
    logit_bias: dict[str, Bias] | None = None
    n: ChoiceCount | None = None
    stop: str | StopStrings | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None

    truncate_prompt_tokens: _Truncation | None = None
    truncation_side: Literal["left", "right"] | None = None
    add_special_tokens: bool | None = None
    priority: _Priority | None = None
    request_id: Name | None = None
    adapters: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    structured_outputs: dict[str, Any] | None = None


class ChatBody(CommonBody, kw_only=True):
    """A chat. The fields of the first block are OpenAI's, the others vLLM's."""

    messages: Annotated[
        list[Any],
        described(
            RequestMessage,
            AssistantMessage,
            items={"anyOf": [reference(RequestMessage), reference(AssistantMessage)]},
            minItems=1,
        ),
    ]
    logprobs: bool | None = None
    top_logprobs: LogprobsCount | None = None
    max_completion_tokens: MaxTokens | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    functions: list[Any] | None = None
    function_call: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[str] | None = None
    reasoning_effort: str | None = None

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    echo: bool | None = None
    return_prompt_text: bool | None = None
    include_reasoning: bool | None = None


class CompletionBody(CommonBody, kw_only=True):
    """A text completion."""

    prompt: Annotated[
        str | list[str | TokenId | list[TokenId]],
        described(
            anyOf=[
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
                _TOKENS,
                {"type": "array", "items": _TOKENS, "minItems": 1, "maxItems": MAX_PROMPTS},
            ]
        ),
    ]
    best_of: ChoiceCount | None = None
    echo: bool | None = None
    logprobs: _Logprobs | None = None
    suffix: str | None = None


def known_names(shape: type[CommonBody]) -> KnownNames:
    """Return the names that are known in a body of this shape."""
    return KnownNames({*shape.__struct_fields__, *READ_ELSEWHERE}, {*IGNORED, *UNSUPPORTED, *FALSE_ONLY, "best_of"})


def common_sampling(asked: CommonBody) -> dict[str, Any]:
    """Return fields of RequestSampling, None for what was not given. Raises InvalidRequest."""
    stop = stop_strings(asked.stop, name="stop")
    if asked.truncate_prompt_tokens == 0:
        raise InvalidParameter("truncate_prompt_tokens", "is 0; allowed: from 1, or -1 for what fits")
    return sampler_values(asked) | {"logit_bias": _logit_bias(asked.logit_bias), "stop": stop}


def generation_request(
    asked: CommonBody,
    request_id: str,
    prompt: Prompt,
    sampling: RequestSampling,
    *,
    n: int,
    adapter: str | None,
    constraint: Constraint | None,
) -> GenerationRequest:
    """Return the request for the answers to one prompt. adapter: as in `Reader`."""
    return GenerationRequest(
        request_id=request_id,
        prompt=prompt,
        sampling=sampling,
        n=n,
        stream=bool(asked.stream),
        model=asked.model,
        adapter=adapter if adapter is not None else asked.adapters or None,
        priority=asked.priority or 0,
        truncate_prompt_tokens=asked.truncate_prompt_tokens,
        truncation_side=asked.truncation_side or "left",
        max_tokens_is_default=asked.max_tokens is None and sampling.max_tokens is not None,
        constraint=constraint,
    )


def reply_options(asked: CommonBody, reply_id: str, model: str, *, hide_tokens: bool = False) -> ReplyOptions:
    """Return what the reply shows. reply_id: its prefix included. model: the served model's name."""
    stream = asked.stream_options or StreamOptions()
    return ReplyOptions(
        reply_id=reply_id,
        model=asked.model or model,
        include_usage=bool(stream.include_usage),
        continuous_usage=bool(stream.continuous_usage_stats),
        token_ids=bool(asked.return_token_ids) and not hide_tokens,
        tokens_as_ids=bool(asked.return_tokens_as_token_ids),
    )


def check_stream(asked: CommonBody) -> None:
    """Raise InvalidRequest for fields that do not go with a stream, or need one."""
    if asked.stream_options is not None and not asked.stream:
        raise InvalidParameter("stream_options", "needs stream: true")
    if asked.stream and asked.prompt_logprobs is not None:
        raise InvalidParameter("prompt_logprobs", "cannot be streamed")


def count_answers(asked: CommonBody) -> int:
    """Return how many answers to one prompt are asked for. Raises InvalidRequest."""
    n = 1 if asked.n is None else asked.n
    if not 1 <= n <= MAX_ANSWERS:
        raise InvalidParameter("n", f"is {shown(n)}; allowed: from 1 to {MAX_ANSWERS}")
    return n


def refuse_unsupported(body: dict[str, Any], shape: type[CommonBody]) -> None:
    """Refuse fields that would change the answer and are not supported; other unknown fields are ignored."""
    if isinstance(options := body.get("stream_options"), dict):
        refuse_unknown(options, StreamOptions.__struct_fields__, "stream_options")
    side = body.get("truncation_side")
    if isinstance(side, str) and side not in _SIDES:  # Here because msgspec's message quotes it, however long it is.
        raise InvalidParameter("truncation_side", f"is {side[:40]!r}; allowed: {', '.join(_SIDES)}")
    for name in body.keys() - shape.__struct_fields__:
        if name in UNSUPPORTED and body[name] is not None:
            raise InvalidParameter(name, "is not supported by this server: leave it out")
        if name in FALSE_ONLY and body[name]:
            raise InvalidParameter(name, "is not supported by this server: leave it out")
        if name == "best_of" and body[name] not in (None, 1):
            raise InvalidRequest("best_of is not supported by this server: ask for n answers", param=name)


def _logit_bias(bias: dict[str, float] | None) -> dict[int, float] | None:
    if not bias:
        return None
    if len(bias) > MOST_TOKEN_IDS:
        raise InvalidParameter("logit_bias", f"names {len(bias)} tokens; allowed: {MOST_TOKEN_IDS}")
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) <= MAX_INTEGER):
            raise InvalidRequest(f"logit_bias: {key[:40]!r} is not a token id", param="logit_bias")
    return {int(key): value for key, value in bias.items()}
