"""TGI's replies: one JSON object, alone or in a list, or an event for each token; its headers, errors and `/info`.

The structs are both what is written and what `/openapi.json` describes. Their fields are in TGI's order, and those that
TGI leaves out are `UNSET`.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from handlers.deltas import Delta, PositionLogprobs, PromptStats, TokenLogprob
from handlers.errors import (
    ContextExceeded,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    MalformedBody,
    Overloaded,
    ServingError,
    Unavailable,
)
from handlers.protocols.base import JSON, MAX_ANSWERS, MAX_PROMPTS, SSE_TYPE, Answer, Answered, ErrorFormat
from handlers.request import MAX_STOP_STRINGS, Incoming, Reply
from handlers.version import VERSION

if TYPE_CHECKING:
    from handlers.service import Service

_encode = msgspec.json.Encoder().encode

_DRAWN_BITS = 53
"""Bits of a seed that the client did not choose: as many as a JavaScript number has, because the reply shows it."""

FinishReason = Literal["length", "eos_token", "stop_sequence"]


class TgiPrefillToken(Struct, forbid_unknown_fields=True):
    """A token of the prompt; the first one has no probability."""

    id: int
    text: str
    logprob: float | None


class TgiToken(TgiPrefillToken, forbid_unknown_fields=True):
    """A token. Clients join the texts of those that are not special."""

    special: bool


class TgiSequence(Struct, kw_only=True, forbid_unknown_fields=True):
    """The `details` of one answer; `generated_text` is there only for answers that are not the best of several."""

    generated_text: str | UnsetType = UNSET
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[TgiPrefillToken]
    tokens: list[TgiToken]
    best_of_sequences: list[TgiSequence] | UnsetType = UNSET
    top_tokens: list[list[TgiToken]] | UnsetType = UNSET


class TgiReply(Struct, forbid_unknown_fields=True):
    """A whole reply."""

    generated_text: str
    details: TgiSequence | UnsetType = UNSET


class TgiStreamDetails(Struct, forbid_unknown_fields=True):
    """The details of the answer in the last event of a stream."""

    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    input_length: int


class TgiEvent(Struct, kw_only=True, forbid_unknown_fields=True):
    """The `data:` of one event: a token. The last one has the whole text, and details if they were asked for."""

    index: int
    token: TgiToken
    top_tokens: list[TgiToken] | UnsetType = UNSET
    generated_text: str | None
    details: TgiStreamDetails | None


class TgiError(Struct, forbid_unknown_fields=True):
    """TGI's clients choose their exception by `error_type`; some also know the words."""

    error: str
    error_type: str


