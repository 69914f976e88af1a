"""Reads the body of a text completion."""

from __future__ import annotations

from typing import Any

from engine.sampling_params import shown
from handlers.errors import InvalidParameter, InvalidRequest
from handlers.protocols.base import MAX_ANSWERS, MAX_PROMPTS, ServerContext, Task
from handlers.protocols.body import convert
from handlers.protocols.constraints import read_constraint
from handlers.protocols.markdown_images import image_parts
from handlers.protocols.openai.bodies import (
    CompletionBody,
    check_stream,
    common_sampling,
    count_answers,
    generation_request,
    known_names,
    refuse_unsupported,
    reply_options,
)
from handlers.protocols.openai.completion_writer import CompletionWriter
from handlers.protocols.sampler_fields import sampler_names, sampling_params
from handlers.request import Incoming, TextPrompt

DEFAULT_MAX_TOKENS = 16
"""For a body without `max_tokens`, as in OpenAI's API; null means the model's own default, or else up to the end of the
context."""

_NAMES = known_names(CompletionBody)


def read_completion(
    body: dict[str, Any], server: ServerContext, incoming: Incoming, adapter: str | None = None
) -> Task:
    """See `Reader`."""
    refuse_unsupported(body, CompletionBody)
    asked = convert(body, CompletionBody)
    if asked.suffix:
        raise InvalidRequest("suffix: this server cannot fill in before a suffix; leave it out", param="suffix")
    check_stream(asked)
    n = count_answers(asked)
    best_of = _best_of(asked, n)
    constraint = read_constraint(
        response_format=asked.response_format, structured_outputs=asked.structured_outputs, guided=body
    )
    echo_only = bool(asked.echo) and asked.max_tokens == 0
    names = sampler_names(asked)
    defaults = server.sampling if "max_tokens" in body else {**server.sampling, "max_tokens": DEFAULT_MAX_TOKENS}
    sampling = sampling_params(_sampling(asked, best_of > n, echo_only), defaults, names)
    prompts = _prompts(asked.prompt)
    request_id = incoming.request_id
    requests = [
        generation_request(
            asked,
            request_id if len(prompts) == 1 else f"{request_id}-{i}",
            _text_prompt(given, asked.add_special_tokens is not False),
            sampling,
            n=best_of,
            adapter=adapter,
            constraint=constraint,
        )
        for i, given in enumerate(prompts)
    ]
    writer = CompletionWriter(
        reply_options(asked, f"cmpl-{asked.request_id or request_id}", server.model_name),
        n=n,
        logprobs=asked.logprobs,
        prompt_logprobs=asked.prompt_logprobs,
        echo=[given if isinstance(given, str) else None for given in prompts] if asked.echo else None,
        echo_only=echo_only,
    )
    return Task(requests, writer, _NAMES.misspelt(body), names)


def _best_of(asked: CompletionBody, n: int) -> int:
    best_of = n if asked.best_of is None else asked.best_of
    if not n <= best_of <= MAX_ANSWERS:
        raise InvalidParameter("best_of", f"is {shown(best_of)}; allowed: from n, which is {n}, to {MAX_ANSWERS}")
    if asked.stream and best_of > n:
        raise InvalidParameter("best_of", "above n cannot be streamed: the best is known at the end")
    return best_of


def _sampling(asked: CompletionBody, choose: bool, echo_only: bool) -> dict[str, Any]:
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
        raise InvalidParameter("prompt", "is an empty list")
    if all(isinstance(item, int) for item in given):
        return [given]  # type: ignore[list-item]
    if len(given) > MAX_PROMPTS:
        raise InvalidParameter("prompt", f"is a list of {len(given)}; allowed: {MAX_PROMPTS}")
    if all(isinstance(item, str) for item in given) or all(isinstance(item, list) for item in given):
        return given  # type: ignore[return-value]
    raise InvalidParameter("prompt", "mixes texts, token ids and lists of token ids: send one kind")


def _text_prompt(given: str | list[int], add_special_tokens: bool) -> TextPrompt:
    if isinstance(given, str):
        return TextPrompt(image_parts(given), add_special_tokens=add_special_tokens)
    if not given:
        raise InvalidParameter("prompt", "holds an empty list of token ids")
    return TextPrompt([], token_ids=given)
