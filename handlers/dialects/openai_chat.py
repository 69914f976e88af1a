"""Chat completions, as OpenAI documents them and vLLM extends them: from the body to a `Task`."""

from __future__ import annotations

import logging
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from engine.sampling_params import MAX_INTEGER, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS, shown
from handlers.dialects.base import Conventions, Task, TokenCount, TokenId, sampling_params
from handlers.dialects.body import convert
from handlers.dialects.openai_messages import read_messages
from handlers.dialects.openai_reply import ChatWriter
from handlers.errors import InvalidRequest
from handlers.request import ChatPrompt, GenerationRequest

log = logging.getLogger(__name__)

_Bias = Annotated[float, Meta(ge=-100, le=100)]
_Name = Annotated[str, Meta(max_length=512)]
_StopStrings = Annotated[list[str], Meta(max_length=MAX_STOP_STRINGS)]
_Priority = Annotated[int, Meta(ge=-MAX_INTEGER - 1, le=MAX_INTEGER)]

MAX_ANSWERS = 128
"""Most answers to one prompt (`n`): OpenAI's limit."""

_IGNORED = frozenset(
    {
        "user",
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "verbosity",
        "prediction",
        "parallel_tool_calls",
        "spaces_between_special_tokens",
        "include_reasoning",
    }
)
_UNSUPPORTED = frozenset(
    {
        "audio",
        "web_search_options",
        "moderation",
        "structured_outputs",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "guided_decoding_backend",
        "allowed_token_ids",
        "bad_words",
        "chat_template",
        "mm_processor_kwargs",
        "media_io_kwargs",
        "cache_salt",
        "kv_transfer_params",
        "logits_processors",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "vllm_xargs",
        "thinking_token_budget",
        "repetition_detection",
    }
)
_FALSE_ONLY = ("use_beam_search", "echo", "add_special_tokens")


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class ChatBody(msgspec.Struct):
    """A request's scalar fields. Those of the first block are OpenAI's, the others vLLM's."""

    messages: list[Any]
    model: _Name | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, _Bias] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | _StopStrings | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    functions: list[Any] | None = None
    function_call: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    modalities: list[str] | None = None
    reasoning_effort: str | None = None

    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: TokenCount | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    priority: _Priority | None = None
    request_id: _Name | None = None
    adapters: str | None = None


def read_chat(
    body: dict[str, Any], conventions: Conventions, *, request_id: str, adapter: str | None = None
) -> Task:
    """Raises InvalidRequest naming the field; nothing has been fetched or generated then.

    adapter: named in a header; it wins over the body's `adapters`.
    """
    _refuse_unsupported(body)
    asked = convert(body, ChatBody)
    _refuse_tools_and_formats(asked)
    stream = bool(asked.stream)
    if asked.stream_options is not None and not stream:
        raise InvalidRequest("stream_options needs stream: true", param="stream_options")
    if stream and asked.prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs cannot be streamed", param="prompt_logprobs")
    n = 1 if asked.n is None else asked.n
    if not 1 <= n <= MAX_ANSWERS:
        raise InvalidRequest(f"n is {shown(n)}; allowed: from 1 to {MAX_ANSWERS}", param="n")

    names = {} if asked.max_completion_tokens is None else {"max_tokens": "max_completion_tokens"}
    model = asked.model or conventions.model_name
    request = GenerationRequest(
        request_id=request_id,
        prompt=_prompt(asked),
        sampling=sampling_params(_sampling(asked), conventions.sampling, names),
        n=n,
        stream=stream,
        model=asked.model,
        adapter=adapter if adapter is not None else asked.adapters or None,
        priority=asked.priority or 0,
        truncate_prompt_tokens=asked.truncate_prompt_tokens,
        names=names,
    )
    options = asked.stream_options or StreamOptions()
    writer = ChatWriter(
        reply_id=f"chatcmpl-{asked.request_id or request_id}",
        model=model,
        top_logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        include_usage=bool(options.include_usage),
        continuous_usage=bool(options.continuous_usage_stats),
    )
    return Task([request], writer)


