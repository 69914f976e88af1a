"""The reply to a chat: one JSON object, or events of chunks."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

from msgspec import UNSET, UnsetType

from handlers.deltas import Delta, PositionLogprobs, PromptStats
from handlers.errors import ServingError
from handlers.protocols.base import KEEP_ALIVE, SSE, Answer, Answered
from handlers.protocols.openai.answer_form import ParsedAnswers, first_deltas
from handlers.protocols.openai.events import TEXT, Events, ReplyOptions, encode, event, finish_reason
from handlers.protocols.openai.replies import (
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChunkChoice,
    FinishReason,
    OpenAIError,
    Usage,
    prompt_position,
)


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
        self._events = Events(options, self._reply)
        self._plain = self.top_logprobs is None and not options.continuous_usage and not options.token_ids
        self._completion_tokens = 0

    def whole(self, answered: list[Answered]) -> bytes:
        (only,) = answered
        stats, prompt_logprobs = only.stats, only.stats.prompt_logprobs
        return encode(
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
            return self._chunk(delta, shown, finish_reason(delta), stats, first=first)
        if self._plain and delta.finish_reason is None:
            return around[0] + encode(delta.text) + around[1] if delta.text else b""
        if not (delta.text or delta.logprobs or delta.finish_reason or self.options.token_ids):
            return b""
        return self._chunk(delta, ChatDelta(content=delta.text), finish_reason(delta), stats)

    def end(self, stats: PromptStats) -> bytes:
        return self._events.end(stats, self._completion_tokens)

    def failed(self, error: ServingError) -> bytes:
        return event(OpenAIError.of(error))

    def _choice(self, index: int, answer: Answer, stats: PromptStats) -> ChatChoice:
        if self.parsed is None:
            message, finish = ChatMessage("assistant", self.echo + answer.text), finish_reason(answer)
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
        self._events.begin(index, ChunkChoice(index, ChatDelta(content=TEXT), None, None))
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
            return around[0] + encode(deltas[0].content) + around[1]
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
        return event(reply)

    def _reply(self, choices: list[Any], usage: Usage | UnsetType | None) -> ChatCompletionChunk:
        return ChatCompletionChunk(*self._head, "chat.completion.chunk", choices, usage=usage)

    def _logprobs(self, positions: list[PositionLogprobs] | None) -> ChatLogprobs | None:
        if self.top_logprobs is None:
            return None
        return ChatLogprobs.of(positions, self.top_logprobs, as_ids=self.options.tokens_as_ids)
