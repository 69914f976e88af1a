"""LMI's API, which SageMaker calls: its body (`inputs`, `parameters`, `stream`), and its routes.

Names, defaults and bounds are those of LMI's input and output schema (djl-serving's documentation).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from engine.sampling_params import shown
from handlers.errors import InvalidParameter, InvalidRequest
from handlers.protocols.base import (
    JSON_LINES,
    MAX_ANSWERS,
    MAX_PROMPTS,
    READ,
    SSE_TYPE,
    Api,
    Reader,
    Route,
    ServerContext,
    Task,
    TokenCount,
    TokenId,
    Writer,
    described_as,
)
from handlers.protocols.body import convert
from handlers.protocols.constraints import GUIDED, read_constraint
from handlers.protocols.known_names import KnownNames
from handlers.protocols.lmi import adapters
from handlers.protocols.lmi.batch_transform import ExecutionParameters, execution_parameters
from handlers.protocols.lmi.replies import LMI_ERRORS, JsonLines, LmiBrokenLine, LmiError, LmiLine, LmiReply, LmiWriter
from handlers.protocols.lmi.sagemaker import ADAPTER_HEADERS, INVOKE_ROUTES, PREFIX, accept_of, adapter_of
from handlers.protocols.lmi.sessions import SessionBody, SessionReply, Sessions
from handlers.protocols.markdown_images import image_parts
from handlers.protocols.openai.bodies import ChatBody, CompletionBody
from handlers.protocols.openai.completion_writer import CompletionWriter
from handlers.protocols.openai.events import ReplyOptions
from handlers.protocols.openai.replies import ChatCompletion, ChatCompletionChunk, Completion, OpenAIError
from handlers.protocols.sampler_fields import (
    Bias,
    ChoiceCount,
    MaxTokens,
    SamplerFields,
    StopStrings,
    sampler_values,
    sampling_params,
    stop_strings,
)
from handlers.protocols.tgi.replies import TgiWriter, shown_seeds
from handlers.request import Constraint, GenerationRequest, Incoming, RequestSampling, TextPrompt

DEFAULT_NEW_TOKENS = 30

_Candidates = Annotated[int, Meta(ge=0, le=20)]


class LmiParameters(SamplerFields, kw_only=True):
    """The parameters that LMI documents, and the names of its runtimes for them (`stop`, `max_tokens`, `logprobs`)."""

    max_new_tokens: MaxTokens | None = None
    min_new_tokens: int | None = None
    do_sample: bool | None = None
    stop_sequences: str | StopStrings | None = None
    stop: str | StopStrings | None = None
    ignore_eos_token: bool | None = None
    logit_bias: dict[TokenId, Bias] | None = None
    return_full_text: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    top_n_tokens: _Candidates | None = None
    logprobs: _Candidates | bool | None = None
    truncate: TokenCount | None = None
    n: ChoiceCount | None = None
    best_of: ChoiceCount | None = None

    @property
    def top_tokens(self) -> int:
        """The number of candidates to show at each position."""
        return self.top_n_tokens or int(self.logprobs or 0)

    @property
    def prefill(self) -> bool:
        """Whether the prompt's own tokens are shown."""
        return bool(self.details and (self.decoder_input_details or self.prompt_logprobs not in (None, False)))

    @property
    def answers(self) -> int:
        """The number of answers to generate: those returned, or more to choose the best from."""
        return max(self.n or 1, self.best_of or 1)

    @property
    def returned(self) -> int:
        """The number of answers to return; `best_of` alone returns all, best first."""
        return self.answers if self.n is None else self.n


class LmiBody(msgspec.Struct):
    """A prompt, or several."""

    inputs: str | Annotated[list[str], Meta(max_length=MAX_PROMPTS)]
    parameters: Annotated[dict[str, Any] | None, described_as(LmiParameters)] = None
    stream: bool | None = None
    adapters: str | list[str] | None = None
    model: str | None = None