def _prompt(asked: ChatBody) -> ChatPrompt:
    add, resume = asked.add_generation_prompt, bool(asked.continue_final_message)
    if add and resume:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt exclude each other",
            param="continue_final_message",
        )
    variables = dict(asked.chat_template_kwargs or {})
    if asked.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", asked.reasoning_effort)
    if asked.documents is not None:
        variables.setdefault("documents", asked.documents)
    return ChatPrompt(
        messages=read_messages(asked.messages),
        add_generation_prompt=not resume if add is None else add,
        continue_final_message=resume,
        template_kwargs=variables,
    )


def _sampling(asked: ChatBody) -> dict[str, Any]:
    top = asked.top_logprobs
    if top is not None and top > 0 and not asked.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    if top is not None and not 0 <= top <= 20:
        raise InvalidRequest(f"top_logprobs is {shown(top)}; allowed: from 0 to 20", param="top_logprobs")
    stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop
    if stop is not None and "" in stop:
        raise InvalidRequest("stop: an empty string cannot end an answer", param="stop")
    return {
        "max_tokens": asked.max_tokens
        if asked.max_completion_tokens is None
        else asked.max_completion_tokens,
        "min_tokens": asked.min_tokens,
        "temperature": asked.temperature,
        "top_k": asked.top_k,
        "top_p": asked.top_p,
        "min_p": asked.min_p,
        "typical_p": asked.typical_p,
        "repetition_penalty": asked.repetition_penalty,
        "presence_penalty": asked.presence_penalty,
        "frequency_penalty": asked.frequency_penalty,
        "logit_bias": _logit_bias(asked.logit_bias),
        "seed": asked.seed,
        "stop": tuple(stop) if stop is not None else None,
        "stop_token_ids": tuple(asked.stop_token_ids) if asked.stop_token_ids is not None else None,
        "ignore_eos": asked.ignore_eos,
        "include_stop_str_in_output": asked.include_stop_str_in_output,
        "skip_special_tokens": asked.skip_special_tokens,
        "logprobs": (top or 0) if asked.logprobs else None,
        "prompt_logprobs": asked.prompt_logprobs,
    }


def _logit_bias(bias: dict[str, float] | None) -> dict[int, float] | None:
    if not bias:
        return None
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) <= MAX_INTEGER):
            raise InvalidRequest(f"logit_bias: {key[:40]!r} is no token id", param="logit_bias")
    return {int(key): value for key, value in bias.items()}


def _refuse_unsupported(body: dict[str, Any]) -> None:
    for name in body.keys() - ChatBody.__struct_fields__:
        if name in _UNSUPPORTED and body[name] is not None:
            raise InvalidRequest(f"{name} is not supported by this server: leave it out", param=name)
        if name in _FALSE_ONLY and body[name]:
            raise InvalidRequest(f"{name} is not supported by this server: leave it out", param=name)
        if name == "best_of" and body[name] not in (None, 1):
            raise InvalidRequest("best_of is not supported by this server: ask for n answers", param=name)
        if name not in _IGNORED:
            log.debug("unknown field ignored: %.80s", name)


def _refuse_tools_and_formats(asked: ChatBody) -> None:
    """What would change the answer and is not there yet is refused, never dropped."""
    if asked.tools and asked.tool_choice != "none":
        raise InvalidRequest(
            'tools are not supported by this server; tool_choice "none" ignores them', param="tools"
        )
    if asked.tool_choice not in (None, "none", "auto"):
        raise InvalidRequest("tool_choice: this server cannot call tools", param="tool_choice")
    if asked.functions and asked.function_call != "none":
        raise InvalidRequest("functions are not supported by this server", param="functions")
    kind = "text" if asked.response_format is None else asked.response_format.get("type")
    if kind != "text":
        raise InvalidRequest(
            f"response_format.type {str(kind)[:40]!r} is not supported by this server; allowed: 'text'",
            param="response_format",
        )
    if asked.modalities is not None and asked.modalities != ["text"]:
        raise InvalidRequest('modalities: this server answers with ["text"] only', param="modalities")
