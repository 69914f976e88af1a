"""TGI's replies: one JSON object, or that in a list, or a server-sent event for each token; and its errors.

The structs are both what is written and what `/openapi.json` describes. Their fields stand in TGI's order, and those
that TGI leaves out are `UNSET`.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence, Set
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from handlers.backends.base import Delta, PositionLogprobs, PromptStats, TokenLogprob
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
from handlers.protocols.base import Answer, Answered, ErrorFormat, finite

_encode = msgspec.json.Encoder().encode

_DRAWN_BITS = 53
"""Bits of a seed that the client did not choose: as many as a JavaScript number has, because the reply shows it."""

FinishReason = Literal["length", "eos_token", "stop_sequence"]


class TgiToken(Struct, forbid_unknown_fields=True):
    """A token. Clients join the texts of those that are not special."""

    id: int
    text: str
    logprob: float | None
    special: bool


class TgiPrefillToken(Struct, forbid_unknown_fields=True):
    """A token of the prompt; the first one has no probability."""

    id: int
    text: str
    logprob: float | None


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


class TgiWriter:
    """Writes one reply to TGI's body."""

    stream_type = "text/event-stream"
    keep_alive = b":\n\n"

    def __init__(
        self,
        inputs: str,
        *,
        array: bool = False,
        details: bool = False,
        prefill: bool = False,
        full_text: bool = False,
        top_tokens: int = 0,
        seeds: Sequence[int | None] = (None,),
        special_token_ids: Set[int] = frozenset(),
    ) -> None:
        """Prepare to write.

        Args:
            inputs: The prompt as it was sent.
            array: Whether the object is wrapped in a list.
            details: Whether to show details.
            full_text: Whether the text begins with the prompt.
            prefill: Whether details show the prompt's tokens.
            top_tokens: The number of alternatives to show at each position.
            seeds: One for each answer, None for greedy ones.
            special_token_ids: Tokens that add no text.
        """
        self._inputs = inputs
        self._array = array
        self._details = details
        self._prefill = prefill
        self._full_text = full_text
        self._top_tokens = top_tokens
        self._seeds = seeds
        self._special = special_token_ids
        self._answer = Answer()
        self._index = 0

    def whole(self, answered: list[Answered]) -> bytes:
        (only,) = answered
        seeded = list(zip(only.answers, self._seeds, strict=True))
        seeded.sort(key=lambda pair: _mean_logprob(pair[0]), reverse=True)
        (best, seed), *others = seeded
        reply = TgiReply(self._text(best))
        if self._details:
            reply.details = TgiSequence(**self._sequence(best, seed, only.stats))
            if others:
                reply.details.best_of_sequences = [
                    TgiSequence(
                        generated_text=self._text(other), **self._sequence(other, its_seed, only.stats)
                    )
                    for other, its_seed in others
                ]
        return _encode([reply] if self._array else reply)

    def chunk(self, delta: Delta, stats: PromptStats) -> bytes:
        """Return an event for each token."""
        self._answer.add(delta)
        events: list[TgiEvent] = []
        for token, position in self._tokens(delta):
            self._index += 1
            event = TgiEvent(index=self._index, token=token, generated_text=None, details=None)
            if self._top_tokens and position is not None:
                event.top_tokens = self._top(position)
            events.append(event)
        if delta.finish_reason is not None and events:
            events[-1].generated_text = self._text(self._answer)
            if self._details:
                events[-1].details = TgiStreamDetails(
                    finish_reason(self._answer),
                    len(self._answer.token_ids),
                    self._seeds[0],
                    stats.prompt_tokens,
                )
        return b"".join([b"data: " + _encode(event) + b"\n\n" for event in events])

    def end(self, stats: PromptStats) -> bytes:
        return b""

    def failed(self, error: ServingError) -> bytes:
        return b"data: " + _encode(tgi_error(error)) + b"\n\n"

    def _text(self, answer: Answer) -> str:
        return self._inputs + answer.text if self._full_text else answer.text

    def _sequence(self, answer: Answer, seed: int | None, stats: PromptStats) -> dict[str, Any]:
        """Returns the fields of a `TgiSequence`."""
        tops = [self._top(position) for position in answer.logprobs] if self._top_tokens else UNSET
        return {
            "finish_reason": finish_reason(answer),
            "generated_tokens": len(answer.token_ids),
            "seed": seed,
            "prefill": _prefill(stats) if self._prefill else [],
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
        special = [token_id in self._special for token_id in delta.token_ids]
        if delta.eos and special:
            special[-1] = True
        shown = zip(delta.token_ids, delta.pieces, special, positions, strict=False)
        for token_id, text, no_text, position in shown:
            logprob = None if position is None else finite(position.chosen.logprob)
            yield TgiToken(token_id, text, logprob, no_text and not text), position
        if not delta.token_ids and (delta.text or delta.finish_reason is not None):
            yield TgiToken(0, delta.text, None, not delta.text), None

    def _top(self, position: PositionLogprobs) -> list[TgiToken]:
        return [self._token(candidate) for candidate in position.top[: self._top_tokens]]

    def _token(self, token: TokenLogprob) -> TgiToken:
        return TgiToken(token.token_id, token.text, finite(token.logprob), token.token_id in self._special)


def finish_reason(answer: Answer) -> FinishReason:
    """Return why an answer ended, in TGI's words."""
    if answer.finish_reason == "length":
        return "length"
    return "eos_token" if answer.eos or answer.stop_reason is None else "stop_sequence"


def shown_seeds(seed: int | None, answers: int) -> list[int | None]:
    """Returns the seeds of answers that are drawn from `seed`, or from a new one where the client chose none."""
    first = secrets.randbits(_DRAWN_BITS) if seed is None else seed
    return [first + number for number in range(answers)]


def _mean_logprob(answer: Answer) -> float:
    """Return the number by which TGI chooses the best of several answers."""
    logprobs = [position.chosen.logprob for position in answer.logprobs]
    return sum(logprobs) / len(logprobs) if logprobs else 0.0


def _prefill(stats: PromptStats) -> list[TgiPrefillToken]:
    ids = stats.prompt_token_ids
    return [
        TgiPrefillToken(position.chosen.token_id, position.chosen.text, finite(position.chosen.logprob))
        if position is not None
        else TgiPrefillToken(ids[i] if i < len(ids) else 0, stats.first_token_text, None)
        for i, position in enumerate(stats.prompt_logprobs or ())
    ]


def tgi_error(error: ServingError) -> TgiError:
    """Returns the error in TGI's words."""
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
