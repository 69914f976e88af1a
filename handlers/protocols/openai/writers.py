"""OpenAI's replies written: one JSON object, or server-sent events of chunks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from operator import attrgetter
from typing import Any, cast

import msgspec
from msgspec import UNSET, Struct, UnsetType

from handlers.deltas import Delta, PositionLogprobs, PromptStats, TokenLogprob, total
from handlers.errors import ServingError
from handlers.protocols.base import KEEP_ALIVE, SSE, Answer, Answered
from handlers.protocols.openai.answer_form import ParsedAnswers, first_deltas
from handlers.protocols.openai.replies import (
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChunkChoice,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FinishReason,
    OpenAIError,
    Usage,
    prompt_position,
    token_text,
)
from handlers.version import VERSION

_encode = msgspec.json.Encoder().encode

_FINGERPRINT = f"lmi-{VERSION}"
"""OpenAI's `system_fingerprint`, without which TGI's client does not recognise a chat."""

_TEXT = "\0"
_ENCODED_TEXT = _encode(_TEXT)
"""Stands for a chunk's text where the rest of the chunk is encoded once for all chunks of a choice."""

_DONE = b"data: [DONE]\n\n"
_SEARCHED = 8
"""The number of characters after its expected place in which a token's text is searched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyOptions:
    """What both replies show.

    Attributes:
        reply_id: The `id` of the reply and of each chunk.
        model: What the client calls the model.
        include_usage: A last chunk shows the usage.
        continuous_usage: Every chunk does.
        token_ids: Show the ids of the tokens of prompts and choices.
        tokens_as_ids: In logprobs, tokens are "token_id:ID".
    """

    reply_id: str
    model: str
    include_usage: bool = False
    continuous_usage: bool = False
    token_ids: bool = False
    tokens_as_ids: bool = False

    def head(self) -> tuple[str, int, str, str]:
        """Return the first fields of every reply and chunk, with the time of this call."""
        return self.reply_id, int(time.time()), self.model, _FINGERPRINT


class _Events:
    """Writes the server-sent events of one stream. What all chunks have in common is encoded only once."""

    def __init__(self, options: ReplyOptions, chunk: Callable[[list[Any], Usage | UnsetType | None], Struct]) -> None:
        """chunk: returns a chunk with these choices and this usage."""
        self._options = options
        self._start = _event(chunk([], UNSET)).removesuffix(b"]}\n\n")
        """The beginning of every chunk, up to its choice."""
        self.around: dict[int, tuple[bytes, bytes]] = {}
        """Choice that has begun -> what stands before and after the text of its plain chunks."""

    def begin(self, index: int, plain: Struct) -> None:
        """Note that a choice begins. plain: a choice with `_TEXT` as its text."""
        usage = None if self._options.include_usage else UNSET
        before, _, after = self.one(plain, usage).rpartition(_ENCODED_TEXT)
        self.around[index] = before, after

    def one(self, choice: Struct, usage: Usage | UnsetType | None) -> bytes:
        """Return an event with one choice."""
        line = self._start + _encode(choice)
        return line + (b"]}\n\n" if usage is UNSET else b'],"usage":' + _encode(usage) + b"}\n\n")

    def usage(self, stats: PromptStats, completion_tokens: int) -> Usage | UnsetType | None:
        """Return the usage that a chunk before the last one shows."""
        if self._options.continuous_usage:
            return Usage.of(stats, completion_tokens)
        return None if self._options.include_usage else UNSET

    def end(self, stats: PromptStats, completion_tokens: int) -> bytes:
        """Return the last events: that of the usage, if it was asked for, and `[DONE]`."""
        if not self._options.include_usage:
            return _DONE
        return self._start + b'],"usage":' + _encode(Usage.of(stats, completion_tokens)) + b"}\n\n" + _DONE


def _event(data: Any) -> bytes:
    return b"data: " + _encode(data) + b"\n\n"


def _finish(answer: Delta | Answer) -> FinishReason | None:
    """Return the finish reason. An aborted answer is an error, and never written."""
    return cast("FinishReason | None", answer.finish_reason)


@dataclass
class ChatWriter:
    """Writes one chat completion. A plain token costs two concatenations and one escaped string.

    Attributes:
        top_logprobs: How many candidates to show beside the chosen token; None for no logprobs.
        prompt_text: Show the prompt as the chat template rendered it.
        echo: Shown before each answer.
        parsed: For answers that may hold calls or reasoning.
    """

    options: ReplyOptions
    _: KW_ONLY
    top_logprobs: int | None = None
    prompt_text: bool = False
    echo: str = ""
    parsed: ParsedAnswers | None = None

    stream_type = SSE
    keep_alive = KEEP_ALIVE

    def __post_init__(self) -> None:
        options = self.options
        self._head = options.head()
        self._events = _Events(options, self._reply)
        self._plain = self.top_logprobs is None and not options.continuous_usage and not options.token_ids
        self._completion_tokens = 0

    def whole(self, answered: list[Answered]) -> bytes:
        (only,) = answered
        stats, prompt_logprobs = only.stats, only.stats.prompt_logprobs
        return _encode(
            ChatCompletion(
                *self._head,
                "chat.completion",
                [self._choice(index, answer, stats) for index, answer in enumerate(only.answers)],
                Usage.of(stats, sum(len(answer.token_ids) for answer in only.answers)),
                *self._about_prompt(stats),
                UNSET if prompt_logprobs is None else [prompt_position(one) for one in prompt_logprobs],
            )
        )

    def chunk(self, delta: Delta, stats: PromptStats) -> bytes:
        self._completion_tokens += len(delta.token_ids)
        if self.parsed is not None:
            return self._parsed_chunks(delta, self.parsed, stats)
        around = self._events.around.get(delta.index)
        if around is None:
            # The role comes with a choice's first token, so that a client's time to first token is true.
            first = self._begin(delta.index)
            shown = ChatDelta("assistant", self.echo + delta.text)
            return self._chunk(delta, shown, _finish(delta), stats, first=first)
        if self._plain and delta.finish_reason is None:
            return around[0] + _encode(delta.text) + around[1] if delta.text else b""
        if not (delta.text or delta.logprobs or delta.finish_reason or self.options.token_ids):
            return b""
        return self._chunk(delta, ChatDelta(content=delta.text), _finish(delta), stats)

    def end(self, stats: PromptStats) -> bytes:
        return self._events.end(stats, self._completion_tokens)

    def failed(self, error: ServingError) -> bytes:
        return _event(OpenAIError.of(error))

    def _choice(self, index: int, answer: Answer, stats: PromptStats) -> ChatChoice:
        if self.parsed is None:
            message, finish = ChatMessage("assistant", self.echo + answer.text), _finish(answer)
        else:
            message, finish = self.parsed.message(answer, stats)
            if self.echo:
                message.content = self.echo + (message.content or "")
        token_ids = answer.token_ids if self.options.token_ids else UNSET
        logprobs = self._logprobs(answer.logprobs)
        return ChatChoice(index, message, logprobs, finish, answer.stop_reason, token_ids)

    def _about_prompt(self, stats: PromptStats) -> tuple[list[int] | UnsetType, str | UnsetType]:
        """Return what is shown of the prompt, once at the beginning: its tokens and its text."""
        return (
            stats.prompt_token_ids if self.options.token_ids else UNSET,
            stats.prompt_text if self.prompt_text else UNSET,
        )

    def _begin(self, index: int) -> bool:
        """Note that a choice begins; return whether it is the stream's first."""
        self._events.begin(index, ChunkChoice(index, ChatDelta(content=_TEXT), None, None))
        return len(self._events.around) == 1

    def _parsed_chunks(self, delta: Delta, parsed: ParsedAnswers, stats: PromptStats) -> bytes:
        """Return a chunk for each kind of content in the delta, the last with its tokens; empty while undecided."""
        deltas, finish = parsed.deltas(delta, stats)
        plain = self._plain and finish is None
        if not deltas and (plain or not (finish or delta.logprobs or self.options.token_ids)):
            return b""
        around, first = self._events.around.get(delta.index), False
        if around is None:
            first = self._begin(delta.index)
            deltas = first_deltas(deltas, self.echo)
        elif plain and len(deltas) == 1 and deltas[0].content is not UNSET:
            return around[0] + _encode(deltas[0].content) + around[1]
        *earlier, last = deltas or [ChatDelta()]
        lines = []
        for shown in earlier:
            lines.append(self._chunk(Delta(delta.index, [], ""), shown, None, stats, first=first))
            first = False
        lines.append(self._chunk(delta, last, finish, stats, first=first))
        return b"".join(lines)

    def _chunk(
        self, delta: Delta, shown: ChatDelta, finish: FinishReason | None, stats: PromptStats, *, first: bool = False
    ) -> bytes:
        choice = ChunkChoice(
            delta.index,
            shown,
            self._logprobs(delta.logprobs),
            finish,
            UNSET if finish is None else delta.stop_reason,
            delta.token_ids if self.options.token_ids else UNSET,
        )
        usage = self._events.usage(stats, self._completion_tokens)
        if not first:
            return self._events.one(choice, usage)
        reply = self._reply([choice], usage)
        reply.prompt_token_ids, reply.prompt_text = self._about_prompt(stats)
        return _event(reply)

    def _reply(self, choices: list[Any], usage: Usage | UnsetType | None) -> ChatCompletionChunk:
        return ChatCompletionChunk(*self._head, "chat.completion.chunk", choices, usage=usage)

    def _logprobs(self, positions: list[PositionLogprobs] | None) -> ChatLogprobs | None:
        return (
            None
            if self.top_logprobs is None
            else ChatLogprobs.of(positions, self.top_logprobs, as_ids=self.options.tokens_as_ids)
        )


