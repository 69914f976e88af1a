"""The API of Text Generation Inference (TGI): its body (`inputs`, `parameters`, `stream`), and its routes.

Names, defaults and the wording of errors are those of TGI's router, since clients match on its texts. Where our limits
are wider, the wording has our number.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Annotated, Any

import msgspec

from engine.sampling_params import MAX_LOGPROBS, MAX_SEED, shown
from handlers.errors import InvalidRequest
from handlers.protocols.base import MAX_ANSWERS, READ, SSE_TYPE, Api, Reader, Route, ServerContext, Task, described_as
from handlers.protocols.body import convert
from handlers.protocols.constraints import read_constraint
from handlers.protocols.known_names import KnownNames
from handlers.protocols.markdown_images import image_parts
from handlers.protocols.openai.bodies import ChatBody, CompletionBody
from handlers.protocols.openai.replies import ChatCompletion, ChatCompletionChunk, Completion
from handlers.protocols.sampler_fields import (
    ChoiceCount,
    Fraction,
    MaxTokens,
    Penalty,
    RepetitionPenalty,
    Temperature,
    TopK,
    sampling_params,
    stop_strings,
)
from handlers.protocols.tgi.replies import TGI_ERRORS, Info, TgiEvent, TgiReply, TgiWriter, info, shown_seeds
from handlers.request import MAX_STOP_STRINGS, GenerationRequest, Incoming, RequestSampling, TextPrompt

GENERATE_ROUTES = frozenset({"/", "/generate", "/generate_stream"})

_LARGEST_SEED = 2**64 - 1

_NAMES = {"max_tokens": "max_new_tokens", "logprobs": "top_n_tokens"}


class TgiParameters(msgspec.Struct):
    """TGI's parameters; null counts as not given. `stop_sequences` is what TGI's clients used to call `stop`."""

    adapter_id: str | None = None
    best_of: ChoiceCount | None = None
    decoder_input_details: bool | None = None
    details: bool | None = None
    do_sample: bool | None = None
    frequency_penalty: Penalty | None = None
    grammar: dict[str, Any] | None = None
    max_new_tokens: MaxTokens | None = None
    repetition_penalty: RepetitionPenalty | None = None
    return_full_text: bool | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_sequences: str | list[str] | None = None
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_n_tokens: int | None = None
    top_p: Fraction | None = None
    truncate: int | None = None
    typical_p: Fraction | None = None
    watermark: bool | None = None

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn, as asked for or implied by a value that changes how they are drawn."""
        return bool(
            self.do_sample
            or self.temperature not in (None, 1.0)
            or self.top_k
            or self.top_p not in (None, 1.0)
            or self.typical_p not in (None, 1.0)
        )

    @property
    def stops(self) -> tuple[str, ...]:
        return stop_strings(self.stop, self.stop_sequences, name="`stop`")


class TgiBody(msgspec.Struct):
    """One prompt."""

    inputs: str
    parameters: Annotated[dict[str, Any] | None, described_as(TgiParameters)] = None
    stream: bool | None = None
    model: str | None = None


_PARAMETER_NAMES = KnownNames(TgiParameters.__struct_fields__)
_BODY_NAMES = KnownNames(
    TgiBody.__struct_fields__, inside={name: f"parameters.{name}" for name in TgiParameters.__struct_fields__}
)


def read_tgi(body: dict[str, Any], server: ServerContext, incoming: Incoming, adapter: str | None = None) -> Task:
    """See `Reader`. Raises InvalidRequest in TGI's words.

    The route, one of `GENERATE_ROUTES`, decides whether the reply is a stream, and whether it is a list.
    """
    route = incoming.route
    asked = convert(body, TgiBody)
    stream = route == "/generate_stream" or (route == "/" and bool(asked.stream))
    # Without any parameters TGI draws; with an empty object it does not.
    given = {"do_sample": True} if asked.parameters is None else asked.parameters
    parameters = _read_parameters(given, stream=stream)
    if not asked.inputs:
        raise InvalidRequest("`inputs` cannot be empty", param="inputs")
    _check_truncate(parameters.truncate, server.max_model_len)
    answers = parameters.best_of or 1
    # Answers that are not drawn show no seed.
    seeds: list[int | None] = [None] * answers
    if parameters.samples:
        seeds = shown_seeds(parameters.seed, answers)
    details = bool(parameters.details or parameters.decoder_input_details)
    request = GenerationRequest(
        request_id=incoming.request_id,
        prompt=TextPrompt(image_parts(asked.inputs)),
        sampling=_sampling(parameters, seeds, shows_tokens=stream or details or answers > 1),
        n=answers,
        stream=stream,
        model=asked.model,
        adapter=adapter if adapter is not None else parameters.adapter_id or None,
        truncate_prompt_tokens=parameters.truncate,
        max_tokens_is_default=parameters.max_new_tokens is None,
        constraint=read_constraint(grammar=parameters.grammar),
    )
    writer = TgiWriter(
        inputs=[asked.inputs],
        array=route == "/",
        details=details,
        prefill=bool(parameters.decoder_input_details),
        full_text=bool(parameters.return_full_text),
        top_tokens=parameters.top_n_tokens or 0,
        seeds=[seeds],
        special_token_ids=server.special_token_ids,
    )
    misspelt = [*_BODY_NAMES.misspelt(body), *_PARAMETER_NAMES.misspelt(given, "parameters")]
    return Task([request], writer, misspelt, _NAMES)


