"""OpenAI's API: the bodies of chat and text completions, as OpenAI documents and vLLM extends them, and its routes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from engine.sampling_params import MAX_INTEGER, MAX_LOGPROBS, shown
from handlers.errors import InvalidRequest
from handlers.protocols.base import (
    MAX_ANSWERS,
    MAX_PROMPTS,
    READ,
    SSE_TYPE,
    Api,
    Reader,
    Route,
    ServerContext,
    Task,
    TokenId,
    described,
    reference,
)
from handlers.protocols.body import KnownNames, convert, refuse_unknown
from handlers.protocols.fields import (
    GUIDED,
    ChoiceCount,
    LogprobsCount,
    MaxTokens,
    SamplerFields,
    read_constraint,
    sampler_names,
    sampler_values,
    sampling_params,
)
from handlers.protocols.markdown_images import image_parts
from handlers.protocols.openai.answer_form import AnswerForm, answer_form
from handlers.protocols.openai.messages import AssistantMessage, RequestMessage, misspelt, read_messages
from handlers.protocols.openai.replies import (
    OPENAI_ERRORS,
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    Model,
    Models,
    OpenAIError,
)
from handlers.protocols.openai.tools import Tools, read_tools
from handlers.protocols.openai.writers import ChatWriter, CompletionWriter
from handlers.request import (
    MAX_STOP_STRINGS,
    MOST_TOKEN_IDS,
    ChatPrompt,
    GenerationRequest,
    Incoming,
    TextPart,
    TextPrompt,
)

MOST_NAMES = 8
"""The most names of templates that an error lists."""

DEFAULT_MAX_TOKENS = 16
"""For a text completion without `max_tokens`, as in OpenAI's API; null means the model's own default, or else up to the
end of the context."""

_Bias = Annotated[float, Meta(ge=-100, le=100)]
Name = Annotated[str, Meta(max_length=512)]
_StopStrings = Annotated[list[str], Meta(max_length=MAX_STOP_STRINGS)]
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
    logit_bias: dict[str, _Bias] | None = None
    n: ChoiceCount | None = None
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


_CHAT_NAMES = known_names(ChatBody)
_COMPLETION_NAMES = known_names(CompletionBody)


def read_chat(body: dict[str, Any], server: ServerContext, incoming: Incoming, adapter: str | None = None) -> Task:
    """See `Reader`."""
    request_id = incoming.request_id
    refuse_unsupported(body, ChatBody)
    asked = convert(body, ChatBody)
    if asked.modalities is not None and asked.modalities != ["text"]:
        raise InvalidRequest('modalities: this server answers with ["text"] only', param="modalities")
    tools = None
    if asked.tools or asked.functions or asked.tool_choice is not None:
        tools = read_tools(
            tools=asked.tools,
            choice=asked.tool_choice,
            parallel=asked.parallel_tool_calls,
            functions=asked.functions,
            function_call=asked.function_call,
            formats=server.formats,
        )
    stream, n = check_stream(asked), count_answers(asked)
    names = sampler_names(asked)
    if asked.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    model = asked.model or server.model_name
    prompt = _chat_prompt(asked, server, tools)
    constraint = read_constraint(
        response_format=asked.response_format, structured_outputs=asked.structured_outputs, guided=body
    )
    values = _chat_sampling(asked)
    sampling = sampling_params(values, server.sampling, names)
    form = AnswerForm(constraint)
    if tools is not None or server.formats.reasoning is not None:
        hide = asked.include_reasoning is False
        form = answer_form(tools, constraint, server, prompt.template_kwargs, hide_reasoning=hide)
    if form.keeps_special_tokens and sampling.skip_special_tokens:
        sampling = msgspec.structs.replace(sampling, skip_special_tokens=False)
    request = GenerationRequest(
        request_id=request_id,
        prompt=prompt,
        sampling=sampling,
        n=n,
        stream=stream,
        model=asked.model,
        adapter=adapter if adapter is not None else asked.adapters or None,
        priority=asked.priority or 0,
        truncate_prompt_tokens=asked.truncate_prompt_tokens,
        truncation_side=asked.truncation_side or "left",
        max_tokens_is_default=values["max_tokens"] is None and sampling.max_tokens is not None,
        constraint=form.constraint,
    )
    options = asked.stream_options or StreamOptions()
    writer = ChatWriter(
        reply_id=f"chatcmpl-{asked.request_id or request_id}",
        model=model,
        top_logprobs=(asked.top_logprobs or 0) if asked.logprobs and not form.hides_tokens else None,
        include_usage=bool(options.include_usage),
        continuous_usage=bool(options.continuous_usage_stats),
        token_ids=bool(asked.return_token_ids) and not form.hides_tokens,
        tokens_as_ids=bool(asked.return_tokens_as_token_ids),
        prompt_text=bool(asked.return_prompt_text),
        echo=_echo(prompt) if asked.echo else "",
        parsed=form.parsed,
    )
    return Task([request], writer, _chat_misspelt(body, asked, server), names)


def _chat_misspelt(body: dict[str, Any], asked: ChatBody, server: ServerContext) -> list[str]:
    found = [*_CHAT_NAMES.misspelt(body), *misspelt(asked.messages)]
    own = server.chat_templates
    if asked.chat_template_kwargs and (asked.chat_template is None or asked.chat_template in own):
        variables = KnownNames(frozenset[str]().union(*own.values()))
        found += variables.misspelt(asked.chat_template_kwargs, "chat_template_kwargs")
    return found


def _chat_prompt(asked: ChatBody, server: ServerContext, tools: Tools | None) -> ChatPrompt:
    add, resume = asked.add_generation_prompt, bool(asked.continue_final_message)
    if add and resume:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt exclude each other",
            param="continue_final_message",
        )
    template, own = asked.chat_template, server.chat_templates
    if template is not None and template not in own and not server.trust_chat_templates:
        names = f", by name: {', '.join(sorted(own)[:MOST_NAMES])}" if own else ""
        raise InvalidRequest(
            f"chat_template: this server uses its own templates{names} (option.trust_request_chat_template=true lets "
            "requests bring theirs)",
            param="chat_template",
        )
    variables = dict(asked.chat_template_kwargs or {})
    if asked.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", asked.reasoning_effort)
    if asked.documents is not None:
        variables.setdefault("documents", asked.documents)
    return ChatPrompt(
        messages=read_messages(asked.messages, embeddings=server.embeddings, context=server.max_model_len),
        add_generation_prompt=not resume if add is None else add,
        continue_final_message=resume,
        template=template,
        template_kwargs=variables,
        tools=None if tools is None else tools.offered,
        add_special_tokens=asked.add_special_tokens,
    )


def _echo(prompt: ChatPrompt) -> str:
    """Return the text that the answer continues, if the last turn is the assistant's."""
    last = prompt.messages[-1]
    if last.role != "assistant" and prompt.add_generation_prompt:
        return ""
    return "".join(part.text for part in last.parts if isinstance(part, TextPart))