@dataclass
class CompletionWriter:
    """Writes one text completion; the choices of prompt p have the indexes p * n to p * n + n - 1.

    Attributes:
        n: Answers shown for each prompt, the best of those that there are.
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
        self._events = _Events(options, self._reply)
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
        return _encode(self._reply(choices, usage))

    def chunk(self, delta: Delta, stats: PromptStats) -> bytes:
        index = delta.index
        around = self._events.around.get(index)
        if around is None:
            return self._first(delta, stats)
        if self.echo_only:
            return b""
        self._completion_tokens[index] += len(delta.token_ids)
        if self._plain and delta.finish_reason is None:
            return around[0] + _encode(delta.text) + around[1] if delta.text else b""
        if not (delta.text or delta.logprobs or delta.finish_reason or self.options.token_ids):
            return b""
        usage = self._events.usage(stats, self._completion_tokens[index])
        return self._events.one(self._choice(index, delta), usage)

    def end(self, stats: PromptStats) -> bytes:
        return self._events.end(stats, sum(self._completion_tokens.values()))

    def failed(self, error: ServingError) -> bytes:
        return _event(OpenAIError.of(error))

    def _first(self, delta: Delta, stats: PromptStats) -> bytes:
        index = delta.index
        self._events.begin(index, CompletionChoice(index, _TEXT, None, None))
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
        finish = _finish(added)
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
