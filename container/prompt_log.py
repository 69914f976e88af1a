"""What `log_prompts` writes: bodies without their pictures."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import AsyncIterator
from typing import Any

from handlers.exchange import Reply

logger = logging.getLogger("container.prompts")

_LINK = re.compile(r"(?:data|https?|s3):[^\s)\"'<>]+", re.IGNORECASE)
_LONGEST = 32_768


def log_prompt(request_id: str, body: bytes) -> None:
    """A request's body; links, which may be pictures, are blotted out. What is not JSON is not shown."""
    try:
        shown = json.dumps(_blotted(json.loads(body)), ensure_ascii=False)
    except (ValueError, RecursionError):
        shown = f"[{len(body)} bytes that are no JSON]"
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


def _blotted(value: Any) -> Any:
    if isinstance(value, str):
        return _LINK.sub("[link]", value)
    if isinstance(value, list):
        return [_blotted(item) for item in value]
    if isinstance(value, dict):
        return {name: _blotted(item) for name, item in value.items()}
    return value