def _chat_sampling(asked: ChatBody) -> dict[str, Any]:
    top = asked.top_logprobs
    if top is not None and top > 0 and not asked.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    if top is not None and not 0 <= top <= 20:
        raise InvalidRequest(f"top_logprobs is {shown(top)}; allowed: from 0 to 20", param="top_logprobs")
    values = common_sampling(asked)
    if asked.max_completion_tokens is not None:
        values["max_tokens"] = asked.max_completion_tokens
    values["logprobs"] = (top or 0) if asked.logprobs else None
    return values


def read_completion(
    body: dict[str, Any], server: ServerContext, incoming: Incoming, adapter: str | None = None
) -> Task:
    """See `Reader`."""
    request_id = incoming.request_id
    refuse_unsupported(body, CompletionBody)
    asked = convert(body, CompletionBody)
    if asked.suffix:
        raise InvalidRequest("suffix: this server cannot fill in before a suffix; leave it out", param="suffix")
    stream, n = check_stream(asked), count_answers(asked)
    best_of = _best_of(asked, n, stream)
    constraint = read_constraint(
        response_format=asked.response_format, structured_outputs=asked.structured_outputs, guided=body
    )
    echo_only = bool(asked.echo) and asked.max_tokens == 0
    names = sampler_names(asked)
    defaults = server.sampling if "max_tokens" in body else {**server.sampling, "max_tokens": DEFAULT_MAX_TOKENS}
    sampling = sampling_params(_completion_sampling(asked, best_of > n, echo_only), defaults, names)
    prompts = _prompts(asked.prompt)
    requests = [
        GenerationRequest(
            request_id=request_id if len(prompts) == 1 else f"{request_id}-{i}",
            prompt=_text_prompt(given, asked.add_special_tokens is not False),
            sampling=sampling,
            n=best_of,
            stream=stream,
            model=asked.model,
            adapter=adapter if adapter is not None else asked.adapters or None,
            priority=asked.priority or 0,
            truncate_prompt_tokens=asked.truncate_prompt_tokens,
            truncation_side=asked.truncation_side or "left",
            max_tokens_is_default=asked.max_tokens is None and sampling.max_tokens is not None,
            constraint=constraint,
        )
        for i, given in enumerate(prompts)
    ]
    options = asked.stream_options or StreamOptions()
    writer = CompletionWriter(
        reply_id=f"cmpl-{asked.request_id or request_id}",
        model=asked.model or server.model_name,
        n=n,
        logprobs=asked.logprobs,
        prompt_logprobs=asked.prompt_logprobs,
        echo=[given if isinstance(given, str) else None for given in prompts] if asked.echo else None,
        echo_only=echo_only,
        include_usage=bool(options.include_usage),
        continuous_usage=bool(options.continuous_usage_stats),
        token_ids=bool(asked.return_token_ids),
        tokens_as_ids=bool(asked.return_tokens_as_token_ids),
    )
    return Task(requests, writer, _COMPLETION_NAMES.misspelt(body), names)