@dataclass(kw_only=True)
class TgiWriter:
    """Writes the reply to TGI's body, or to LMI's under `option.tgi_compat`; only one prompt can be streamed.

    Attributes:
        inputs: The prompts as they were sent.
        array: The objects are in a list.
        prefill: Details show the prompt's tokens.
        full_text: The text begins with the prompt.
        top_tokens: The number of alternatives to show at each position.
        seeds: Those of each prompt's answers, None for greedy ones.
        special_token_ids: Tokens that add no text.
    """

    inputs: Sequence[str]
    seeds: Sequence[Sequence[int | None]]
    array: bool = False
    details: bool = False
    prefill: bool = False
    full_text: bool = False
    top_tokens: int = 0
    special_token_ids: Set[int] = frozenset()

    stream_type = SSE_TYPE
    keep_alive = b":\n\n"

    def __post_init__(self) -> None:
        self._answer = Answer()
        self._index = 0

    def whole(self, answered: list[Answered]) -> bytes:
        replies = [self._reply(*given) for given in zip(self.inputs, self.seeds, answered, strict=True)]
        return _encode(replies if self.array else replies[0])

    def _reply(self, inputs: str, seeds: Sequence[int | None], answered: Answered) -> TgiReply:
        seeded = list(zip(answered.answers, seeds, strict=True))
        seeded.sort(key=lambda pair: pair[0].mean_logprob, reverse=True)
        (best, seed), *others = seeded
        reply = TgiReply(self._text(inputs, best))
        if self.details:
            reply.details = TgiSequence(**self._sequence(best, seed, answered.stats))
            if others:
                reply.details.best_of_sequences = [
                    TgiSequence(
                        generated_text=self._text(inputs, other), **self._sequence(other, its_seed, answered.stats)
                    )
                    for other, its_seed in others
                ]
        return reply

    def chunk(self, delta: Delta, stats: PromptStats) -> bytes:
        """Return an event for each token."""
        self._answer.add(delta)
        events: list[TgiEvent] = []
        for token, position in self._tokens(delta):
            self._index += 1
            event = TgiEvent(index=self._index, token=token, generated_text=None, details=None)
            if self.top_tokens and position is not None:
                event.top_tokens = self._top(position)
            events.append(event)
        if delta.finish_reason is not None and events:
            events[-1].generated_text = self._text(self.inputs[0], self._answer)
            if self.details:
                events[-1].details = TgiStreamDetails(
                    finish_reason(self._answer), len(self._answer.token_ids), self.seeds[0][0], stats.prompt_tokens
                )
        return b"".join([b"data: " + _encode(event) + b"\n\n" for event in events])

    def end(self, stats: PromptStats) -> bytes:
        return b""

    def failed(self, error: ServingError) -> bytes:
        return b"data: " + _encode(tgi_error(error)) + b"\n\n"

    def _text(self, inputs: str, answer: Answer) -> str:
        return inputs + answer.text if self.full_text else answer.text

    def _sequence(self, answer: Answer, seed: int | None, stats: PromptStats) -> dict[str, Any]:
        tops = [self._top(position) for position in answer.logprobs] if self.top_tokens else UNSET
        return {
            "finish_reason": finish_reason(answer),
            "generated_tokens": len(answer.token_ids),
            "seed": seed,
            "prefill": _prefill(stats) if self.prefill else [],
            "tokens": self._all_tokens(answer),
            "top_tokens": tops,
        }

    def _all_tokens(self, answer: Answer) -> list[TgiToken]:
        """Return all tokens with the text that each added; a special token that added none shows itself."""
        tokens = [self._token(position.chosen) for position in answer.logprobs]
        if len(tokens) != len(answer.token_ids):
            return tokens
        if answer.eos and tokens:
            tokens[-1].special = True
        for token, added in zip(tokens, answer.pieces, strict=False):
            if added or not token.special:
                token.text, token.special = added, False
        return tokens

    def _tokens(self, delta: Delta) -> Iterator[tuple[TgiToken, PositionLogprobs | None]]:
        """Return the delta's tokens with the text that each added, which clients join for all but special ones."""
        positions: Sequence[PositionLogprobs | None] = delta.logprobs or ()
        if len(positions) != len(delta.token_ids):
            positions = [None] * len(delta.token_ids)
        special = [token_id in self.special_token_ids for token_id in delta.token_ids]
        if delta.eos and special:
            special[-1] = True
        shown = zip(delta.token_ids, delta.pieces, special, positions, strict=False)
        for token_id, text, no_text, position in shown:
            logprob = None if position is None else position.chosen.logprob
            yield TgiToken(token_id, text, logprob, no_text and not text), position
        if not delta.token_ids and (delta.text or delta.finish_reason is not None):
            yield TgiToken(0, delta.text, None, not delta.text), None

    def _top(self, position: PositionLogprobs) -> list[TgiToken]:
        return [self._token(candidate) for candidate in position.top[: self.top_tokens]]

    def _token(self, token: TokenLogprob) -> TgiToken:
        return TgiToken(token.token_id, token.text, token.logprob, token.token_id in self.special_token_ids)


def finish_reason(answer: Answer) -> FinishReason:
    """Return why an answer ended, in TGI's words."""
    if answer.finish_reason == "length":
        return "length"
    return "eos_token" if answer.eos or answer.stop_reason is None else "stop_sequence"