_SHOWN = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "logprobs": "top_n_tokens"}
_FIELDS: Mapping[str, str] = {
    name: f"parameters.{_SHOWN.get(name, name)}" for name in RequestSampling.__struct_fields__
} | {"stop": "parameters.stop_sequences"}
"""A field of RequestSampling -> what LMI calls it."""

_WITHOUT_EFFECT = frozenset(
    {"watermark", "length_penalty", "early_stopping", "num_beams", "spaces_between_special_tokens"}
)
_CONSTRAINTS = frozenset({*GUIDED, "guided_whitespace_pattern", "grammar", "response_format", "structured_outputs"})
_PARAMETER_NAMES = KnownNames(_CONSTRAINTS | {*LmiParameters.__struct_fields__}, _WITHOUT_EFFECT)
_READ = {name: f"parameters.{name}" for name in (*LmiParameters.__struct_fields__, *_CONSTRAINTS)}
"""A parameter -> its path in a body."""


_BODY_NAMES = KnownNames(LmiBody.__struct_fields__, inside=_READ)


def read_lmi(body: dict[str, Any], server: ServerContext, incoming: Incoming, adapter: str | None = None) -> Task:
    """See `Reader`."""
    asked = convert(body, LmiBody)
    given = asked.parameters or {}
    parameters = _read_parameters(given)
    if server.tgi_compat and parameters.details is None:
        parameters.details = True
    prompts = asked.inputs if isinstance(asked.inputs, list) else [asked.inputs]
    if not prompts:
        raise InvalidParameter("inputs", "is an empty list")
    stream = _streams(asked.stream, len(prompts), parameters, server)
    adapters = _adapters(asked.adapters, adapter, len(prompts))
    sampling = _read_sampling(
        parameters,
        server.sampling,
        shows_tokens=stream or bool(parameters.details),
        shows_prompt=parameters.prefill and not stream,
    )
    constraint = _constraint_of(given)
    request_id = incoming.request_id
    misspelt = [*_BODY_NAMES.misspelt(body), *_PARAMETER_NAMES.misspelt(given, "parameters")]
    requests = [
        GenerationRequest(
            request_id=request_id if len(prompts) == 1 else f"{request_id}-{i}",
            prompt=TextPrompt(image_parts(text)),
            sampling=sampling,
            n=parameters.answers,
            stream=stream,
            model=asked.model,
            adapter=adapters[i],
            truncate_prompt_tokens=parameters.truncate,
            max_tokens_is_default=parameters.max_new_tokens is None and parameters.max_tokens is None,
            constraint=constraint,
        )
        for i, text in enumerate(prompts)
    ]
    writer = _writer(asked, prompts, parameters, requests, server, incoming)
    return Task(requests, writer, misspelt, _names(parameters))


def _writer(
    asked: LmiBody,
    prompts: list[str],
    parameters: LmiParameters,
    requests: list[GenerationRequest],
    server: ServerContext,
    incoming: Incoming,
) -> Writer:
    """Return the writer that the server's options and the `Accept` header ask for."""
    accept, sampling, details = accept_of(incoming.headers), requests[0].sampling, bool(parameters.details)
    if server.custom_output:
        return CompletionWriter(
            ReplyOptions(reply_id=f"cmpl-{incoming.request_id}", model=asked.model or server.model_name),
            n=parameters.returned,
            logprobs=parameters.top_tokens if sampling.logprobs is not None else None,
        )
    if server.tgi_compat:
        events = TgiWriter(
            inputs=prompts,
            array=True,
            details=details,
            prefill=sampling.prompt_logprobs is not None,
            full_text=bool(parameters.return_full_text),
            top_tokens=parameters.top_tokens,
            seeds=[_seeded(request) for request in requests],
            special_token_ids=server.special_token_ids,
        )
        return JsonLines(events) if wants_lines(accept) else events
    return LmiWriter(
        inputs=prompts,
        many=isinstance(asked.inputs, list),
        returned=parameters.returned,
        details=details,
        prefill=sampling.prompt_logprobs is not None,
        full_text=bool(parameters.return_full_text),
        top_tokens=parameters.top_tokens,
        seed=None if parameters.seed == -1 else parameters.seed,
        sse="text/event-stream" in accept or (server.output_formatter == "sse" and not wants_lines(accept)),
    )


