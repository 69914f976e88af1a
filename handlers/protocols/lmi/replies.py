"""LMI's replies: one JSON object (or a list for a list of prompts), or a JSON line for each token; and its errors.

The structs are both what is written and what `/openapi.json` describes. Fields that LMI leaves out are `UNSET`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal, Self

import msgspec
from msgspec import UNSET, Struct, UnsetType

from handlers.deltas import Delta, PositionLogprobs, PromptStats, TokenLogprob
from handlers.errors import ServingError
from handlers.protocols.base import JSON_LINES, KEEP_ALIVE, SSE, Answer, Answered, ErrorFormat, Writer
from handlers.protocols.tgi.replies import FinishReason, finish_reason

_encode = msgspec.json.Encoder().encode


class LmiToken(Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A token. A part of a character has an empty text; the token that completes the character has it all."""

    id: int | None
    text: str
    log_prob: float | None
    special_token: bool = False


class LmiSequence(Struct, kw_only=True, forbid_unknown_fields=True):
    """The `details` of one answer; those of a streamed one have no tokens.

    `generated_text` is there only for answers that are not the most likely of several.
    """

    generated_text: str | UnsetType = UNSET
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    inputs: str
    tokens: list[LmiToken] | UnsetType = UNSET
    top_tokens: list[list[LmiToken]] | UnsetType = UNSET
    prefill: list[LmiToken] | UnsetType = UNSET
    best_of_sequences: list[LmiSequence] | UnsetType = UNSET


class LmiReply(Struct, forbid_unknown_fields=True):
    """A whole reply to one prompt."""

    generated_text: str
    details: LmiSequence | UnsetType = UNSET


class LmiLine(Struct, kw_only=True, forbid_unknown_fields=True):
    """One line of a stream; the last one has the whole text, and details if they were asked for."""

    token: LmiToken
    top_tokens: list[LmiToken] | UnsetType = UNSET
    generated_text: str | UnsetType = UNSET
    details: LmiSequence | UnsetType = UNSET


class LmiError(Struct, forbid_unknown_fields=True):
    """`message` is where djl-serving's front puts the text, `error` where its handlers do."""

    code: int
    type: str
    message: str
    error: str

    @classmethod
    def of(cls, error: ServingError) -> Self:
        """Return what is written of an error."""
        return cls(error.status, error.kind, error.message, error.message)


class LmiFailure(Struct, forbid_unknown_fields=True):
    """Why the answer ended."""

    finish_reason: Literal["error"] = "error"


class LmiBrokenLine(LmiError, forbid_unknown_fields=True):
    """The last line of a stream that failed."""

    generated_text: None = None
    details: LmiFailure = msgspec.field(default_factory=LmiFailure)


