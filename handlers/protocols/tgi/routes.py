"""What TGI's routes add to a reply: headers by which its users bill and measure, and `/info`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from handlers.exchange import Incoming, Reply, RequestFacts
from handlers.protocols.base import (
    JSON,
    MAX_ANSWERS,
    MAX_PROMPTS,
    READ,
    SSE_TYPE,
    Api,
    Reader,
    Route,
    ServerContext,
    Task,
)
from handlers.protocols.openai.replies import ChatCompletion, ChatCompletionChunk, Completion
from handlers.protocols.openai.requests import ChatBody, CompletionBody
from handlers.protocols.tgi.replies import TGI_ERRORS, TgiEvent, TgiReply
from handlers.protocols.tgi.requests import GENERATE_ROUTES, TgiBody, read_tgi
from handlers.request import MAX_STOP_STRINGS, GenerationRequest, TextPart, prompt_parts
from handlers.version import VERSION

if TYPE_CHECKING:
    from handlers.service import Service

_ERROR_ROUTES = frozenset({*GENERATE_ROUTES, "/chat_tokenize", "/info"})
_HEADER_ROUTES = frozenset({*GENERATE_ROUTES, "/v1/chat/completions", "/v1/completions"})
"""The routes that TGI has for answers."""

_BROWSER_CLIENT = "@huggingface/"
"""Hugging Face's JavaScript client shows an error only where it is a string, on every route, and calls again at once
and for ever where the status is 503: it gets TGI's errors."""

_AROUND_AN_IMAGE = len("![]()")


class Info(Struct):
    """`/info`: what is served and within which limits, with the keys of TGI's current and earlier versions.

    `router` names the protocol, so that clients recognise it. Some values are 0, because a waiting prompt joins the
    next step.
    """

    model_id: str
    model_sha: None
    model_pipeline_tag: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: None
    docker_label: None
    model_dtype: str | None
    model_device_type: str | None
    max_input_length: int
    waiting_served_ratio: float
    max_batch_total_tokens: int | None
    max_waiting_tokens: int
    max_batch_size: int


async def _info(service: Service, incoming: Incoming) -> Reply:
    capabilities = service.backend.capabilities
    longest = capabilities.max_model_len
    body = Info(
        model_id=service.model_name,
        model_sha=None,
        model_pipeline_tag="image-text-to-text" if capabilities.images else "text-generation",
        max_concurrent_requests=service.admission.capacity,
        max_best_of=MAX_ANSWERS,
        max_stop_sequences=MAX_STOP_STRINGS,
        max_input_tokens=longest - 1,
        max_total_tokens=longest,
        validation_workers=capabilities.prompt_threads,
        max_client_batch_size=MAX_PROMPTS,
        router="text-generation-router",
        version=VERSION,
        sha=None,
        docker_label=None,
        model_dtype=capabilities.dtype or None,
        model_device_type=capabilities.device_type or None,
        max_input_length=longest - 1,
        waiting_served_ratio=0.0,
        max_batch_total_tokens=capabilities.cache_tokens or None,
        max_waiting_tokens=0,
        max_batch_size=service.limits.max_rolling_batch_size,
    )
    return Reply(200, JSON, msgspec.json.encode(body))


def compute_headers(
    requests: Sequence[GenerationRequest], compute_type: str, facts: RequestFacts
) -> dict[str, str]:
    """Return the headers. Times are whole milliseconds, except `x-compute-time`, which is in seconds.

    Validation ends when the engine has the prompt, and inference begins with its first step. A stream's headers are
    sent with its first token, when its times are not known yet.
    """
    own = {
        "x-compute-type": compute_type or "unknown",
        "x-compute-characters": str(sum(map(_characters, requests))),
    }
    if facts.stream:
        return {**own, "x-accel-buffering": "no"}
    total = facts.total or 0.0
    inference = max(0.0, total - facts.prepared - facts.queued)
    return {
        **own,
        "x-compute-time": f"{total:.6f}",
        "x-total-time": _milliseconds(total),
        "x-validation-time": _milliseconds(facts.prepared),
        "x-queue-time": _milliseconds(facts.queued),
        "x-inference-time": _milliseconds(inference),
        "x-time-per-token": _milliseconds(inference / max(1, facts.completion_tokens)),
        "x-prompt-tokens": str(facts.prompt_tokens),
        "x-generated-tokens": str(facts.completion_tokens),
    }


def _milliseconds(seconds: float) -> str:
    return str(int(seconds * 1000))


def _characters(request: GenerationRequest) -> int:
    """Return the number of characters of the prompt as it was sent, images included."""
    return sum(
        len(part.text) if isinstance(part, TextPart) else part.characters + _AROUND_AN_IMAGE
        for part in prompt_parts(request.prompt)
    )


def _claims(route: str, headers: Mapping[str, str], keys: Collection[str]) -> bool:
    return (
        route in _ERROR_ROUTES
        or headers.get("user-agent", "").startswith(_BROWSER_CLIENT)
        or (route == "/tokenize" and "inputs" in keys)
    )


def _reads(keys: Collection[str], route: str) -> Reader | None:
    if route not in GENERATE_ROUTES or "messages" in keys:
        return None
    return _read if "inputs" in keys or "prompt" not in keys else None


def _read(body: dict[str, Any], server: ServerContext, incoming: Incoming, adapter: str | None) -> Task:
    return read_tgi(body, server, request_id=incoming.request_id, route=incoming.route, adapter=adapter)


_ANSWER = Route(
    "/generate",
    "answer",
    "Generate text (TGI)",
    queued=True,
    bodies=(TgiBody, ChatBody, CompletionBody),
    replies=(TgiReply, list[TgiReply], ChatCompletion, Completion),
    events={SSE_TYPE: (TgiEvent, ChatCompletionChunk, Completion)},
)

ROUTES = (
    _ANSWER,
    replace(_ANSWER, path="/generate_stream", template="/generate_stream"),
    replace(_ANSWER, path="/", template="/"),
    # Hugging Face's Python client also asks for text at the address that it was given for chat.
    replace(_ANSWER, path="/v1", template="/"),
    Route("/info", "info", "What is served, and its limits (TGI)", methods=READ, light=True, replies=(Info,)),
)

TGI = Api(
    TGI_ERRORS,
    _claims,
    _reads,
    ROUTES,
    headers=dict.fromkeys(_HEADER_ROUTES, compute_headers),
    calls={"info": _info},
)
