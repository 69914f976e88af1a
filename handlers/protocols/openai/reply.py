"""Chat completions written: one JSON object, or server-sent events of chunks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from handlers.backends.base import Delta, PositionLogprobs, PromptStats, TokenLogprob
from handlers.protocols.base import Answer, Answered
from handlers.protocols.openai.frames import OpenAIFrames, encode, usage
from handlers.protocols.openai.parsed import ParsedAnswers, first_delta

_LEAST_LOGPROB = -9999.0  # OpenAI's number for "impossible"; JSON has no infinity
_TAIL = b'},"logprobs":null,"finish_reason":null}]}\n\n'
_TAIL_NO_USAGE_YET = b'},"logprobs":null,"finish_reason":null}],"usage":null}\n\n'


class ChatWriter(OpenAIFrames):
    """Writes one chat completion. A plain token costs two concatenations and one escaped string."""

    def __init__(
        self,
        *,
        reply_id: str,
        model: str,
        top_logprobs: int | None = None,
        include_usage: bool = False,
        continuous_usage: bool = False,
        token_ids: bool = False,
        tokens_as_ids: bool = False,
        prompt_text: bool = False,
        echo: str = "",
        parsed: ParsedAnswers | None = None,
    ) -> None:
        """top_logprobs: None for no logprobs, else how many alternatives to show beside the chosen token.
        token_ids: show the ids of prompt and answers. tokens_as_ids: in logprobs, tokens are "token_id:ID".
        prompt_text: show what the prompt was after its template. echo: shown before each answer.
        parsed: for answers that may hold calls or reasoning.
        """
        super().__init__(
            reply_id,
            model,
            "chat.completion.chunk",
            include_usage=include_usage,
            continuous_usage=continuous_usage,
        )
        self._top = top_logprobs
        self._token_ids = token_ids
        self._tokens_as_ids = tokens_as_ids
        self._prompt_text = prompt_text
        self._echo = echo
        self._parsed = parsed
        self._plain = top_logprobs is None and not continuous_usage and not token_ids
        self._completion_tokens = 0
        self._prefixes: dict[int, bytes] = {}
        self._tail = _TAIL_NO_USAGE_YET if include_usage else _TAIL

    def whole(self, answered: list[Answered]) -> bytes:
        (only,) = answered
        choices = [self._choice(index, answer, only.stats) for index, answer in enumerate(only.answers)]
        completion_tokens = sum(len(answer.token_ids) for answer in only.answers)
        reply: dict[str, Any] = {
            **self._head,
            "object": "chat.completion",
            "choices": choices,
            "usage": usage(only.stats, completion_tokens),
            **self._about_prompt(only.stats),
        }
        if only.stats.prompt_logprobs is not None:
            reply["prompt_logprobs"] = [prompt_position(position) for position in only.stats.prompt_logprobs]
        return encode(reply)

    def chunk(self, delta: Delta, stats: PromptStats) -> bytes:
        self._completion_tokens += len(delta.token_ids)
        if self._parsed is not None:
            return self._chunks(delta, self._parsed, stats)
        prefix = self._prefixes.get(delta.index)
        if prefix is None:
            return self._first(delta, stats)
        if self._plain and delta.finish_reason is None:
            return prefix + encode(delta.text) + self._tail if delta.text else b""
        if not (delta.text or delta.logprobs or delta.finish_reason or self._token_ids):
            return b""
        return self._chunk(delta, {"content": delta.text}, delta.finish_reason, stats)

    def end(self, stats: PromptStats) -> bytes:
        return self._end(stats, self._completion_tokens)

    def _choice(self, index: int, answer: Answer, stats: PromptStats) -> dict[str, Any]:
        message: dict[str, Any] = {"content": self._echo + answer.text, "refusal": None}
        finish: str | None = answer.finish_reason
        if self._parsed is not None:
            message, finish = self._parsed.message(answer, stats)
            message["content"] = self._echo + (message["content"] or "") if self._echo else message["content"]
        return {
            "index": index,
            "message": {"role": "assistant", **message},
            "logprobs": self._logprobs(answer.logprobs),
            "finish_reason": finish,
            "stop_reason": answer.stop_reason,
            **({"token_ids": answer.token_ids} if self._token_ids else {}),
        }

    def _about_prompt(self, stats: PromptStats) -> dict[str, Any]:
        """What is told of the prompt once, at the beginning."""
        about: dict[str, Any] = {}
        if self._token_ids:
            about["prompt_token_ids"] = stats.prompt_token_ids
        if self._prompt_text:
            about["prompt_text"] = stats.prompt_text
        return about

    def _first(self, delta: Delta, stats: PromptStats) -> bytes:
        """The role comes with an answer's first token, so that a client's time to first token is true."""
        self._begin(delta.index)
        content = {"role": "assistant", "content": self._echo + delta.text}
        return self._chunk(delta, content, delta.finish_reason, stats, first=len(self._prefixes) == 1)

    def _begin(self, index: int) -> None:
        self._prefixes[index] = self._start + b'[{"index":%d,"delta":{"content":' % index

    def _chunks(self, delta: Delta, parsed: ParsedAnswers, stats: PromptStats) -> bytes:
        """A chunk for each kind of thing in the delta; the last shows its tokens. None while it is undecided."""
        deltas, finish = parsed.deltas(delta, stats)
        plain = self._plain and finish is None
        if not deltas and (plain or not (finish or delta.logprobs or self._token_ids)):
            return b""
        prefix = self._prefixes.get(delta.index)
        if prefix is None:
            self._begin(delta.index)
            deltas = first_delta(deltas, self._echo)
        elif plain and len(deltas) == 1 and "content" in deltas[0]:
            return prefix + encode(deltas[0]["content"]) + self._tail
        first = prefix is None and len(self._prefixes) == 1
        *earlier, last = deltas or [{}]
        lines = []
        for content in earlier:
            lines.append(self._chunk(Delta(delta.index, [], ""), content, None, stats, first=first))
            first = False
        lines.append(self._chunk(delta, last, finish, stats, first=first))
        return b"".join(lines)

    def _chunk(
        self,
        delta: Delta,
        content: Mapping[str, Any],
        finish: str | None,
        stats: PromptStats,
        *,
        first: bool = False,
    ) -> bytes:
        choice: dict[str, Any] = {
            "index": delta.index,
            "delta": content,
            "logprobs": self._logprobs(delta.logprobs),
            "finish_reason": finish,
        }
        if finish is not None:
            choice["stop_reason"] = delta.stop_reason
        if self._token_ids:
            choice["token_ids"] = delta.token_ids
        about = self._about_prompt(stats) if first else {}
        told = b"," + encode(about)[1:-1] if about else b""
        return self._event(choice, stats, self._completion_tokens, told)

    def _logprobs(self, positions: list[PositionLogprobs] | None) -> dict[str, Any] | None:
        if self._top is None:
            return None
        content = [
            {
                **_token(position.chosen, self._tokens_as_ids),
                "top_logprobs": [
                    _token(candidate, self._tokens_as_ids) for candidate in position.top[: self._top]
                ],
            }
            for position in positions or ()
        ]
        return {"content": content, "refusal": None}


def _token(token: TokenLogprob, as_id: bool) -> dict[str, Any]:
    """`bytes` is null for a piece of a character, which its text cannot show."""
    piece = "\ufffd" in token.text
    return {
        "token": token_text(token, as_id),
        "logprob": finite(token.logprob),
        "bytes": None if piece else list(token.text.encode()),
    }


def prompt_position(position: PositionLogprobs | None, top: int | None = None) -> dict[str, Any] | None:
    """vLLM's shape: the token and the `top` best others (all that there are for None), by token id."""
    if position is None:
        return None
    return {
        str(token.token_id): {
            "logprob": finite(token.logprob),
            "rank": token.rank,
            "decoded_token": token.text,
        }
        for token in (position.chosen, *position.top[:top])
    }


def token_text(token: TokenLogprob, as_id: bool) -> str:
    """as_id: for clients that must tell apart tokens that look the same."""
    return f"token_id:{token.token_id}" if as_id else token.text


def finite(logprob: float) -> float:
    return logprob if logprob > _LEAST_LOGPROB else _LEAST_LOGPROB
