"""The fields that chat and text completions share: OpenAI's own and those that vLLM adds."""

from __future__ import annotations

import logging
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from engine.sampling_params import MAX_INTEGER, MAX_STOP_STRINGS, shown
from handlers.errors import InvalidRequest
from handlers.prompts.limits import MOST_TOKEN_IDS
from handlers.protocols.body import refuse_unknown
from handlers.protocols.constraints import GUIDED
from handlers.protocols.misspelt import KnownNames
from handlers.protocols.sampler_fields import SamplerFields, sampler_values

log = logging.getLogger(__name__)

_Bias = Annotated[float, Meta(ge=-100, le=100)]
Name = Annotated[str, Meta(max_length=512)]
_StopStrings = Annotated[list[str], Meta(max_length=MAX_STOP_STRINGS)]
_Priority = Annotated[int, Meta(ge=-MAX_INTEGER - 1, le=MAX_INTEGER)]

_SIDES = ("left", "right")

_Truncation = Annotated[int, Meta(ge=-1, le=MAX_INTEGER)]
"""-1 for as much as the context has room for."""

MAX_ANSWERS = 128
"""Most answers to one prompt (`n`): OpenAI's limit."""

IGNORED = frozenset(
    {
        "user",
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prompt_cache_options",
        "verbosity",
        "prediction",
        "spaces_between_special_tokens",
        "guided_decoding_backend",
        "length_penalty",
        "early_stopping",
        "session_id",
        "stream_interval",
        "return_token_offsets",
        "return_mm_kwargs",
        "mm_payload",
        "routed_experts_prompt_start",
    }
)
READ_ELSEWHERE = frozenset({*GUIDED, "guided_whitespace_pattern"})
UNSUPPORTED = frozenset(
    {
        "audio",
        "web_search_options",
        "moderation",
        "mm_processor_kwargs",
        "media_io_kwargs",
        "cache_salt",
        "prompt_embeds",
        "kv_transfer_params",
        "ec_transfer_params",
        "logprob_token_ids",
        "logits_processors",
        "vllm_xargs",
        "thinking_token_budget",
        "repetition_detection",
    }
)
FALSE_ONLY = ("use_beam_search", "watermarking")


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class CommonBody(SamplerFields, kw_only=True):
    """Fields of both bodies beside the sampler's. Those of the first block are OpenAI's, the others vLLM's."""

    model: Name | None = None
    logit_bias: dict[str, _Bias] | None = None
    n: int | None = None
    stop: str | _StopStrings | None = None
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


def common_sampling(asked: CommonBody) -> dict[str, Any]:
    """Fields of SamplingParams, None for what was not given. Raises InvalidRequest."""
    stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop
    if stop is not None and "" in stop:
        raise InvalidRequest("stop: an empty string cannot end an answer", param="stop")
    if asked.truncate_prompt_tokens == 0:
        raise InvalidRequest(
            "truncate_prompt_tokens is 0; allowed: from 1, or -1 for what fits",
            param="truncate_prompt_tokens",
        )
    values = sampler_values(asked)
    values["logit_bias"] = _logit_bias(asked.logit_bias)
    values["stop"] = tuple(stop) if stop is not None else None
    return values


def check_stream(asked: CommonBody) -> bool:
    """Whether a stream is asked for. Raises InvalidRequest for what only one of both forms can have."""
    stream = bool(asked.stream)
    if asked.stream_options is not None and not stream:
        raise InvalidRequest("stream_options needs stream: true", param="stream_options")
    if stream and asked.prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs cannot be streamed", param="prompt_logprobs")
    return stream


def count_answers(asked: CommonBody) -> int:
    n = 1 if asked.n is None else asked.n
    if not 1 <= n <= MAX_ANSWERS:
        raise InvalidRequest(f"n is {shown(n)}; allowed: from 1 to {MAX_ANSWERS}", param="n")
    return n


def refuse_unsupported(body: dict[str, Any], shape: type[CommonBody]) -> None:
    """What would change the answer and is not there is refused; all else that `shape` does not know is dropped."""
    if isinstance(options := body.get("stream_options"), dict):
        refuse_unknown(options, StreamOptions.__struct_fields__, "stream_options")
    side = body.get("truncation_side")
    if (
        isinstance(side, str) and side not in _SIDES
    ):  # Here because msgspec's message quotes it, however long it is.
        raise InvalidRequest(
            f"truncation_side is {side[:40]!r}; allowed: {', '.join(_SIDES)}", param="truncation_side"
        )
    for name in body.keys() - shape.__struct_fields__:
        if name in UNSUPPORTED and body[name] is not None:
            raise InvalidRequest(f"{name} is not supported by this server: leave it out", param=name)
        if name in FALSE_ONLY and body[name]:
            raise InvalidRequest(f"{name} is not supported by this server: leave it out", param=name)
        if name == "best_of" and body[name] not in (None, 1):
            raise InvalidRequest("best_of is not supported by this server: ask for n answers", param=name)
        if name not in IGNORED and name not in READ_ELSEWHERE:
            log.debug("unknown field ignored: %.80s", name)


def known_names(shape: type[CommonBody]) -> KnownNames:
    """Of a body of this shape."""
    return KnownNames(
        {*shape.__struct_fields__, *READ_ELSEWHERE}, {*IGNORED, *UNSUPPORTED, *FALSE_ONLY, "best_of"}
    )


def _logit_bias(bias: dict[str, float] | None) -> dict[int, float] | None:
    if not bias:
        return None
    if len(bias) > MOST_TOKEN_IDS:
        raise InvalidRequest(
            f"logit_bias names {len(bias)} tokens; allowed: {MOST_TOKEN_IDS}", param="logit_bias"
        )
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) <= MAX_INTEGER):
            raise InvalidRequest(f"logit_bias: {key[:40]!r} is no token id", param="logit_bias")
    return {int(key): value for key, value in bias.items()}
