"""The routes of OpenAI's API."""

from __future__ import annotations

from handlers.protocols.openai.replies import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    Model,
    Models,
    OpenAIError,
)
from handlers.protocols.openai.requests import ChatBody, CompletionBody
from handlers.protocols.routes import READ, SSE_TYPE, Route

_ERRORS = (OpenAIError,)

ROUTES = (
    Route("/v1/models", "models", "The served models", methods=READ, replies=(Models,), errors=_ERRORS),
    Route(
        "/v1/models/{name}",
        "models",
        "One served model",
        methods=READ,
        template="/v1/models",
        replies=(Model,),
        errors=_ERRORS,
    ),
    Route(
        "/v1/chat/completions",
        "answer",
        "Chat completion (OpenAI)",
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
        appended=True,
        bodies=(CompletionBody,),
        replies=(Completion,),
        events={SSE_TYPE: (Completion,)},
        errors=_ERRORS,
    ),
)
