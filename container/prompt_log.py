"""What `log_prompts` writes: bodies without their pictures."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from handlers.errors import ServingError
from handlers.exchange import Reply
from handlers.protocols.body_limits import check_body

logger = logging.getLogger("container.prompts")

_LINK = re.compile(r"(?:data|https?|s3):[^\s)\"'<>]+", re.IGNORECASE)
_LINK_END = re.compile(r"[\s)\"'<>]")
_SCHEME = 8
"""Characters: more than any start of a link has."""

_WINDOW = 2**16
"""Characters that are searched in one step."""
_LONGEST = 32_768


LONG_BYTES = 2**16
"""A longer body is read for the log in a thread."""


def log_prompt(request_id: str, body: bytes) -> None:
    """A request's body; links, which may be pictures, are blotted out. What is not JSON is not shown.

    Takes no longer than to read the body as JSON, and the memory of that: what is beyond the first characters, which
    alone are shown, is not looked at.
    """
    try:
        if len(body) > LONG_BYTES:
            check_body(body, 0)
        shown = json.dumps(_Blotter().blotted(msgspec.json.decode(body)), ensure_ascii=False)
    except (ValueError, RecursionError, msgspec.MsgspecError, ServingError):
        shown = f"[{len(body)} bytes that are no JSON, or hold too much of something]"
    logger.info("prompt", extra={"facts": {"request_id": request_id, "body": shown[:_LONGEST]}})


def log_answer(request_id: str, reply: Reply) -> None:
    """A reply's body; that of a stream when it ends."""
    if reply.chunks is None:
        _log_answer(request_id, reply.body)
    else:
        reply.chunks = _recorded(request_id, reply.chunks)


async def _recorded(request_id: str, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    said = bytearray()
    try:
        async for chunk in chunks:
            said += chunk[: max(0, _LONGEST - len(said))]
            yield chunk
    finally:
        _log_answer(request_id, bytes(said))
        aclose = getattr(chunks, "aclose", None)
        if aclose is not None:
            await aclose()


def _log_answer(request_id: str, body: bytes) -> None:
    text = body[:_LONGEST].decode(errors="replace")
    logger.info("answer", extra={"facts": {"request_id": request_id, "body": text}})


class _Blotter:
    """Copies a JSON value without links, until there are as many characters as are shown."""

    def __init__(self) -> None:
        self._left = _LONGEST

    def blotted(self, value: Any) -> Any:
        self._left -= 1
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, list):
            return [self.blotted(item) for item in value if self._left > 0]
        if isinstance(value, dict):
            return {
                self._text(name[:_LONGEST]): self.blotted(item)
                for name, item in value.items()
                if self._left > 0
            }
        return value

    def _text(self, text: str) -> str:
        pieces: list[str] = []
        position = 0
        while position < len(text) and self._left > 0:
            window = text[position : position + _WINDOW]
            link = _LINK.search(window)
            if link is None:
                # The beginning of a link may be cut off at the window's end.
                whole = window if position + _WINDOW >= len(text) else window[:-_SCHEME]
                position += len(whole)
                self._add(pieces, whole)
            else:
                self._add(pieces, window[: link.start()] + "[link]")
                position = _end_of_link(text, position + link.start())
        return "".join(pieces)

    def _add(self, pieces: list[str], piece: str) -> None:
        pieces.append(piece[: self._left])
        self._left -= len(piece)


def _end_of_link(text: str, start: int) -> int:
    for at in range(start, len(text), _WINDOW):
        if (end := _LINK_END.search(text, at, at + _WINDOW)) is not None:
            return end.start()
    return len(text)