def shown_seeds(seed: int | None, answers: int) -> list[int | None]:
    """Return the seeds of answers that are drawn from `seed`, or from a new one where the client chose none."""
    first = secrets.randbits(_DRAWN_BITS) if seed is None else seed
    return [first + number for number in range(answers)]


def _prefill(stats: PromptStats) -> list[TgiPrefillToken]:
    ids = stats.prompt_token_ids
    return [
        TgiPrefillToken(position.chosen.token_id, position.chosen.text, position.chosen.logprob)
        if position is not None
        else TgiPrefillToken(ids[i] if i < len(ids) else 0, stats.first_token_text, None)
        for i, position in enumerate(stats.prompt_logprobs or ())
    ]


def tgi_error(error: ServingError) -> TgiError:
    """Return the error in TGI's words."""
    if isinstance(error, InvalidRequest):
        words = _length(error) if isinstance(error, ContextExceeded) else error.message
        return TgiError(f"Input validation error: {words}", "validation")
    if isinstance(error, Overloaded):
        return TgiError("Model is overloaded", "overloaded")
    if isinstance(error, Unavailable):
        return TgiError(error.message, "overloaded")
    if isinstance(error, DeadlineExceeded):
        return TgiError(f"Incomplete generation: {error.message}", "incomplete_generation")
    if error.status == 500:
        failed = f"Request failed during generation: Server error: {error.message}"
        return TgiError(failed, "generation")
    return TgiError(error.message, error.kind)


def _length(error: ContextExceeded) -> str:
    prompt, wanted, longest = error.prompt_tokens, error.max_tokens, error.context
    if wanted is None:
        return f"`inputs` must have less than {longest - 1} tokens. Given: {prompt}"
    return (
        f"`inputs` tokens + `max_new_tokens` must be <= {longest}. "
        f"Given: {prompt} `inputs` tokens and {wanted} `max_new_tokens`"
    )


def _status(error: ServingError) -> int:
    """Return TGI's status code; 429 instead of 503, after which its JavaScript client would call again at once."""
    if isinstance(error, InvalidRequest):
        return 400 if isinstance(error, MalformedBody) else 422
    if isinstance(error, Unavailable):
        return 429
    return 424 if isinstance(error, EngineFailed) else error.status


TGI_ERRORS = ErrorFormat(tgi_error, _status)


class Info(Struct):
    """`/info`: what is served and within which limits, with the keys of TGI's current and earlier versions.

    `router` names the protocol, so that clients recognise it. Some values are 0, because a waiting prompt joins the
    next step.
    """

    model_id: str
    model_sha: None
    model_pipeline_tag: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: None
    docker_label: None
    model_dtype: str | None
    model_device_type: str | None
    max_input_length: int
    waiting_served_ratio: float
    max_batch_total_tokens: int | None
    max_waiting_tokens: int
    max_batch_size: int


async def info(service: Service, incoming: Incoming) -> Reply:
    """Answer `GET /info`."""
    capabilities = service.pipeline.capabilities
    longest = capabilities.max_model_len
    body = Info(
        model_id=service.model_name,
        model_sha=None,
        model_pipeline_tag="image-text-to-text" if capabilities.images else "text-generation",
        max_concurrent_requests=service.admission.capacity,
        max_best_of=MAX_ANSWERS,
        max_stop_sequences=MAX_STOP_STRINGS,
        max_input_tokens=longest - 1,
        max_total_tokens=longest,
        validation_workers=capabilities.prompt_threads,
        max_client_batch_size=MAX_PROMPTS,
        router="text-generation-router",
        version=VERSION,
        sha=None,
        docker_label=None,
        model_dtype=capabilities.dtype or None,
        model_device_type=capabilities.device_type or None,
        max_input_length=longest - 1,
        waiting_served_ratio=0.0,
        max_batch_total_tokens=capabilities.cache_tokens or None,
        max_waiting_tokens=0,
        max_batch_size=service.settings.max_rolling_batch_size,
    )
    return Reply(200, JSON, msgspec.json.encode(body))
