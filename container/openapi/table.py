"""What each route takes and gives, for the OpenAPI document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from container.openapi import openai_shapes, server_shapes
from handlers.protocols import tokens
from handlers.protocols.base import JSON_LINES
from handlers.protocols.lmi import adapters
from handlers.protocols.lmi.replies import LmiBrokenLine, LmiError, LmiLine, LmiReply
from handlers.protocols.lmi.requests import LmiBody
from handlers.protocols.lmi.sessions import SessionBody, SessionReply
from handlers.protocols.openai.chat import ChatBody
from handlers.protocols.openai.completions import CompletionBody
from handlers.protocols.tgi.replies import TgiError, TgiEvent, TgiReply
from handlers.protocols.tgi.requests import TgiBody
from handlers.protocols.tgi.routes import Info

SSE = "text/event-stream"


@dataclass(frozen=True, slots=True)
class Text:
    """What one route takes and gives. Several types of body or reply are alternatives.

    events: what each event or line of a stream is, by content type. plain_text: the body may be a prompt alone.
    not_ready: the reply with 503. query: parameter -> what it says. codes: of errors, where they are not those of every
    route with such a body.
    """

    summary: str
    bodies: Sequence[type] = ()
    replies: Sequence[Any] = ()
    events: dict[str, Sequence[type]] = field(default_factory=dict)
    errors: Sequence[type] = (openai_shapes.OpenAIError, LmiError, TgiError)
    not_ready: Sequence[type] = ()
    plain_text: bool = False
    query: dict[str, str] = field(default_factory=dict)
    codes: Sequence[int] = ()


_OPENAI_ERRORS = (openai_shapes.OpenAIError, TgiError)
_CHAT = Text(
    "Chat completion (OpenAI)",
    (ChatBody,),
    (openai_shapes.ChatCompletion,),
    {SSE: (openai_shapes.ChatCompletionChunk,)},
    _OPENAI_ERRORS,
)
_ANY = Text(
    "Answer a body of any dialect, told by its keys: messages, prompt, inputs or requestType",
    (ChatBody, CompletionBody, LmiBody, SessionBody),
    (
        openai_shapes.ChatCompletion,
        openai_shapes.Completion,
        LmiReply,
        list[LmiReply],
        SessionReply,
    ),
    {
        SSE: (openai_shapes.ChatCompletionChunk, openai_shapes.Completion, LmiLine, LmiBrokenLine),
        JSON_LINES: (openai_shapes.ChatCompletionChunk, openai_shapes.Completion, LmiLine, LmiBrokenLine),
    },
    plain_text=True,
)
_TGI = Text(
    "Generate text (TGI)",
    (TgiBody, ChatBody, CompletionBody),
    (TgiReply, list[TgiReply], openai_shapes.ChatCompletion, openai_shapes.Completion),
    {SSE: (TgiEvent, openai_shapes.ChatCompletionChunk, openai_shapes.Completion)},
    (TgiError,),
)

_PLACE = {
    "src": "The adapter's directory; wins over the body.",
    "pin": "Kept and shown: `true` or `false`.",
    "preload": "Adapters are loaded before the answer in any case.",
}
_LMI_ERRORS = (LmiError, TgiError)

TEXTS: dict[str, Text] = {
    "GET /adapters": Text(
        "The adapters that requests may name (LMI)",
        replies=(adapters.AdapterList,),
        errors=_LMI_ERRORS,
        query={"limit": "How many at most; 100 at most.", "next_page_token": "Of the page before."},
        codes=(400, 404),
    ),
    "POST /adapters": Text(
        "Load an adapter, named in the query or in the body (LMI)",
        (adapters.AdapterBody,),
        (adapters.AdapterStatus,),
        errors=_LMI_ERRORS,
        query={"name": "What requests call it; wins over the body.", **_PLACE},
        codes=(400, 404, 408, 409, 413, 507),
    ),
    "GET /adapters/{adapter}": Text(
        "One adapter (LMI)", replies=(adapters.Adapter,), errors=_LMI_ERRORS, codes=(400, 404)
    ),
    "DELETE /adapters/{adapter}": Text(
        "Unload an adapter; answered when its last request has ended (LMI)",
        replies=(adapters.AdapterStatus,),
        errors=_LMI_ERRORS,
        codes=(400, 404, 408),
    ),
    "POST /adapters/{adapter}/update": Text(
        "Load an adapter anew, from another directory if one is given (LMI)",
        (adapters.AdapterBody,),
        (adapters.AdapterStatus,),
        errors=_LMI_ERRORS,
        query=_PLACE,
        codes=(400, 404, 408, 409, 413, 507),
    ),
    "/ping": Text(
        "Whether the model can answer, as SageMaker asks it",
        replies=(server_shapes.Ping,),
        not_ready=(server_shapes.Ping,),
    ),
    "/health": Text(
        "Whether the model can answer", replies=(server_shapes.Health,), not_ready=(server_shapes.Unhealthy,)
    ),
    "/metrics": Text("Metrics for Prometheus"),
    "/version": Text("The version of this server", replies=(server_shapes.Version,)),
    "/openapi.json": Text("This document", replies=(dict[str, Any],)),
    "/v1/models": Text("The served models", replies=(openai_shapes.Models,), errors=_OPENAI_ERRORS),
    "/v1/models/{name}": Text("One served model", replies=(openai_shapes.Model,), errors=_OPENAI_ERRORS),
    "/v1/chat/completions": _CHAT,
    "/v1/completions": Text(
        "Text completion (OpenAI); pictures stand in the prompt as `![](url)`",
        (CompletionBody,),
        (openai_shapes.Completion,),
        {SSE: (openai_shapes.Completion,)},
        _OPENAI_ERRORS,
    ),
    "/invocations": _ANY,
    "/predictions/{name}": _ANY,
    "/models/{name}/invoke": _ANY,
    "/": _TGI,
    "/v1": _TGI,
    "/generate": _TGI,
    "/generate_stream": _TGI,
    "/info": Text("What is served, and its limits (TGI)", replies=(Info,), errors=(TgiError,)),
    "/tokenize": Text(
        "Tokens of a text or of a chat, as TGI (inputs) or vLLM (prompt, messages) counts them",
        (tokens.InputsToTokens, tokens.PromptToTokens, ChatBody),
        (list[tokens.SimpleToken], tokens.TokenCounts),
    ),
    "/chat_tokenize": Text("Tokens of a chat (TGI)", (ChatBody,), (tokens.ChatTokens,), errors=(TgiError,)),
    "/detokenize": Text("Text of tokens (vLLM)", (tokens.TokensToText,), (tokens.Detokenized,)),
}
