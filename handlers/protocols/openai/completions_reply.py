"""Text completions written: one JSON object, or server-sent events of chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from handlers.backends.base import Delta, PositionLogprobs, PromptStats, TokenLogprob, total
from handlers.protocols.base import Answer, Answered
from handlers.protocols.openai.frames import OpenAIFrames, encode, usage
from handlers.protocols.openai.legacy_logprobs import LegacyLogprobs
from handlers.protocols.openai.reply import prompt_position

_TAIL = b',"logprobs":null,"finish_reason":null}]}\n\n'
_TAIL_NO_USAGE_YET = b',"logprobs":null,"finish_reason":null}],"usage":null}\n\n'


class CompletionWriter(OpenAIFrames):
    """Writes one text completion; the choices of prompt p have the indexes p * n to p * n + n - 1."""

    def __init__(
        self,
        *,
        reply_id: str,
        model: str,
        n: int = 1,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        echo: Sequence[str | None] | None = None,
        echo_only: bool = False,
        include_usage: bool = False,
        continuous_usage: bool = False,
        token_ids: bool = False,
        tokens_as_ids: bool = False,
    ) -> None:
        """n: answers shown for each prompt, the best of those that there are.
        logprobs, prompt_logprobs: None for none, else how many alternatives to show beside each token.
        echo: what each prompt looks like before its answers; None among them for the text of its tokens.
        echo_only: the answers themselves are not shown.
        token_ids: show the ids of prompts and answers. tokens_as_ids: in logprobs, tokens are "token_id:ID".
        """
        super().__init__(
            reply_id, model, "text_completion", include_usage=include_usage, continuous_usage=continuous_usage
        )
        self._n = n
        self._top = logprobs
        self._prompt_top = prompt_logprobs
        self._echo = echo
        self._echo_only = echo_only
        self._token_ids = token_ids
        self._tokens_as_ids = tokens_as_ids
        self._completion_tokens: dict[int, int] = {}
        self._logprobs: dict[int, LegacyLogprobs] = {}
        self._prefixes: dict[int, bytes] = {}
        self._tail = _TAIL_NO_USAGE_YET if include_usage else _TAIL
        self._plain = not (logprobs is not None or continuous_usage or echo_only or token_ids)

    def whole(self, answered: list[Answered]) -> bytes:
        choices: list[dict[str, Any]] = []
        completion_tokens = 0
        for number, one in enumerate(answered):
            if not self._echo_only:
                completion_tokens += sum(len(answer.token_ids) for answer in one.answers)
            for i, answer in enumerate(_best(one.answers, self._n)):
                shown = Answer(finish_reason="length") if self._echo_only else answer
                choice = self._choice(number * self._n + i, shown, one.stats)
                if self._prompt_top is not None and one.stats.prompt_logprobs is not None:
                    choice["prompt_logprobs"] = [
                        prompt_position(position, self._prompt_top) for position in one.stats.prompt_logprobs
                    ]
                choices.append(choice)
        return encode(
            {
                **self._head,
                "object": "text_completion",
                "choices": choices,
                "usage": usage(total([one.stats for one in answered]), completion_tokens),
            }
        )

    def chunk(self, delta: Delta, stats: PromptStats) -> bytes:
        index = delta.index
        prefix = self._prefixes.get(index)
        if prefix is None:
            return self._first(delta, stats)
        if self._echo_only:
            return b""
        self._completion_tokens[index] += len(delta.token_ids)
        if self._plain and delta.finish_reason is None:
            return prefix + encode(delta.text) + self._tail if delta.text else b""
        if not (delta.text or delta.logprobs or delta.finish_reason or self._token_ids):
            return b""
        return self._event(self._choice(index, delta), stats, self._completion_tokens[index])

    def end(self, stats: PromptStats) -> bytes:
        return self._end(stats, sum(self._completion_tokens.values()))

    def _first(self, delta: Delta, stats: PromptStats) -> bytes:
        index = delta.index
        self._prefixes[index] = self._start + b'[{"index":%d,"text":' % index
        if self._echo_only:
            delta = Delta(index, [], "", finish_reason="length")
        self._completion_tokens[index] = len(delta.token_ids)
        return self._event(self._choice(index, delta, stats), stats, self._completion_tokens[index])

    def _choice(self, index: int, added: Delta | Answer, stats: PromptStats | None = None) -> dict[str, Any]:
        """stats: given where the choice begins, which is where its prompt is shown."""
        text, positions = added.text, added.logprobs or []
        shown: list[PositionLogprobs | TokenLogprob] = [*positions]
        if stats is not None and self._echo is not None:
            echo = self._echo[index // self._n]
            text = (stats.prompt_text if echo is None else echo) + text
            shown = [*_prompt_positions(stats), *positions]
        logprobs = None
        if self._top is not None:
            if index not in self._logprobs:
                self._logprobs[index] = LegacyLogprobs(self._top, as_ids=self._tokens_as_ids)
            logprobs = self._logprobs[index].add(text, shown)
        choice = {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": added.finish_reason,
        }
        if added.finish_reason is not None:
            choice["stop_reason"] = added.stop_reason
        if self._token_ids:
            choice["token_ids"] = added.token_ids
            if stats is not None:
                choice["prompt_token_ids"] = stats.prompt_token_ids
        return choice


def _prompt_positions(stats: PromptStats) -> list[PositionLogprobs | TokenLogprob]:
    """Empty where nobody asked for them."""
    if stats.prompt_logprobs is None:
        return []
    first = TokenLogprob(stats.prompt_token_ids[0], stats.first_token_text, 0.0, 1)
    return [first if position is None else position for position in stats.prompt_logprobs]


def _best(answers: list[Answer], n: int) -> list[Answer]:
    """The n answers of the highest mean log-probability of a token, the best first; in order if they are n."""
    if len(answers) == n:
        return answers
    return sorted(answers, key=_mean_logprob, reverse=True)[:n]


def _mean_logprob(answer: Answer) -> float:
    return sum(position.chosen.logprob for position in answer.logprobs) / max(1, len(answer.logprobs))
