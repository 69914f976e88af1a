"""LMI replies: one JSON object (or a list for a list of prompts), or a JSON line for each token."""

from __future__ import annotations

from typing import Any

import msgspec

from handlers.backends.base import Delta, PositionLogprobs, PromptStats, TokenLogprob
from handlers.errors import ServingError
from handlers.protocols.base import JSON_LINES, SSE, Answer, Answered
from handlers.protocols.error_replies import lmi_error
from handlers.protocols.openai.reply import finite

_encode = msgspec.json.Encoder().encode


class LmiWriter:
    """inputs: the prompts as they were sent. many: whether they were a list, which is answered by a list.

    returned: of the answers to a prompt, how many are told of: the most likely one is the reply, the next ones are
    among its details.
    """

    def __init__(
        self,
        inputs: list[str],
        *,
        many: bool = False,
        returned: int = 1,
        details: bool = False,
        prefill: bool = False,
        full_text: bool = False,
        top_tokens: int = 0,
        seed: int | None = None,
        sse: bool = False,
    ) -> None:
        self._inputs = inputs
        self._many = many
        self._returned = returned
        self._details = details
        self._prefill = prefill
        self._full_text = full_text
        self._top_tokens = top_tokens
        self._seed = seed
        self._before, self._after = (b"data: ", b"\n\n") if sse else (b"", b"\n")
        self._answer = Answer()
        self.stream_type = SSE if sse else JSON_LINES
        self.keep_alive = b": keep-alive\n\n" if sse else b""

    def whole(self, answered: list[Answered]) -> bytes:
        replies = [
            self._reply(text, one.stats, one.answers)
            for text, one in zip(self._inputs, answered, strict=True)
        ]
        return _encode(replies if self._many else replies[0])

    def chunk(self, delta: Delta, stats: PromptStats) -> bytes:
        """A line for each token; the last one also has the whole text, and details if they were asked for."""
        self._answer.add(delta)
        lines: list[dict[str, Any]] = [
            {"token": token} for token in _shown(delta, last=delta.finish_reason is not None)
        ]
        if self._top_tokens:
            for line, position in zip(lines, delta.logprobs or (), strict=False):
                line["top_tokens"] = self._top(position)
        if delta.finish_reason is not None:
            if not lines:
                lines.append({"token": {"id": None, "text": delta.text, "log_prob": None}})
            lines[-1]["generated_text"] = self._text(self._inputs[0], self._answer)
            if self._details:
                lines[-1]["details"] = self._summary(self._inputs[0], self._answer)
        return b"".join([self._before + _encode(line) + self._after for line in lines])

    def end(self, stats: PromptStats) -> bytes:
        return b""

    def failed(self, error: ServingError) -> bytes:
        broken = {**lmi_error(error), "generated_text": None, "details": {"finish_reason": "error"}}
        return self._before + _encode(broken) + self._after

    def _reply(self, inputs: str, stats: PromptStats, answers: list[Answer]) -> dict[str, Any]:
        ranked = sorted(answers, key=likelihood, reverse=True) if len(answers) > 1 else answers
        best, *others = ranked[: self._returned]
        reply: dict[str, Any] = {"generated_text": self._text(inputs, best)}
        if self._details:
            reply["details"] = details = self._full_details(inputs, best)
            if self._prefill:
                details["prefill"] = _prefill(stats)
            if others:
                details["best_of_sequences"] = [
                    {"generated_text": self._text(inputs, other), **self._full_details(inputs, other)}
                    for other in others
                ]
        return reply

    def _full_details(self, inputs: str, answer: Answer) -> dict[str, Any]:
        details = self._summary(inputs, answer)
        details["tokens"] = [_token(position.chosen) for position in answer.logprobs]
        if answer.eos and len(details["tokens"]) == len(answer.token_ids) > 0:
            details["tokens"][-1]["special_token"] = True
        if self._top_tokens:
            details["top_tokens"] = [self._top(position) for position in answer.logprobs]
        return details

    def _text(self, inputs: str, answer: Answer) -> str:
        return inputs + answer.text if self._full_text else answer.text

    def _summary(self, inputs: str, answer: Answer) -> dict[str, Any]:
        return {
            "finish_reason": finish_reason(answer),
            "generated_tokens": len(answer.token_ids),
            "seed": self._seed,
            "inputs": inputs,
        }

    def _top(self, position: PositionLogprobs) -> list[dict[str, Any]]:
        return [_token(candidate) for candidate in position.top[: self._top_tokens]]


def likelihood(answer: Answer) -> float:
    """The logarithm of the probability of the whole answer."""
    return sum(position.chosen.logprob for position in answer.logprobs)


def finish_reason(answer: Answer) -> str:
    """LMI's words: length, eos_token, stop_sequence."""
    if answer.finish_reason == "length":
        return "length"
    return "eos_token" if answer.eos or answer.stop_reason is None else "stop_sequence"


def _shown(delta: Delta, *, last: bool) -> list[dict[str, Any]]:
    """The delta's tokens with what each added to the text: clients join that.

    A token that holds a part of a character has an empty text; the one that completes it has it all.
    """
    tokens = [_token(position.chosen) for position in delta.logprobs or ()]
    if len(tokens) != len(delta.token_ids):
        tokens = [{"id": token_id, "text": "", "log_prob": None} for token_id in delta.token_ids]
    for token, piece in zip(tokens, delta.pieces, strict=False):
        token["text"] = piece
    if last and delta.eos and tokens:
        tokens[-1]["special_token"] = True
    return tokens


def _prefill(stats: PromptStats) -> list[dict[str, Any]]:
    """The prompt's tokens; the first has no probability."""
    ids = stats.prompt_token_ids
    positions = stats.prompt_logprobs or []
    return [
        _token(position.chosen)
        if position is not None
        else {"id": ids[i] if i < len(ids) else None, "text": stats.first_token_text, "log_prob": None}
        for i, position in enumerate(positions)
    ]


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {"id": token.token_id, "text": token.text, "log_prob": finite(token.logprob)}
