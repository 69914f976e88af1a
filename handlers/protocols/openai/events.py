"""What the replies to chat and text completions have in common: their head, usage, and the events of a stream."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import msgspec
from msgspec import UNSET, Struct, UnsetType

from handlers.deltas import Delta, PromptStats
from handlers.protocols.base import Answer
from handlers.protocols.openai.replies import FinishReason, Usage
from handlers.version import VERSION

encode = msgspec.json.Encoder().encode

_FINGERPRINT = f"lmi-{VERSION}"
"""OpenAI's `system_fingerprint`, without which TGI's client does not recognise a chat."""

TEXT = "\0"
"""Stands for a chunk's text where the rest of the chunk is encoded once for all chunks of a choice."""

_ENCODED_TEXT = encode(TEXT)

_DONE = b"data: [DONE]\n\n"


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


class Events:
    """Writes the server-sent events of one stream. What all chunks have in common is encoded only once."""

    def __init__(self, options: ReplyOptions, chunk: Callable[[list[Any], Usage | UnsetType | None], Struct]) -> None:
        """chunk: returns a chunk with these choices and this usage."""
        self._options = options
        self._start = event(chunk([], UNSET)).removesuffix(b"]}\n\n")
        """The beginning of every chunk, up to its choice."""
        self.around: dict[int, tuple[bytes, bytes]] = {}
        """Choice that has begun -> what stands before and after the text of its plain chunks."""

    def begin(self, index: int, plain: Struct) -> None:
        """Note that a choice begins. plain: a choice with `TEXT` as its text."""
        usage = None if self._options.include_usage else UNSET
        before, _, after = self.one(plain, usage).rpartition(_ENCODED_TEXT)
        self.around[index] = before, after

    def one(self, choice: Struct, usage: Usage | UnsetType | None) -> bytes:
        """Return an event with one choice."""
        line = self._start + encode(choice)
        return line + (b"]}\n\n" if usage is UNSET else b'],"usage":' + encode(usage) + b"}\n\n")

    def usage(self, stats: PromptStats, completion_tokens: int) -> Usage | UnsetType | None:
        """Return the usage that a chunk before the last one shows."""
        if self._options.continuous_usage:
            return Usage.of(stats, completion_tokens)
        return None if self._options.include_usage else UNSET

    def end(self, stats: PromptStats, completion_tokens: int) -> bytes:
        """Return the last events: that of the usage, if it was asked for, and `[DONE]`."""
        if not self._options.include_usage:
            return _DONE
        return self._start + b'],"usage":' + encode(Usage.of(stats, completion_tokens)) + b"}\n\n" + _DONE


def event(data: Any) -> bytes:
    """Return one server-sent event."""
    return b"data: " + encode(data) + b"\n\n"


def finish_reason(answer: Delta | Answer) -> FinishReason | None:
    """Return the finish reason. An aborted answer is an error, and never written."""
    return cast("FinishReason | None", answer.finish_reason)
