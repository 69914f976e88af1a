"""TGI's replies: one JSON object, or that in a list, or a server-sent event for each token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from typing import Any

import msgspec

from handlers.backends.base import Delta, PositionLogprobs, PromptStats, TokenLogprob
from handlers.errors import ServingError
from handlers.protocols.base import Answer, Answered
from handlers.protocols.error_replies import tgi_error
from handlers.protocols.lmi.reply import finish_reason
from handlers.protocols.openai.reply import finite

_encode = msgspec.json.Encoder().encode


class TgiWriter:
    """Writes one `/generate` reply. Keys stand in TGI's order, and are absent where TGI leaves them out.

    inputs: the prompt as it was sent. array: whether the object is wrapped in a list.
    seeds: one for each answer, None for greedy ones. special_token_ids: those that are no text.
    """

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
        reply: dict[str, Any] = {"generated_text": self._text(best)}
        if self._details:
            reply["details"] = details = self._sequence(best, seed, only.stats)
            if others:
                top_tokens = details.pop("top_tokens", None)
                details["best_of_sequences"] = [
                    {"generated_text": self._text(other), **self._sequence(other, its_seed, only.stats)}
                    for other, its_seed in others
                ]
                if top_tokens is not None:
                    details["top_tokens"] = top_tokens
        return _encode([reply] if self._array else reply)

    def chunk(self, delta: Delta, stats: PromptStats) -> bytes:
        """An event for each token. The last one has the whole text, and details if they were asked for."""
        self._answer.add(delta)
        events: list[dict[str, Any]] = []
        for token, position in self._tokens(delta):
            self._index += 1
            event = {"index": self._index, "token": token}
            if self._top_tokens and position is not None:
                event["top_tokens"] = self._top(position)
            events.append({**event, "generated_text": None, "details": None})
        if delta.finish_reason is not None and events:
            events[-1]["generated_text"] = self._text(self._answer)
            if self._details:
                events[-1]["details"] = {
                    "finish_reason": finish_reason(self._answer),
                    "generated_tokens": len(self._answer.token_ids),
                    "seed": self._seeds[0],
                    "input_length": stats.prompt_tokens,
                }
        return b"".join([b"data: " + _encode(event) + b"\n\n" for event in events])

    def end(self, stats: PromptStats) -> bytes:
        return b""

    def failed(self, error: ServingError) -> bytes:
        return b"data: " + _encode(tgi_error(error)) + b"\n\n"

    def _text(self, answer: Answer) -> str:
        return self._inputs + answer.text if self._full_text else answer.text

    def _sequence(self, answer: Answer, seed: int | None, stats: PromptStats) -> dict[str, Any]:
        details: dict[str, Any] = {
            "finish_reason": finish_reason(answer),
            "generated_tokens": len(answer.token_ids),
            "seed": seed,
            "prefill": _prefill(stats) if self._prefill else [],
            "tokens": self._all_tokens(answer),
        }
        if self._top_tokens:
            details["top_tokens"] = [self._top(position) for position in answer.logprobs]
        return details

    def _all_tokens(self, answer: Answer) -> list[dict[str, Any]]:
        """A token's text is what it added to the answer; a special one that added none shows itself."""
        tokens = [self._token(position.chosen) for position in answer.logprobs]
        if len(tokens) != len(answer.token_ids):
            return tokens
        if answer.eos and tokens:
            tokens[-1]["special"] = True
        for token, added in zip(tokens, answer.pieces, strict=False):
            if added or not token["special"]:
                token["text"], token["special"] = added, False
        return tokens

    def _tokens(self, delta: Delta) -> Iterator[tuple[dict[str, Any], PositionLogprobs | None]]:
        """The delta's tokens with what each added to the text: clients join that of tokens that are not special."""
        positions: Sequence[PositionLogprobs | None] = delta.logprobs or ()
        if len(positions) != len(delta.token_ids):
            positions = [None] * len(delta.token_ids)
        special = [token_id in self._special for token_id in delta.token_ids]
        if delta.eos and special:
            special[-1] = True
        shown = zip(delta.token_ids, delta.pieces, special, positions, strict=False)
        for token_id, text, no_text, position in shown:
            logprob = None if position is None else finite(position.chosen.logprob)
            yield (
                {"id": token_id, "text": text, "logprob": logprob, "special": no_text and not text},
                position,
            )
        if not delta.token_ids and (delta.text or delta.finish_reason is not None):
            yield {"id": 0, "text": delta.text, "logprob": None, "special": not delta.text}, None

    def _top(self, position: PositionLogprobs) -> list[dict[str, Any]]:
        return [self._token(candidate) for candidate in position.top[: self._top_tokens]]

    def _token(self, token: TokenLogprob) -> dict[str, Any]:
        return {
            "id": token.token_id,
            "text": token.text,
            "logprob": finite(token.logprob),
            "special": token.token_id in self._special,
        }


def _mean_logprob(answer: Answer) -> float:
    """By which TGI chooses the best of several answers."""
    logprobs = [position.chosen.logprob for position in answer.logprobs]
    return sum(logprobs) / len(logprobs) if logprobs else 0.0


def _prefill(stats: PromptStats) -> list[dict[str, Any]]:
    """The prompt's tokens; the first has no probability."""
    ids = stats.prompt_token_ids
    return [
        {
            "id": position.chosen.token_id,
            "text": position.chosen.text,
            "logprob": finite(position.chosen.logprob),
        }
        if position is not None
        else {"id": ids[i] if i < len(ids) else 0, "text": stats.first_token_text, "logprob": None}
        for i, position in enumerate(stats.prompt_logprobs or ())
    ]
