"""The LMI body: `inputs`, `parameters`, `stream`. From the body to a `Task`."""

from __future__ import annotations

import logging
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from handlers.errors import InvalidRequest
from handlers.protocols.base import MAX_PROMPTS, Conventions, Task
from handlers.protocols.body import convert
from handlers.protocols.json_lines import JsonLines
from handlers.protocols.lmi.parameters import (
    NAMES,
    PARAMETER_NAMES,
    READ,
    Parameters,
    constraint_of,
    read_parameters,
    read_sampling,
)
from handlers.protocols.lmi.reply import LmiWriter
from handlers.protocols.lmi.sagemaker import wants_lines
from handlers.protocols.lmi.tgi_compat import tgi_writer
from handlers.protocols.markdown_pictures import picture_parts
from handlers.protocols.misspelt import KnownNames
from handlers.protocols.openai.completions_reply import CompletionWriter
from handlers.request import GenerationRequest, TextPrompt

log = logging.getLogger(__name__)


class LmiBody(msgspec.Struct):
    inputs: str | Annotated[list[str], Meta(max_length=MAX_PROMPTS)]
    parameters: dict[str, Any] | None = None
    stream: bool | None = None
    adapters: str | list[str] | None = None
    model: str | None = None


_NAMES = KnownNames(LmiBody.__struct_fields__, inside=READ)


def read_lmi(
    body: dict[str, Any],
    conventions: Conventions,
    *,
    request_id: str,
    adapter: str | None = None,
    accept: str = "",
) -> Task:
    """Raises InvalidRequest naming the field.

    adapter: named in a header; it wins over the body's `adapters`. accept: the request's `Accept` header in lower case.
    """
    asked = convert(body, LmiBody)
    for name in body.keys() - LmiBody.__struct_fields__:
        log.debug("unknown field ignored: %.80s", name)
    given = asked.parameters or {}
    parameters = read_parameters(given)
    if conventions.tgi_compat and parameters.details is None:
        parameters.details = True
    many = isinstance(asked.inputs, list)
    prompts = asked.inputs if isinstance(asked.inputs, list) else [asked.inputs]
    if not prompts:
        raise InvalidRequest("inputs is an empty list", param="inputs")
    stream = _streams(asked.stream, len(prompts), parameters, conventions)
    adapters = _adapters(asked.adapters, adapter, len(prompts))
    details = bool(parameters.details)
    sampling = read_sampling(
        parameters,
        conventions.sampling,
        shows_tokens=stream or details,
        shows_prompt=parameters.prefill and not stream,
    )
    constraint = constraint_of(given)
    misspelt = [*_NAMES.misspelt(body), *PARAMETER_NAMES.misspelt(given, "parameters")]
    requests = [
        GenerationRequest(
            request_id=request_id if len(prompts) == 1 else f"{request_id}-{i}",
            prompt=TextPrompt(picture_parts(text)),
            sampling=sampling,
            n=parameters.answers,
            stream=stream,
            model=asked.model,
            adapter=adapters[i],
            truncate_prompt_tokens=parameters.truncate,
            max_tokens_is_default=parameters.max_new_tokens is None and parameters.max_tokens is None,
            constraint=constraint,
            names=NAMES,
        )
        for i, text in enumerate(prompts)
    ]
    if conventions.custom_output:
        completion = CompletionWriter(
            reply_id=f"cmpl-{request_id}",
            model=asked.model or conventions.model_name,
            n=parameters.returned,
            logprobs=parameters.top_tokens if sampling.logprobs is not None else None,
        )
        return Task(requests, completion, misspelt)
    if conventions.tgi_compat:
        events = tgi_writer(prompts, requests, parameters, conventions)
        return Task(requests, JsonLines(events) if wants_lines(accept) else events, misspelt)
    writer = LmiWriter(
        prompts,
        many=many,
        returned=parameters.returned,
        details=details,
        prefill=sampling.prompt_logprobs is not None,
        full_text=bool(parameters.return_full_text),
        top_tokens=parameters.top_tokens,
        seed=None if parameters.seed == -1 else parameters.seed,
        sse=_wants_sse(accept, conventions),
    )
    return Task(requests, writer, misspelt)


def _streams(asked: bool | None, prompts: int, parameters: Parameters, conventions: Conventions) -> bool:
    """What the client says; else what the operator's formatter does with a request that can be streamed."""
    single = prompts == 1 and parameters.answers == 1
    if asked is None:
        return single and conventions.output_formatter in ("jsonlines", "sse")
    if asked and prompts > 1:
        raise InvalidRequest("inputs: only one prompt can be streamed; send them one by one", param="inputs")
    if asked and not single:
        name = "n" if parameters.best_of is None else "best_of"
        raise InvalidRequest(
            f"parameters.{name}: only one answer can be streamed", param=f"parameters.{name}"
        )
    return asked


def _adapters(named: str | list[str] | None, header: str | None, count: int) -> list[str | None]:
    if header is not None:
        return [header] * count
    if isinstance(named, list):
        if len(named) != count:
            raise InvalidRequest(f"adapters has {len(named)} names for {count} inputs", param="adapters")
        return [name or None for name in named]
    return [named or None] * count


def _wants_sse(accept: str, conventions: Conventions) -> bool:
    if "text/event-stream" in accept:
        return True
    return conventions.output_formatter == "sse" and not wants_lines(accept)
