"""The reply to a text completion: one JSON object, or events of the same form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from operator import attrgetter
from typing import Any

from msgspec import UNSET, UnsetType

from handlers.deltas import Delta, PositionLogprobs, PromptStats, TokenLogprob, total
from handlers.errors import ServingError
from handlers.protocols.base import KEEP_ALIVE, SSE, Answer, Answered
from handlers.protocols.openai.events import TEXT, Events, ReplyOptions, encode, event, finish_reason
from handlers.protocols.openai.replies import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    OpenAIError,
    Usage,
    prompt_position,
    token_text,
)

_SEARCHED = 8
"""The number of characters after its expected place in which a token's text is searched."""


@dataclass
class CompletionWriter:
    """Writes one text completion; the choices of prompt p have the indexes p * n to p * n + n - 1.

    Attributes:
        n: The number of answers shown for each prompt: the best, if more were generated.
        logprobs: How many candidates to show beside each token of an answer; None for no logprobs.
        prompt_logprobs: The same for tokens of the prompt.
        echo: What each prompt looks like before its answers; None among them for the text of its tokens.
        echo_only: The answers themselves are not shown.
    """

    options: ReplyOptions
    _: KW_ONLY
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: Sequence[str | None] | None = None
    echo_only: bool = False

    stream_type = SSE
    keep_alive = KEEP_ALIVE

    def __post_init__(self) -> None:
        options = self.options
        self._head = options.head()
        self._events = Events(options, self._reply)
        self._completion_tokens: dict[int, int] = {}
        self._token_lists: dict[int, _TokenLists] = {}
        varied = self.logprobs is not None or options.continuous_usage or self.echo_only or options.token_ids
        self._plain = not varied

    def whole(self, answered: list[Answered]) -> bytes:
        choices: list[CompletionChoice] = []
        completion_tokens = 0
        for number, one in enumerate(answered):
            if not self.echo_only:
                completion_tokens += sum(len(answer.token_ids) for answer in one.answers)
            for i, answer in enumerate(_best(one.answers, self.n)):
                shown = Answer(finish_reason="length") if self.echo_only else answer
                choice = self._choice(number * self.n + i, shown, one.stats)
                if self.prompt_logprobs is not None and one.stats.prompt_logprobs is not None:
                    choice.prompt_logprobs = [
                        prompt_position(position, self.prompt_logprobs) for position in one.stats.prompt_logprobs
                    ]
                choices.append(choice)
        usage = Usage.of(total([one.stats for one in answered]), completion_tokens)
        return encode(self._reply(choices, usage))

    def chunk(self, delta: Delta, stats: PromptStats) -> bytes:
        index = delta.index
        around = self._events.around.get(index)
        if around is None:
            return self._first(delta, stats)
        if self.echo_only:
            return b""
        self._completion_tokens[index] += len(delta.token_ids)
        if self._plain and delta.finish_reason is None:
            return around[0] + encode(delta.text) + around[1] if delta.text else b""
        if not (delta.text or delta.logprobs or delta.finish_reason or self.options.token_ids):
            return b""
        usage = self._events.usage(stats, self._completion_tokens[index])
        return self._events.one(self._choice(index, delta), usage)

    def end(self, stats: PromptStats) -> bytes:
        return self._events.end(stats, sum(self._completion_tokens.values()))

    def failed(self, error: ServingError) -> bytes:
        return event(OpenAIError.of(error))

    def _first(self, delta: Delta, stats: PromptStats) -> bytes:
        index = delta.index
        self._events.begin(index, CompletionChoice(index, TEXT, None, None))
        if self.echo_only:
            delta = Delta(index, [], "", finish_reason="length")
        self._completion_tokens[index] = len(delta.token_ids)
        usage = self._events.usage(stats, self._completion_tokens[index])
        return self._events.one(self._choice(index, delta, stats), usage)

    def _reply(self, choices: list[Any], usage: Usage | UnsetType | None) -> Completion:
        return Completion(*self._head, "text_completion", choices, usage)

    def _choice(self, index: int, added: Delta | Answer, stats: PromptStats | None = None) -> CompletionChoice:
        """Return a choice. stats: given when the choice begins, which is when its prompt is shown."""
        text, positions = added.text, added.logprobs or []
        shown: list[PositionLogprobs | TokenLogprob] = [*positions]
        if stats is not None and self.echo is not None:
            echo = self.echo[index // self.n]
            text = (stats.prompt_text if echo is None else echo) + text
            shown = [*_prompt_positions(stats), *positions]
        logprobs = None
        if self.logprobs is not None:
            if index not in self._token_lists:
                self._token_lists[index] = _TokenLists(self.logprobs, as_ids=self.options.tokens_as_ids)
            logprobs = self._token_lists[index].add(text, shown)
        finish = finish_reason(added)
        choice = CompletionChoice(index, text, logprobs, finish, UNSET if finish is None else added.stop_reason)
        if self.options.token_ids:
            choice.token_ids = added.token_ids
            if stats is not None:
                choice.prompt_token_ids = stats.prompt_token_ids
        return choice


def _prompt_positions(stats: PromptStats) -> list[PositionLogprobs | TokenLogprob]:
    """Return the prompt's positions; empty if they were not asked for."""
    if stats.prompt_logprobs is None:
        return []
    first = TokenLogprob(stats.prompt_token_ids[0], stats.first_token_text, 0.0, 1)
    return [first if position is None else position for position in stats.prompt_logprobs]


def _best(answers: list[Answer], n: int) -> list[Answer]:
    """Return the n answers whose tokens have the highest mean log probability, best first; all n in their own order."""
    if len(answers) == n:
        return answers
    return sorted(answers, key=attrgetter("mean_logprob"), reverse=True)[:n]


class _TokenLists:
    """Makes the `logprobs` of one text completion, all at once or as its text comes in.

    `text_offset` counts characters of the choice's text. A token that holds a piece of a character starts where
    the character does; one that is not shown, where the next one starts.
    """

    def __init__(self, top: int, *, as_ids: bool = False) -> None:
        """Start the lists. top: the alternatives beside each token. as_ids: write tokens as "token_id:ID"."""
        self._top = top
        self._as_ids = as_ids
        self._before = 0
        self._pending = ""
        self._at = 0

    def add(self, text: str, positions: Sequence[PositionLogprobs | TokenLogprob]) -> CompletionLogprobs:
        """Return what new positions add to the lists, and `text` to the text. A token alone has no probability."""
        seen = min(self._at, len(self._pending))
        self._pending = self._pending[seen:] + text
        self._before += seen
        self._at -= seen
        lists = CompletionLogprobs([], [], [], [])
        for position in positions:
            if isinstance(position, TokenLogprob):
                token, logprob, top = position, None, None
            else:
                token = position.chosen
                logprob, top = token.logprob, self._alternatives(position)
            lists.tokens.append(token_text(token, self._as_ids))
            lists.token_logprobs.append(logprob)
            lists.top_logprobs.append(top)
            lists.text_offset.append(self._offset(token.text))
        return lists

    def _alternatives(self, position: PositionLogprobs) -> dict[str, float]:
        """Return the chosen token and the most likely others; of several that look the same, the most likely."""
        shown: dict[str, float] = {}
        for token in (position.chosen, *position.top[: self._top]):
            shown.setdefault(token_text(token, self._as_ids), token.logprob)
        return shown

    def _offset(self, text: str) -> int:
        at = self._at
        if "\ufffd" in text:
            return self._before + min(at, len(self._pending))
        if at >= len(self._pending):  # its text is held back, or will never come
            self._at = at + len(text)
            return self._before + at
        found = self._pending.find(text, at, at + len(text) + _SEARCHED)
        if found >= 0:
            self._at = found + len(text)
        return self._before + (found if found >= 0 else at)
