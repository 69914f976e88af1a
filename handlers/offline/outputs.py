"""Results of offline inference, with the attributes of vLLM's `RequestOutput` and, in addition, an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from handlers.deltas import FinishReason, PositionLogprobs, PromptStats
from handlers.errors import ServingError
from handlers.protocols.base import Answer


@dataclass(frozen=True, slots=True)
class Logprob:
    """A candidate at a position. rank: 1 for the most likely token."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(slots=True)
class CompletionOutput:
    """One answer to a prompt.

    Attributes:
        index: Number of the answer among those to the prompt.
        text: The answer.
        token_ids: Its tokens.
        cumulative_logprob: Sum of the chosen tokens' log probabilities; None unless log probabilities were requested.
        logprobs: For each token, token id -> `Logprob` of each candidate, the chosen one first; None unless requested.
        finish_reason: Why it ended; "error" if there is no answer (see `RequestOutput.error`).
        stop_reason: Stop string or stop token that ended it; None if the end-of-sequence token or the length did.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | Literal["error"] | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """One prompt and its answers.

    Attributes:
        request_id: Unique id.
        prompt: Text after the chat template; None if the prompt was given as token ids.
        prompt_token_ids: Tokens of the prompt, those of images included.
        outputs: The answers; empty ones if there is an error.
        prompt_logprobs: For each token of the prompt, as in `CompletionOutput.logprobs`; None unless requested.
        num_cached_tokens: Tokens of the prompt that were in the cache.
        error: Why there is no answer.
        finished: Always true.
        metrics: Always None.
        lora_request: Always None.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    error: ServingError | None = None
    finished: bool = True
    metrics: None = None
    lora_request: None = None


def answered(
    request_id: str,
    prompt: str | None,
    stats: PromptStats,
    answers: Sequence[Answer],
    *,
    logprobs: bool,
    best: int | None,
) -> RequestOutput:
    """Make a result. best: how many answers to keep, those with the most likely tokens; None for all."""
    outputs = [_completion(index, answer) for index, answer in enumerate(answers)]
    if best is not None:
        outputs.sort(key=lambda output: -(output.cumulative_logprob or 0.0))
        outputs = outputs[:best]
        for index, output in enumerate(outputs):
            output.index = index
    if not logprobs:
        for output in outputs:
            output.logprobs = output.cumulative_logprob = None
    return RequestOutput(
        request_id,
        prompt,
        stats.prompt_token_ids,
        outputs,
        prompt_logprobs=None
        if stats.prompt_logprobs is None
        else [None if entry is None else _candidates(entry) for entry in stats.prompt_logprobs],
        num_cached_tokens=stats.cached_tokens,
    )


def failed(request_id: str, prompt: str | None, count: int, error: ServingError) -> RequestOutput:
    """Make a result with an error and `count` empty answers."""
    empty = [CompletionOutput(index, finish_reason="error") for index in range(count)]
    return RequestOutput(request_id, prompt, [], empty, error=error)


def _completion(index: int, answer: Answer) -> CompletionOutput:
    return CompletionOutput(
        index,
        answer.text,
        answer.token_ids,
        answer.logprob if answer.logprobs else None,
        [_candidates(entry) for entry in answer.logprobs] if answer.logprobs else None,
        answer.finish_reason,
        answer.stop_reason,
    )


def _candidates(entry: PositionLogprobs) -> dict[int, Logprob]:
    return {token.token_id: Logprob(token.logprob, token.rank, token.text) for token in (entry.chosen, *entry.top)}
