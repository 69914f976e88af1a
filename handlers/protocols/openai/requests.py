"""OpenAI's API: its routes, and which bodies it reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from handlers.protocols.base import READ, SSE_TYPE, Api, Reader, Route
from handlers.protocols.openai.bodies import ChatBody, CompletionBody
from handlers.protocols.openai.chat import read_chat
from handlers.protocols.openai.completions import read_completion
from handlers.protocols.openai.replies import (
    OPENAI_ERRORS,
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    Model,
    Models,
    OpenAIError,
)

_ERRORS = (OpenAIError,)

ROUTES = (
    Route("/v1/models", "models", "The served models", methods=READ, light=True, replies=(Models,), errors=_ERRORS),
    Route(
        "/v1/models/{name}",
        "models",
        "One served model",
        methods=READ,
        light=True,
        template="/v1/models",
        replies=(Model,),
        errors=_ERRORS,
    ),
    Route(
        "/v1/chat/completions",
        "answer",
        "Chat completion (OpenAI)",
        queued=True,
        timed=True,
        appended=True,
        bodies=(ChatBody,),
        replies=(ChatCompletion,),
        events={SSE_TYPE: (ChatCompletionChunk,)},
        errors=_ERRORS,
    ),
    Route(
        "/v1/completions",
        "answer",
        "Text completion (OpenAI); images stand in the prompt as `![](url)`",
        queued=True,
        timed=True,
        appended=True,
        bodies=(CompletionBody,),
        replies=(Completion,),
        events={SSE_TYPE: (Completion,)},
        errors=_ERRORS,
    ),
)

_OTHER_ROUTES = frozenset({"/tokenize", "/detokenize", "/version"})
"""Routes of vLLM's, which answers errors as OpenAI does."""


def _claims(route: str, headers: Mapping[str, str], keys: Collection[str]) -> bool:
    if "messages" in keys or "inputs" in keys:
        return "messages" in keys
    return "prompt" in keys or route.startswith("/v1/") or route in _OTHER_ROUTES


def _reads(keys: Collection[str], route: str) -> Reader | None:
    if route == "/v1/completions":
        return read_completion
    if "messages" in keys:
        return read_chat
    return read_completion if "prompt" in keys and "inputs" not in keys else None


OPENAI = Api(OPENAI_ERRORS, _claims, ROUTES, _reads)
