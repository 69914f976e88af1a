"""Requests of a hostile client, and what they may be answered with."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx

from tests.attack.target import KEY, STALL_SECONDS, Bound, Measured, Target, data_url
from tests.support.pace import too_long

TRIES = 3

REFUSALS = {400, 408, 413, 415, 422, 429, 503}
"""What an attack may be answered with, beside 200. 503 with a Retry-After is our own shortage."""


def bounded(
    target: Target,
    attack: Callable[[Measured], Any],
    *,
    allowed: int | None = None,
    cpu: float | None = None,
    ask: bool = True,
) -> None:
    """Attack, see that the bounds hold, and that all is well afterwards.

    cpu: seconds allowed to all processes. ask: a question, afterwards.
    """
    for left in reversed(range(TRIES)):
        with target.attack() as measured:
            attack(measured)
        if ask:
            target.settle()
        measured.within(allowed=allowed, stalls=False)
        assert measured.stalls is not None
        if not too_long(measured.stalls.longest, STALL_SECONDS) and (cpu is None or not too_long(measured.cpu, cpu)):
            return
        if not left:
            measured.within(allowed=allowed)
            raise Bound(f"{measured.cpu:.1f} s of processor time; allowed: {cpu}")


def refused_or_answered(replies: Sequence[httpx.Response | httpx.HTTPError], names: Sequence[str] = ()) -> None:
    for name, answer in itertools.zip_longest(names, replies):
        assert isinstance(answer, httpx.Response), (name, repr(answer))
        assert answer.status_code in {200, *REFUSALS}, (name, answer.status_code, answer.text[:300])
        assert answer.status_code != 503 or "retry-after" in answer.headers, (name, answer.text[:300])
        assert "Traceback" not in answer.text, name
        assert 'File "' not in answer.text, name
        assert KEY not in answer.text, name


def asks(*images: bytes | str, tokens: int = 2) -> bytes:
    """The body of a chat request. images: their files, or their URLs."""
    urls = [image if isinstance(image, str) else data_url(image) for image in images]
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*parts, {"type": "text", "text": "What is this?"}]
    return json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": tokens}).encode()


def head_of(length: int) -> bytes:
    """Of a chat request with a body of so many bytes."""
    lines = (
        "POST /v1/chat/completions HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}",
        "Content-Type: application/json", f"Content-Length: {length}", "", "",
    )  # fmt: skip
    return "\r\n".join(lines).encode()


async def post(
    target: Target, bodies: Sequence[bytes], path: str = "/v1/chat/completions", *, at_once: int = 8,
    headers: Mapping[str, str] = {}, patience: float = 120.0,
) -> list[httpx.Response | httpx.HTTPError]:  # fmt: skip
    """Replies, in the order of the bodies; an error in place of one that did not come."""
    turns = asyncio.Semaphore(at_once)
    usual = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once)
    async with httpx.AsyncClient(base_url=target.url, timeout=patience, limits=limits) as client:

        async def one(body: bytes) -> httpx.Response | httpx.HTTPError:
            async with turns:
                try:
                    return await client.post(path, content=body, headers={**usual, **headers})
                except httpx.HTTPError as error:
                    return error

        return await asyncio.gather(*map(one, bodies))