@dataclass(kw_only=True)
class LmiWriter:
    """Writes one reply to LMI's body.

    Attributes:
        inputs: The prompts as they were sent.
        many: Whether they were a list, which is answered by a list.
        returned: How many answers to a prompt are shown: the most likely one, and the next ones among its details.
        prefill: Details show the prompt's tokens.
        full_text: The text begins with the prompt.
        top_tokens: The number of alternatives to show at each position.
        seed: As the client sent it.
        sse: Stream server-sent events, not JSON lines.
    """

    inputs: Sequence[str]
    many: bool = False
    returned: int = 1
    details: bool = False
    prefill: bool = False
    full_text: bool = False
    top_tokens: int = 0
    seed: int | None = None
    sse: bool = False

    def __post_init__(self) -> None:
        self._before, self._after = (b"data: ", b"\n\n") if self.sse else (b"", b"\n")
        self._answer = Answer()
        self.stream_type = SSE if self.sse else JSON_LINES
        self.keep_alive = KEEP_ALIVE if self.sse else b""

    def whole(self, answered: list[Answered]) -> bytes:
        replies = [self._reply(text, one.stats, one.answers) for text, one in zip(self.inputs, answered, strict=True)]
        return _encode(replies if self.many else replies[0])

    def chunk(self, delta: Delta, stats: PromptStats) -> bytes:
        """Return a line for each token."""
        self._answer.add(delta)
        lines = [LmiLine(token=token) for token in _shown(delta, last=delta.finish_reason is not None)]
        if self.top_tokens:
            for line, position in zip(lines, delta.logprobs or (), strict=False):
                line.top_tokens = self._top(position)
        if delta.finish_reason is not None:
            if not lines:
                lines.append(LmiLine(token=LmiToken(None, delta.text, None)))
            lines[-1].generated_text = self._text(self.inputs[0], self._answer)
            if self.details:
                lines[-1].details = LmiSequence(**self._summary(self.inputs[0], self._answer))
        return b"".join([self._before + _encode(line) + self._after for line in lines])

    def end(self, stats: PromptStats) -> bytes:
        return b""

    def failed(self, error: ServingError) -> bytes:
        return self._before + _encode(LmiBrokenLine.of(error)) + self._after

    def _reply(self, inputs: str, stats: PromptStats, answers: list[Answer]) -> LmiReply:
        ranked = sorted(answers, key=attrgetter("logprob"), reverse=True) if len(answers) > 1 else answers
        best, *others = ranked[: self.returned]
        reply = LmiReply(self._text(inputs, best))
        if self.details:
            reply.details = details = LmiSequence(**self._sequence(inputs, best))
            if self.prefill:
                details.prefill = _prefill(stats)
            if others:
                details.best_of_sequences = [
                    LmiSequence(generated_text=self._text(inputs, other), **self._sequence(inputs, other))
                    for other in others
                ]
        return reply

    def _sequence(self, inputs: str, answer: Answer) -> dict[str, Any]:
        tokens = [_token(position.chosen) for position in answer.logprobs]
        if answer.eos and len(tokens) == len(answer.token_ids) > 0:
            tokens[-1].special_token = True
        tops = [self._top(position) for position in answer.logprobs] if self.top_tokens else UNSET
        return {**self._summary(inputs, answer), "tokens": tokens, "top_tokens": tops}

    def _text(self, inputs: str, answer: Answer) -> str:
        return inputs + answer.text if self.full_text else answer.text

    def _summary(self, inputs: str, answer: Answer) -> dict[str, Any]:
        return {
            "finish_reason": finish_reason(answer),
            "generated_tokens": len(answer.token_ids),
            "seed": self.seed,
            "inputs": inputs,
        }

    def _top(self, position: PositionLogprobs) -> list[LmiToken]:
        return [_token(candidate) for candidate in position.top[: self.top_tokens]]


class JsonLines:
    """Writes another writer's server-sent events, each of one line of data, as one line of JSON for each event.

    This is how LMI streams chat and completions where it is asked to. Line ends inside JSON are escaped, so events and
    lines can be told apart by their ends alone.
    """

    stream_type = JSON_LINES
    keep_alive = b""

    def __init__(self, events: Writer) -> None:
        self._events = events

    def whole(self, answered: list[Answered]) -> bytes:
        return self._events.whole(answered)

    def chunk(self, delta: Delta, stats: PromptStats) -> bytes:
        return _lines(self._events.chunk(delta, stats))

    def end(self, stats: PromptStats) -> bytes:
        return _lines(self._events.end(stats))

    def failed(self, error: ServingError) -> bytes:
        return _lines(self._events.failed(error))


LMI_ERRORS = ErrorFormat(LmiError.of)


def _lines(events: bytes) -> bytes:
    """Return the lines of events without comments and `[DONE]`, which is not JSON."""
    data = [event[5:].strip() for event in events.split(b"\n\n") if event[:5] == b"data:"]
    return b"".join([line + b"\n" for line in data if line != b"[DONE]"])


def _shown(delta: Delta, *, last: bool) -> list[LmiToken]:
    """Return the delta's tokens with the text that each added, which clients join."""
    tokens = [_token(position.chosen) for position in delta.logprobs or ()]
    if len(tokens) != len(delta.token_ids):
        tokens = [LmiToken(token_id, "", None) for token_id in delta.token_ids]
    for token, piece in zip(tokens, delta.pieces, strict=False):
        token.text = piece
    if last and delta.eos and tokens:
        tokens[-1].special_token = True
    return tokens


def _prefill(stats: PromptStats) -> list[LmiToken]:
    """Return the prompt's tokens; the first one has no probability."""
    ids = stats.prompt_token_ids
    return [
        _token(position.chosen)
        if position is not None
        else LmiToken(ids[i] if i < len(ids) else None, stats.first_token_text, None)
        for i, position in enumerate(stats.prompt_logprobs or ())
    ]


def _token(token: TokenLogprob) -> LmiToken:
    return LmiToken(token.token_id, token.text, token.logprob)
