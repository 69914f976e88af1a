"""What the replies of chat and of text completions have in common: head, usage, and how a stream is framed."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from handlers.backends.base import PromptStats
from handlers.errors import ServingError
from handlers.protocols.base import SSE
from handlers.protocols.openai.errors import openai_error
from handlers.version import FINGERPRINT

encode = msgspec.json.Encoder().encode


class OpenAIFrames:
    """The base of both writers."""

    stream_type = SSE
    keep_alive = b": keep-alive\n\n"

    def __init__(
        self, reply_id: str, model: str, chunk_object: str, *, include_usage: bool, continuous_usage: bool
    ) -> None:
        """chunk_object: what a chunk says that it is."""
        self._head = {
            "id": reply_id,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }
        self._include_usage = include_usage
        self._continuous_usage = continuous_usage
        head = encode({**self._head, "object": chunk_object})
        self._start = b"data: " + head[:-1] + b',"choices":'

    def failed(self, error: ServingError) -> bytes:
        return b"data: " + encode(openai_error(error)) + b"\n\n"

    def _event(
        self, choice: dict[str, Any], stats: PromptStats, completion_tokens: int, about: bytes = b""
    ) -> bytes:
        """A chunk of one choice. about: further members of the chunk."""
        line = self._start + encode([choice]) + about
        if self._continuous_usage:
            line += b',"usage":' + encode(usage(stats, completion_tokens))
        elif self._include_usage:
            line += b',"usage":null'
        return line + b"}\n\n"

    def _end(self, stats: PromptStats, completion_tokens: int) -> bytes:
        if not self._include_usage:
            return b"data: [DONE]\n\n"
        last = encode(usage(stats, completion_tokens))
        return self._start + b'[],"usage":' + last + b"}\n\ndata: [DONE]\n\n"


def usage(stats: PromptStats, completion_tokens: int) -> dict[str, Any]:
    """Pictures count among the prompt's tokens; `image_tokens` says how many of them they are."""
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": stats.prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": stats.cached_tokens, "image_tokens": stats.image_tokens},
    }