def _read_parameters(given: dict[str, Any], *, stream: bool) -> TgiParameters:
    """Read and check parameters in TGI's order. Raises InvalidRequest in TGI's words."""
    asked = convert(given, TgiParameters, under="parameters")
    _check_best_of(asked, stream)
    for name in ("temperature", "repetition_penalty", "top_k", "max_new_tokens"):
        value = getattr(asked, name)
        if value is not None and value <= 0:
            raise InvalidRequest(f"`{name}` must be strictly positive", param=name)
    if asked.frequency_penalty is not None and not -2.0 <= asked.frequency_penalty <= 2.0:
        raise InvalidRequest("`frequency_penalty` must be >= -2.0 and <= 2.0", param="frequency_penalty")
    for name in ("top_p", "typical_p"):
        value = getattr(asked, name)
        if value is not None and not 0.0 < value <= 1.0:
            raise InvalidRequest(f"`{name}` must be > 0.0 and <= 1.0", param=name)
    if len(asked.stops) > MAX_STOP_STRINGS:
        raise InvalidRequest(
            f"`stop` supports up to {MAX_STOP_STRINGS} stop sequences. Given: {len(asked.stops)}", param="stop"
        )
    top = asked.top_n_tokens
    if top is not None and not 0 <= top <= MAX_LOGPROBS:
        raise InvalidRequest(
            f"`top_n_tokens` must be >= 0 and <= {MAX_LOGPROBS}. Given: {shown(top)}", param="top_n_tokens"
        )
    if asked.seed is not None and not 0 <= asked.seed <= _LARGEST_SEED:
        raise InvalidRequest("`seed` must be >= 0 and < 2^64", param="seed")
    if stream and asked.decoder_input_details:
        raise InvalidRequest(
            "`decoder_input_details` == true is not supported when streaming tokens", param="decoder_input_details"
        )
    return asked


def _check_best_of(asked: TgiParameters, stream: bool) -> None:
    best_of = asked.best_of
    if best_of is None or best_of == 1:
        return
    if not 1 <= best_of <= MAX_ANSWERS:
        problem = f"`best_of` must be > 0 and <= {MAX_ANSWERS}. Given: {shown(best_of)}"
    elif not asked.samples:
        problem = "you must use sampling when `best_of` is > 1"
    elif asked.seed is not None:
        problem = "`seed` must not be set when `best_of` > 1"
    elif stream:
        problem = "`best_of` != 1 is not supported when streaming tokens"
    else:
        return
    raise InvalidRequest(problem, param="best_of")


def _check_truncate(truncate: int | None, context: int) -> None:
    if truncate is not None and not 0 < truncate <= context:
        raise InvalidRequest(
            f"`truncate` must be strictly positive and less than {context}. Given: {shown(truncate)}", param="truncate"
        )


def _sampling(asked: TgiParameters, seeds: list[int | None], *, shows_tokens: bool) -> RequestSampling:
    """Return the sampling. TGI knows no defaults of the model's own, and keeps a stop string in the text."""
    seed = seeds[0]
    values = {
        "max_tokens": asked.max_new_tokens,
        "temperature": (asked.temperature or 1.0) if asked.samples else 0.0,
        "top_k": asked.top_k,
        "top_p": asked.top_p,
        "typical_p": asked.typical_p,
        "repetition_penalty": asked.repetition_penalty,
        "frequency_penalty": asked.frequency_penalty,
        "seed": None if seed is None else seed & MAX_SEED,
        "stop": asked.stops,
        "include_stop_str_in_output": bool(asked.stops),
        "logprobs": (asked.top_n_tokens or 0) if shows_tokens else None,
        "prompt_logprobs": 0 if asked.decoder_input_details else None,
    }
    return sampling_params(values, {}, _NAMES)


_ERROR_ROUTES = frozenset({*GENERATE_ROUTES, "/chat_tokenize", "/info"})
_BROWSER_CLIENT = "@huggingface/"
"""Hugging Face's JavaScript client, which gets TGI's errors on every route: it shows an error only if it is a string,
and after a 503 it calls again at once, without end."""


def _claims(route: str, headers: Mapping[str, str], keys: Collection[str]) -> bool:
    return (
        route in _ERROR_ROUTES
        or headers.get("user-agent", "").startswith(_BROWSER_CLIENT)
        or (route == "/tokenize" and "inputs" in keys)
    )


def _reads(keys: Collection[str], route: str) -> Reader | None:
    return read_tgi if "messages" not in keys and ("inputs" in keys or "prompt" not in keys) else None


_ANSWER = Route(
    "/generate",
    "answer",
    "Generate text (TGI)",
    queued=True,
    timed=True,
    bodies=(TgiBody, ChatBody, CompletionBody),
    replies=(TgiReply, list[TgiReply], ChatCompletion, Completion),
    events={SSE_TYPE: (TgiEvent, ChatCompletionChunk, Completion)},
)

ROUTES = (
    _ANSWER,
    replace(_ANSWER, path="/generate_stream", template="/generate_stream"),
    replace(_ANSWER, path="/", template="/"),
    # Hugging Face's Python client also asks for text at the address that it was given for chat.
    replace(_ANSWER, path="/v1", template="/"),
    Route("/info", "info", "What is served, and its limits (TGI)", methods=READ, light=True, replies=(Info,)),
)

TGI = Api(TGI_ERRORS, _claims, ROUTES, _reads, GENERATE_ROUTES, calls={"info": info})