def _streams(asked: bool | None, prompts: int, parameters: LmiParameters, server: ServerContext) -> bool:
    """Whether to stream, as the client says, or else as the operator's formatter does where that is possible."""
    single = prompts == 1 and parameters.answers == 1
    if asked is None:
        return single and server.output_formatter in ("jsonlines", "sse")
    if asked and prompts > 1:
        raise InvalidRequest("inputs: only one prompt can be streamed; send them one by one", param="inputs")
    if asked and not single:
        name = "n" if parameters.best_of is None else "best_of"
        raise InvalidRequest(f"parameters.{name}: only one answer can be streamed", param=f"parameters.{name}")
    return asked


def _adapters(named: str | list[str] | None, header: str | None, count: int) -> list[str | None]:
    if header is not None:
        return [header] * count
    if isinstance(named, list):
        if len(named) != count:
            raise InvalidParameter("adapters", f"has {len(named)} names for {count} inputs")
        return [name or None for name in named]
    return [named or None] * count


def wants_lines(accept: str) -> bool:
    """Whether an `Accept` header, in lower case, asks for JSON lines."""
    return "jsonlines" in accept and "text/event-stream" not in accept


def _seeded(request: GenerationRequest) -> list[int | None]:
    """Return the seed of each answer, which TGI's reply shows. A request that draws without a seed gets one."""
    if request.sampling.greedy:
        return [None] * request.n
    seeds = shown_seeds(request.sampling.seed, request.n)
    request.sampling = msgspec.structs.replace(request.sampling, seed=seeds[0])
    return seeds


def _read_parameters(given: dict[str, Any]) -> LmiParameters:
    """Read the parameters. Raises InvalidRequest naming the one at fault."""
    if given.get("num_beams") not in (None, 1):
        raise InvalidRequest(
            "parameters.num_beams: there is no beam search; best_of chooses the best of several answers",
            param="parameters.num_beams",
        )
    parameters = convert(given, LmiParameters, under="parameters")
    for name in ("n", "best_of"):
        count = getattr(parameters, name)
        if count is not None and not 1 <= count <= MAX_ANSWERS:
            raise InvalidParameter(f"parameters.{name}", f"is {shown(count)}; allowed: from 1 to {MAX_ANSWERS}")
    if parameters.n is not None and parameters.best_of is not None and parameters.n > parameters.best_of:
        raise InvalidParameter(
            "parameters.n", f"is {parameters.n}, more than parameters.best_of ({parameters.best_of})"
        )
    return parameters


def _read_sampling(
    parameters: LmiParameters, defaults: Mapping[str, Any], *, shows_tokens: bool, shows_prompt: bool
) -> RequestSampling:
    """Return the sampling: greedy and 30 tokens unless the client asks for something else, as in LMI.

    The model's own defaults do not change these two. The engine's names of parameters are read as well.

    shows_tokens, shows_prompt: whether the reply holds the answer's and the prompt's tokens with their
    probabilities. Raises InvalidRequest.
    """
    asked = sampler_values(parameters) | {
        "temperature": parameters.temperature if _samples(parameters) else 0.0,
        "stop": stop_strings(parameters.stop_sequences, parameters.stop, name="parameters.stop_sequences"),
        "logit_bias": parameters.logit_bias,
        "ignore_eos": parameters.ignore_eos_token or parameters.ignore_eos,
        "logprobs": parameters.top_tokens if shows_tokens else 0 if parameters.answers > 1 else None,
        "prompt_logprobs": 0 if shows_prompt else None,
    }
    if parameters.max_new_tokens is not None:
        asked["max_tokens"] = parameters.max_new_tokens
    if parameters.min_new_tokens is not None:
        asked["min_tokens"] = parameters.min_new_tokens
    return sampling_params(asked, {**defaults, "max_tokens": DEFAULT_NEW_TOKENS}, _names(parameters))


