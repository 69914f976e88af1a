"""Text completions, as OpenAI documents them and vLLM extends them: from the body to a `Task`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Meta

from engine.sampling_params import MAX_LOGPROBS, shown
from handlers.errors import InvalidRequest
from handlers.protocols.base import MAX_PROMPTS, Conventions, Task, TokenId, sampling_params
from handlers.protocols.body import convert
from handlers.protocols.constraints import read_constraint
from handlers.protocols.markdown_pictures import picture_parts
from handlers.protocols.openai.completions_reply import CompletionWriter
from handlers.protocols.openai.fields import (
    MAX_ANSWERS,
    CommonBody,
    StreamOptions,
    check_stream,
    common_sampling,
    count_answers,
    known_names,
    refuse_unsupported,
)
from handlers.protocols.sampler_fields import sampler_names
from handlers.request import GenerationRequest, TextPrompt

DEFAULT_MAX_TOKENS = 16
"""OpenAI's, where the body has no `max_tokens`; null means the model's own default, else up to the context's end."""

_Logprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]


class CompletionBody(CommonBody, kw_only=True):
    """A request's own fields. Those of the first block are OpenAI's, the others vLLM's."""

    prompt: str | list[str | TokenId | list[TokenId]]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: _Logprobs | None = None
    suffix: str | None = None


_NAMES = known_names(CompletionBody)


@dataclass(frozen=True, slots=True)
class _Shown:
    """A prompt, and what `echo` shows of it; None for the text of its tokens."""

    prompt: TextPrompt
    echo: str | None


def read_completion(
    body: dict[str, Any], conventions: Conventions, *, request_id: str, adapter: str | None = None
) -> Task:
    """Raises InvalidRequest naming the field; nothing has been fetched or generated then.

    adapter: named in a header; it wins over the body's `adapters`.
    """
    refuse_unsupported(body, CompletionBody)
    asked = convert(body, CompletionBody)
    if asked.suffix:
        raise InvalidRequest(
            "suffix: this server cannot fill in before a suffix; leave it out", param="suffix"
        )
    stream, n = check_stream(asked), count_answers(asked)
    best_of = _best_of(asked, n, stream)
    constraint = read_constraint(
        response_format=asked.response_format, structured_outputs=asked.structured_outputs, guided=body
    )
    echo_only = bool(asked.echo) and asked.max_tokens == 0
    names = sampler_names(asked)
    sampling = sampling_params(_sampling(body, asked, best_of > n, echo_only), conventions.sampling, names)
    prompts = _prompts(asked)
    requests = [
        GenerationRequest(
            request_id=request_id if len(prompts) == 1 else f"{request_id}-{i}",
            prompt=one.prompt,
            sampling=sampling,
            n=best_of,
            stream=stream,
            model=asked.model,
            adapter=adapter if adapter is not None else asked.adapters or None,
            priority=asked.priority or 0,
            truncate_prompt_tokens=asked.truncate_prompt_tokens,
            truncation_side=asked.truncation_side or "left",
            max_tokens_is_default=asked.max_tokens is None and sampling.max_tokens is not None,
            names=names,
            constraint=constraint,
        )
        for i, one in enumerate(prompts)
    ]
    options = asked.stream_options or StreamOptions()
    writer = CompletionWriter(
        reply_id=f"cmpl-{asked.request_id or request_id}",
        model=asked.model or conventions.model_name,
        n=n,
        logprobs=asked.logprobs,
        prompt_logprobs=asked.prompt_logprobs,
        echo=[one.echo for one in prompts] if asked.echo else None,
        echo_only=echo_only,
        include_usage=bool(options.include_usage),
        continuous_usage=bool(options.continuous_usage_stats),
        token_ids=bool(asked.return_token_ids),
        tokens_as_ids=bool(asked.return_tokens_as_token_ids),
    )
    return Task(requests, writer, _NAMES.misspelt(body))


def _best_of(asked: CompletionBody, n: int, stream: bool) -> int:
    best_of = n if asked.best_of is None else asked.best_of
    if not n <= best_of <= MAX_ANSWERS:
        raise InvalidRequest(
            f"best_of is {shown(best_of)}; allowed: from n, which is {n}, to {MAX_ANSWERS}", param="best_of"
        )
    if stream and best_of > n:
        raise InvalidRequest(
            "best_of above n cannot be streamed: the best is known at the end", param="best_of"
        )
    return best_of


def _sampling(body: dict[str, Any], asked: CompletionBody, choose: bool, echo_only: bool) -> dict[str, Any]:
    """choose: the best answers are chosen by their probability. echo_only: no answer is shown."""
    values = common_sampling(asked)
    if "max_tokens" not in body:
        values["max_tokens"] = DEFAULT_MAX_TOKENS
    elif echo_only:
        values["max_tokens"] = 1
    values["logprobs"] = 0 if asked.logprobs is None and choose else asked.logprobs
    if asked.echo and asked.logprobs is not None:
        values["prompt_logprobs"] = max(asked.logprobs, asked.prompt_logprobs or 0)
    return values


def _prompts(asked: CompletionBody) -> list[_Shown]:
    given, special = asked.prompt, asked.add_special_tokens is not False
    if isinstance(given, str):
        return [_text(given, special)]
    if not given:
        raise InvalidRequest("prompt is an empty list", param="prompt")
    if all(isinstance(item, int) for item in given):
        return [_ids(given)]  # type: ignore[arg-type]
    if len(given) > MAX_PROMPTS:
        raise InvalidRequest(f"prompt is a list of {len(given)}; allowed: {MAX_PROMPTS}", param="prompt")
    if all(isinstance(item, str) for item in given):
        return [_text(item, special) for item in given]  # type: ignore[arg-type]
    if all(isinstance(item, list) for item in given):
        return [_ids(item) for item in given]  # type: ignore[arg-type]
    raise InvalidRequest(
        "prompt mixes texts, token ids and lists of token ids: send one kind", param="prompt"
    )


def _text(text: str, add_special_tokens: bool) -> _Shown:
    return _Shown(TextPrompt(picture_parts(text), add_special_tokens=add_special_tokens), text)


def _ids(token_ids: list[int]) -> _Shown:
    if not token_ids:
        raise InvalidRequest("prompt holds an empty list of token ids", param="prompt")
    return _Shown(TextPrompt([], token_ids=token_ids), None)