def _best_of(asked: CompletionBody, n: int, stream: bool) -> int:
    best_of = n if asked.best_of is None else asked.best_of
    if not n <= best_of <= MAX_ANSWERS:
        raise InvalidRequest(
            f"best_of is {shown(best_of)}; allowed: from n, which is {n}, to {MAX_ANSWERS}", param="best_of"
        )
    if stream and best_of > n:
        raise InvalidRequest("best_of above n cannot be streamed: the best is known at the end", param="best_of")
    return best_of


def _completion_sampling(asked: CompletionBody, choose: bool, echo_only: bool) -> dict[str, Any]:
    """Return fields of RequestSampling. choose: answers are chosen by probability. echo_only: none is shown."""
    values = common_sampling(asked)
    if echo_only:
        values["max_tokens"] = 1
    values["logprobs"] = 0 if asked.logprobs is None and choose else asked.logprobs
    if asked.echo and asked.logprobs is not None:
        values["prompt_logprobs"] = max(asked.logprobs, asked.prompt_logprobs or 0)
    return values


def _prompts(given: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """Return the prompts, all of them texts or all of them lists of token ids."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise InvalidRequest("prompt is an empty list", param="prompt")
    if all(isinstance(item, int) for item in given):
        return [given]  # type: ignore[list-item]
    if len(given) > MAX_PROMPTS:
        raise InvalidRequest(f"prompt is a list of {len(given)}; allowed: {MAX_PROMPTS}", param="prompt")
    if all(isinstance(item, str) for item in given) or all(isinstance(item, list) for item in given):
        return given  # type: ignore[return-value]
    raise InvalidRequest("prompt mixes texts, token ids and lists of token ids: send one kind", param="prompt")


def _text_prompt(given: str | list[int], add_special_tokens: bool) -> TextPrompt:
    if isinstance(given, str):
        return TextPrompt(image_parts(given), add_special_tokens=add_special_tokens)
    if not given:
        raise InvalidRequest("prompt holds an empty list of token ids", param="prompt")
    return TextPrompt([], token_ids=given)


def common_sampling(asked: CommonBody) -> dict[str, Any]:
    """Return fields of RequestSampling, None for what was not given. Raises InvalidRequest."""
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
    """Return whether a stream is asked for. Raises InvalidRequest for fields that do not go with it."""
    stream = bool(asked.stream)
    if asked.stream_options is not None and not stream:
        raise InvalidRequest("stream_options needs stream: true", param="stream_options")
    if stream and asked.prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs cannot be streamed", param="prompt_logprobs")
    return stream


def count_answers(asked: CommonBody) -> int:
    """Return how many answers to one prompt are asked for. Raises InvalidRequest."""
    n = 1 if asked.n is None else asked.n
    if not 1 <= n <= MAX_ANSWERS:
        raise InvalidRequest(f"n is {shown(n)}; allowed: from 1 to {MAX_ANSWERS}", param="n")
    return n


def refuse_unsupported(body: dict[str, Any], shape: type[CommonBody]) -> None:
    """Refuse fields that would change the answer and are not supported; other unknown fields are ignored."""
    if isinstance(options := body.get("stream_options"), dict):
        refuse_unknown(options, StreamOptions.__struct_fields__, "stream_options")
    side = body.get("truncation_side")
    if isinstance(side, str) and side not in _SIDES:  # Here because msgspec's message quotes it, however long it is.
        raise InvalidRequest(f"truncation_side is {side[:40]!r}; allowed: {', '.join(_SIDES)}", param="truncation_side")
    for name in body.keys() - shape.__struct_fields__:
        if name in UNSUPPORTED and body[name] is not None:
            raise InvalidRequest(f"{name} is not supported by this server: leave it out", param=name)
        if name in FALSE_ONLY and body[name]:
            raise InvalidRequest(f"{name} is not supported by this server: leave it out", param=name)
        if name == "best_of" and body[name] not in (None, 1):
            raise InvalidRequest("best_of is not supported by this server: ask for n answers", param=name)


def _logit_bias(bias: dict[str, float] | None) -> dict[int, float] | None:
    if not bias:
        return None
    if len(bias) > MOST_TOKEN_IDS:
        raise InvalidRequest(f"logit_bias names {len(bias)} tokens; allowed: {MOST_TOKEN_IDS}", param="logit_bias")
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) <= MAX_INTEGER):
            raise InvalidRequest(f"logit_bias: {key[:40]!r} is not a token id", param="logit_bias")
    return {int(key): value for key, value in bias.items()}


_ERRORS = (OpenAIError,)

ROUTES = (
    Route(
        "/v1/models",
        "models",
        "The served models",
        methods=READ,
        light=True,
        replies=(Models,),
        errors=_ERRORS,
    ),
    Route(
        "/v1/models/{name}",
        "models",
        "One served model",
        methods=READ,
        light=True,
        template="/v1/models",
        replies=(Model,),
        errors=_ERRORS,
    ),
    Route(
        "/v1/chat/completions",
        "answer",
        "Chat completion (OpenAI)",
        queued=True,
        timed=True,
        appended=True,
        bodies=(ChatBody,),
        replies=(ChatCompletion,),
        events={SSE_TYPE: (ChatCompletionChunk,)},
        errors=_ERRORS,
    ),
    Route(
        "/v1/completions",
        "answer",
        "Text completion (OpenAI); images stand in the prompt as `![](url)`",
        queued=True,
        timed=True,
        appended=True,
        bodies=(CompletionBody,),
        replies=(Completion,),
        events={SSE_TYPE: (Completion,)},
        errors=_ERRORS,
    ),
)

_OTHER_ROUTES = frozenset({"/tokenize", "/detokenize", "/version"})
"""Routes of vLLM's, which answers errors as OpenAI does."""


def _claims(route: str, headers: Mapping[str, str], keys: Collection[str]) -> bool:
    if "messages" in keys or "inputs" in keys:
        return "messages" in keys
    return "prompt" in keys or route.startswith("/v1/") or route in _OTHER_ROUTES


def _reads(keys: Collection[str], route: str) -> Reader | None:
    if route == "/v1/completions":
        return read_completion
    if "messages" in keys:
        return read_chat
    return read_completion if "prompt" in keys and "inputs" not in keys else None


OPENAI = Api(OPENAI_ERRORS, _claims, ROUTES, _reads)
