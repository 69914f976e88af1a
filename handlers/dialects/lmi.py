"""The LMI body: `inputs`, `parameters`, `stream`. From the body to a `Task`.

Names and defaults are those of the LMI input and output schema (djl-serving's documentation).
"""

from __future__ import annotations

import logging
import re
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from engine.sampling_params import MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS, SamplingParams
from handlers.dialects.base import Conventions, Task, TokenCount, TokenId, sampling_params
from handlers.dialects.body import convert
from handlers.dialects.lmi_reply import LmiWriter
from handlers.errors import InvalidRequest
from handlers.request import GenerationRequest, ImagePart, Part, TextPart, TextPrompt

log = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS = 30

# ![alternative text](url "title"): only a link that names its scheme is a picture; other Markdown stays text.
_PICTURE = re.compile(
    r'!\[[^\[\]\n]{0,1000}\]\(\s{0,8}((?i:https?:|data:)[^()\s]+(?:\([^()\s]*\)[^()\s]*)*)(?:\s{1,8}"[^"\n]{0,1000}")?\s{0,8}\)',
)
_UNSUPPORTED_ABOVE_ONE = ("best_of", "num_beams", "n")
_UNSUPPORTED = ("watermark", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "grammar")
_NAMES = {name: f"parameters.{name}" for name in SamplingParams.__struct_fields__} | {
    "max_tokens": "parameters.max_new_tokens",
    "min_tokens": "parameters.min_new_tokens",
    "logprobs": "parameters.top_n_tokens",
    "stop": "parameters.stop_sequences",
}
_StopStrings = Annotated[list[str], Meta(max_length=MAX_STOP_STRINGS)]


class Parameters(msgspec.Struct):
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop_sequences: str | _StopStrings | None = None
    stop: str | _StopStrings | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos_token: bool | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    return_full_text: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    top_n_tokens: Annotated[int, Meta(ge=0, le=20)] | None = None
    truncate: TokenCount | None = None


class LmiBody(msgspec.Struct):
    inputs: str | list[str]
    parameters: dict[str, Any] | None = None
    stream: bool | None = None
    adapters: str | list[str] | None = None
    model: str | None = None


def read_lmi(
    body: dict[str, Any],
    conventions: Conventions,
    *,
    request_id: str,
    adapter: str | None = None,
    accept: str = "",
) -> Task:
    """Raises InvalidRequest naming the field.

    adapter: named in a header; it wins over the body's `adapters`. accept: the request's `Accept` header.
    """
    asked = convert(body, LmiBody)
    given = asked.parameters or {}
    _refuse_unsupported(body, given)
    parameters = convert(given, Parameters, under="parameters")
    many = isinstance(asked.inputs, list)
    prompts = asked.inputs if isinstance(asked.inputs, list) else [asked.inputs]
    stream = bool(asked.stream)
    if not prompts:
        raise InvalidRequest("inputs is an empty list", param="inputs")
    if stream and len(prompts) > 1:
        raise InvalidRequest("inputs: only one prompt can be streamed; send them one by one", param="inputs")
    adapters = _adapters(asked.adapters, adapter, len(prompts))
    sampling = sampling_params(
        _sampling(parameters, stream), {"max_tokens": DEFAULT_NEW_TOKENS, **conventions.sampling}, _NAMES
    )
    requests = [
        GenerationRequest(
            request_id=request_id if len(prompts) == 1 else f"{request_id}-{i}",
            prompt=TextPrompt(picture_parts(text)),
            sampling=sampling,
            stream=stream,
            model=asked.model,
            adapter=adapters[i],
            truncate_prompt_tokens=parameters.truncate,
            max_tokens_is_default=parameters.max_new_tokens is None,
            names=_NAMES,
        )
        for i, text in enumerate(prompts)
    ]
    writer = LmiWriter(
        prompts,
        many=many,
        details=bool(parameters.details),
        prefill=bool(parameters.details and parameters.decoder_input_details),
        full_text=bool(parameters.return_full_text),
        top_tokens=parameters.top_n_tokens or 0,
        seed=parameters.seed,
        sse=_wants_sse(accept, conventions),
    )
    return Task(requests, writer)


def picture_parts(text: str) -> list[Part]:
    """Text with its `![](url)` pictures cut out, in order."""
    parts: list[Part] = []
    position = 0
    for match in _PICTURE.finditer(text):
        if match.start() > position:
            parts.append(TextPart(text[position : match.start()]))
        parts.append(ImagePart(match[1]))
        position = match.end()
    if position < len(text) or not parts:
        parts.append(TextPart(text[position:]))
    return parts


def _sampling(parameters: Parameters, stream: bool) -> dict[str, Any]:
    stop = [*_strings(parameters.stop_sequences), *_strings(parameters.stop)]
    if "" in stop:
        raise InvalidRequest(
            "parameters.stop_sequences: an empty string cannot end an answer",
            param="parameters.stop_sequences",
        )
    shows_tokens = stream or bool(parameters.details)
    return {
        "max_tokens": parameters.max_new_tokens,
        "min_tokens": parameters.min_new_tokens,
        "temperature": parameters.temperature if _samples(parameters) else 0.0,
        "top_k": parameters.top_k,
        "top_p": parameters.top_p,
        "min_p": parameters.min_p,
        "typical_p": parameters.typical_p,
        "repetition_penalty": parameters.repetition_penalty,
        "presence_penalty": parameters.presence_penalty,
        "frequency_penalty": parameters.frequency_penalty,
        "seed": parameters.seed,
        "stop": tuple(stop) if stop else None,
        "stop_token_ids": tuple(parameters.stop_token_ids) if parameters.stop_token_ids else None,
        "ignore_eos": parameters.ignore_eos_token or parameters.ignore_eos,
        "include_stop_str_in_output": parameters.include_stop_str_in_output,
        "skip_special_tokens": parameters.skip_special_tokens,
        "logprobs": (parameters.top_n_tokens or 0) if shows_tokens else None,
        "prompt_logprobs": 0 if parameters.details and parameters.decoder_input_details else None,
    }


def _samples(parameters: Parameters) -> bool:
    """LMI is greedy unless `do_sample` says otherwise or, without it, a temperature is given."""
    return parameters.temperature is not None if parameters.do_sample is None else parameters.do_sample


def _strings(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def _adapters(named: str | list[str] | None, header: str | None, count: int) -> list[str | None]:
    if header is not None:
        return [header] * count
    if isinstance(named, list):
        if len(named) != count:
            raise InvalidRequest(f"adapters has {len(named)} names for {count} inputs", param="adapters")
        return [name or None for name in named]
    return [named or None] * count


def _wants_sse(accept: str, conventions: Conventions) -> bool:
    accept = accept.lower()
    if "text/event-stream" in accept:
        return True
    return conventions.lines == "sse" and "jsonlines" not in accept


def _refuse_unsupported(body: dict[str, Any], parameters: dict[str, Any]) -> None:
    for name in _UNSUPPORTED_ABOVE_ONE:
        if parameters.get(name) not in (None, 1):
            raise InvalidRequest(f"parameters.{name}: one answer for each prompt", param=f"parameters.{name}")
    for name in _UNSUPPORTED:
        if parameters.get(name):
            raise InvalidRequest(
                f"parameters.{name} is not supported by this server", param=f"parameters.{name}"
            )
    for name in body.keys() - LmiBody.__struct_fields__:
        log.debug("unknown field ignored: %.80s", name)
    for name in parameters.keys() - Parameters.__struct_fields__:
        log.debug("unknown parameter ignored: %.80s", name)