def _names(parameters: LmiParameters) -> Mapping[str, str]:
    """Return for each field of RequestSampling what the client calls it: vLLM's names are taken beside LMI's."""
    lmi_names = {"max_tokens": parameters.max_new_tokens, "min_tokens": parameters.min_new_tokens}
    others = [name for name, value in lmi_names.items() if value is None and getattr(parameters, name) is not None]
    return {**_FIELDS, **{name: f"parameters.{name}" for name in others}}


def _constraint_of(given: dict[str, Any]) -> Constraint | None:
    """Read what the answer must look like, in any field that LMI's backends take. Raises InvalidRequest."""
    if not _CONSTRAINTS & given.keys():
        return None
    try:
        constraint = read_constraint(
            response_format=given.get("response_format"),
            structured_outputs=given.get("structured_outputs"),
            guided=given,
            grammar=given.get("grammar"),
        )
    except InvalidRequest as error:
        param = None if error.param is None else f"parameters.{error.param}"
        raise InvalidRequest(f"parameters.{error.message}", param=param) from error
    return constraint and replace(constraint, param=f"parameters.{constraint.param}")


def _samples(parameters: LmiParameters) -> bool:
    """LMI is greedy unless `do_sample` says otherwise or, without it, a temperature is given."""
    return parameters.temperature is not None if parameters.do_sample is None else parameters.do_sample


def _claims(route: str, headers: Mapping[str, str], keys: Collection[str]) -> bool:
    return True


def _reads(keys: Collection[str], route: str) -> Reader | None:
    return read_lmi if "inputs" in keys else None


def _framed(read: Reader, body: dict[str, Any], server: ServerContext, incoming: Incoming, adapter: str | None) -> Task:
    """Read another API's body; `option.output_formatter` and the `Accept` header decide whether and how to stream."""
    if "inputs" in body:
        return read(body, server, incoming, adapter)
    formatter = server.output_formatter
    if body.get("stream") is None and formatter in ("jsonlines_chat", "sse_chat"):
        body = {**body, "stream": True}
    task = read(body, server, incoming, adapter)
    accept = accept_of(incoming.headers)
    stream = task.requests[0].stream
    lines = formatter == "jsonlines_chat" and "text/event-stream" not in accept
    if stream and (lines or wants_lines(accept)) and not server.custom_output:
        task.writer = JsonLines(task.writer)
    return task


_EVENTS = (ChatCompletionChunk, Completion, LmiLine, LmiBrokenLine)
_ANSWER = Route(
    "/invocations",
    "answer",
    "Answer a body of any API, which its keys tell (messages, prompt, inputs or requestType), or JSON lines of them",
    queued=True,
    bodies=(ChatBody, CompletionBody, LmiBody, SessionBody),
    plain_text=True,
    replies=(ChatCompletion, Completion, LmiReply, list[LmiReply], SessionReply),
    events={SSE_TYPE: _EVENTS, JSON_LINES: (*_EVENTS, ChatCompletion, LmiReply)},
    errors=(OpenAIError, LmiError),
)

ROUTES = (
    *adapters.ROUTES,
    _ANSWER,
    Route(
        "/execution-parameters",
        "execution",
        "How batch transform sends records if its user does not say",
        methods=READ,
        light=True,
        replies=(ExecutionParameters,),
        errors=(OpenAIError, LmiError),
    ),
    replace(_ANSWER, path="/models/{name}/invoke", template="/models/{model}/invoke"),
    replace(_ANSWER, path="/predictions/{name}", template="/predictions/{model}"),
)

LMI = Api(
    LMI_ERRORS,
    _claims,
    ROUTES,
    _reads,
    frames=dict.fromkeys(INVOKE_ROUTES, _framed),
    headers=ADAPTER_HEADERS,
    adapter=adapter_of,
    calls={"adapters": adapters.answer_adapters, "execution": execution_parameters},
    request_id=f"{PREFIX}inference-id",
    gate=lambda settings: Sessions(enabled=settings.enable_stateful_sessions, expiration=settings.sessions_expiration),
)
