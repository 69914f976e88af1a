"""The server's own description, as an OpenAPI 3.1 document: GET /openapi.json.

Bodies are described by the very Structs that read them, replies by `container.openapi_shapes`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from container import openapi_shapes as shapes
from container.routes import Route, every
from engine.sampling_params import MAX_INTEGER, MAX_LOGPROBS, RANGES
from handlers.dialects import lmi_parameters, tgi, tokens
from handlers.dialects.lmi import LmiBody
from handlers.dialects.openai_chat import ChatBody
from handlers.dialects.openai_completions import CompletionBody
from handlers.dialects.openai_fields import MAX_ANSWERS
from handlers.version import VERSION

JSON = "application/json"
JSON_LINES = "application/jsonlines"
SSE = "text/event-stream"

_REF = "#/components/schemas/{name}"
_RENAMED = {
    "handlers.dialects.lmi_parameters.Parameters": "LmiParameters",
    "handlers.dialects.tgi.Parameters": "TgiParameters",
}

_STATUSES = {
    400: "The body is no valid request; the message names the field.",
    401: "The server's key is missing or wrong.",
    404: "There is no such model or adapter.",
    408: "The body, a picture or the answer took too long.",
    413: "The body or a picture is too large.",
    415: "The body's content type or charset is not read here.",
    422: "A picture's host failed to deliver it; on TGI's routes: a value is not allowed.",
    424: "The engine failed while it worked on the request.",
    429: "Too many requests are waiting: try again after `Retry-After` seconds.",
    500: "An error of the server's own; its log has more under the request's id.",
    503: "The model is not ready, or the server is stopping.",
}


@dataclass(frozen=True, slots=True)
class _Text:
    """What one route takes and gives. Several types of body or reply are alternatives.

    events: what each event or line of a stream is, by content type. types: of a body that is no JSON.
    """

    summary: str
    bodies: Sequence[type] = ()
    replies: Sequence[Any] = ()
    events: dict[str, Sequence[type]] = field(default_factory=dict)
    errors: Sequence[type] = (shapes.OpenAIError, shapes.LmiError, shapes.TgiError)
    not_ready: Sequence[type] = ()
    plain_text: bool = False


_OPENAI_ERRORS = (shapes.OpenAIError, shapes.TgiError)
_CHAT = _Text(
    "Chat completion (OpenAI)",
    (ChatBody,),
    (shapes.ChatCompletion,),
    {SSE: (shapes.ChatCompletionChunk,)},
    _OPENAI_ERRORS,
)
_ANY = _Text(
    "Answer a body of any dialect, told by its keys: messages, prompt, inputs or requestType",
    (ChatBody, CompletionBody, LmiBody, shapes.SessionBody),
    (shapes.ChatCompletion, shapes.Completion, shapes.LmiReply, list[shapes.LmiReply], shapes.SessionReply),
    {
        SSE: (shapes.ChatCompletionChunk, shapes.Completion, shapes.LmiLine),
        JSON_LINES: (shapes.ChatCompletionChunk, shapes.Completion, shapes.LmiLine),
    },
    plain_text=True,
)
_TGI = _Text(
    "Generate text (TGI)",
    (tgi.TgiBody, ChatBody, CompletionBody),
    (shapes.TgiReply, list[shapes.TgiReply], shapes.ChatCompletion, shapes.Completion),
    {SSE: (shapes.TgiEvent, shapes.ChatCompletionChunk, shapes.Completion)},
    (shapes.TgiError,),
)

_TEXTS: dict[str, _Text] = {
    "/ping": _Text(
        "Whether the model can answer, as SageMaker asks it",
        replies=(shapes.Ping,),
        not_ready=(shapes.Ping,),
    ),
    "/health": _Text("Whether the model can answer", replies=(shapes.Health,), not_ready=(shapes.Unhealthy,)),
    "/metrics": _Text("Metrics for Prometheus"),
    "/version": _Text("The version of this server", replies=(shapes.Version,)),
    "/openapi.json": _Text("This document", replies=(dict[str, Any],)),
    "/v1/models": _Text("The served models", replies=(shapes.Models,), errors=_OPENAI_ERRORS),
    "/v1/models/{name}": _Text("One served model", replies=(shapes.Model,), errors=_OPENAI_ERRORS),
    "/v1/chat/completions": _CHAT,
    "/v1/completions": _Text(
        "Text completion (OpenAI); pictures stand in the prompt as `![](url)`",
        (CompletionBody,),
        (shapes.Completion,),
        {SSE: (shapes.Completion,)},
        _OPENAI_ERRORS,
    ),
    "/invocations": _ANY,
    "/predictions/{name}": _ANY,
    "/models/{name}/invoke": _ANY,
    "/": _TGI,
    "/v1": _TGI,
    "/generate": _TGI,
    "/generate_stream": _TGI,
    "/info": _Text("What is served, and its limits (TGI)", replies=(shapes.Info,), errors=(shapes.TgiError,)),
    "/tokenize": _Text(
        "Tokens of a text or of a chat, as TGI (inputs) or vLLM (prompt, messages) counts them",
        (tokens.InputsToTokens, tokens.PromptToTokens, ChatBody),
        (list[tokens.SimpleToken], shapes.TokenCounts),
    ),
    "/chat_tokenize": _Text(
        "Tokens of a chat (TGI)", (ChatBody,), (shapes.ChatTokens,), errors=(shapes.TgiError,)
    ),
    "/detokenize": _Text("Text of tokens (vLLM)", (tokens.TokensToText,), (shapes.Detokenized,)),
}

_HEADERS = {
    "x-request-id": "The request's id, for the log and the reply; a harmless token of at most 128 characters.",
    "X-Amzn-SageMaker-Inference-Id": "The same, as SageMaker sends it; it wins.",
    "X-Amzn-SageMaker-Adapter-Identifier": "The adapter to answer with.",
    "X-Amzn-SageMaker-Session-Id": "The session that the request belongs to.",
    "X-Amzn-SageMaker-Custom-Attributes": "`name=value` pairs between semicolons.",
}


_BOUNDS: dict[str, dict[str, float]] = {
    **{name: {"minimum": least, "maximum": most} for name, (least, most, _) in RANGES.items()},
    "temperature": {"minimum": 0, "maximum": 100},
    "top_k": {"minimum": -1, "maximum": MAX_INTEGER},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "min_p": {"minimum": 0, "maximum": 1},
    "tfs": {"exclusiveMinimum": 0, "maximum": 1},
    "typical_p": {"exclusiveMinimum": 0, "maximum": 1},
    "repetition_penalty": {"exclusiveMinimum": 0, "maximum": 100},
    "presence_penalty": {"minimum": -2, "maximum": 2},
    "frequency_penalty": {"minimum": -2, "maximum": 2},
    "min_tokens": {"minimum": 0, "maximum": MAX_INTEGER},
    "max_completion_tokens": {"minimum": 1, "maximum": MAX_INTEGER},
    "max_new_tokens": {"minimum": 1, "maximum": MAX_INTEGER},
    "top_logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
    "prompt_logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
    "n": {"minimum": 1, "maximum": MAX_ANSWERS},
    "best_of": {"minimum": 1, "maximum": MAX_ANSWERS},
}
"""Allowed values of fields whose type does not say them, in every body that has the field."""


@functools.cache
def document() -> bytes:
    """The document as JSON."""
    paths: dict[str, dict[str, Any]] = {}
    for path, route in every():
        for method in route.methods:
            paths.setdefault(path, {})[method.lower()] = _operation(path, route, method)
    body = {
        "openapi": "3.1.0",
        "info": {
            "title": "lmi-handler",
            "version": VERSION,
            "description": "Answers of a vision-language model, in the words of OpenAI, vLLM, LMI and TGI. The paths "
            "/v1/chat/completions and /v1/completions also work appended to any path that answers.",
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
    return _renamed(msgspec.json.encode(body)) + b"\n"


def _operation(path: str, route: Route, method: str) -> dict[str, Any]:
    text = _TEXTS[path if route.action in ("answer", "models") else route.template]
    operation: dict[str, Any] = {
        "summary": text.summary,
        "operationId": f"{method.lower()}:{path}",
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in ("name",)
            if "{name}" in path
        ],
        "responses": _responses(route, text, method),
    }
    if not route.open:
        operation["security"] = [{}, {"key": []}]
    if route.action == "answer":
        operation["parameters"] += [
            {"name": name, "in": "header", "description": description, "schema": {"type": "string"}}
            for name, description in _HEADERS.items()
        ]
        operation["parameters"].append(
            {
                "name": "model_name",
                "in": "query",
                "description": "The model, where the path names none.",
                "schema": {"type": "string"},
            }
        )
    if text.bodies:
        content: dict[str, Any] = {JSON: {"schema": _any_of(text.bodies)}}
        if text.plain_text:
            content["text/plain"] = {"schema": {"type": "string"}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _responses(route: Route, text: _Text, method: str) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if route.action == "metrics":
        content = {"text/plain": {"schema": {"type": "string"}}}
        content["application/openmetrics-text"] = content["text/plain"]
    if text.replies:
        content[JSON] = {"schema": _any_of(text.replies)}
    for kind, events in text.events.items():
        content[kind] = {"schema": _stream(kind, _any_of((*events, *text.errors)))}
    codes = [500, 503]
    if not route.open:
        codes = [401, *codes]
    if route.action == "models" or text.bodies:
        codes = [404, *codes]
    if text.bodies:
        codes = [400, 404, *_STATUSES]
    responses: dict[str, Any] = {"200": {"description": "As asked.", "content": content}}
    for code in sorted(set(codes)):
        shown = text.not_ready if code == 503 and text.not_ready else text.errors
        responses[str(code)] = {
            "description": _STATUSES[code],
            "content": {JSON: {"schema": _any_of(shown)}},
        }
    if method == "HEAD":
        for response in responses.values():
            response.pop("content")
    return responses


def _stream(kind: str, item: dict[str, Any]) -> dict[str, Any]:
    """Of events each one is described, which is the custom before OpenAPI 3.2; of JSON lines, all together."""
    if kind == JSON_LINES:
        return {"type": "array", "items": item, "description": "One JSON value on each line."}
    data = {"type": "string", "contentMediaType": JSON, "contentSchema": item}
    return {
        "type": "object",
        "description": "One event.",
        "required": ["data"],
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, data]}},
    }


def _any_of(types: Sequence[Any]) -> dict[str, Any]:
    found, _ = msgspec.json.schema_components(types, ref_template=_REF)
    return found[0] if len(found) == 1 else {"anyOf": list(found)}


def _schemas() -> dict[str, Any]:
    """Every Struct that some route names, and those that readers take apart by themselves."""
    inner = (
        lmi_parameters.Parameters,
        tgi.Parameters,
        shapes.Message,
        shapes.AssistantMessage,
        shapes.TextPart,
        shapes.ImagePart,
    )
    named = [kind for text in _TEXTS.values() for kind in (*text.bodies, *text.replies, *text.errors)]
    named += [kind for text in _TEXTS.values() for events in text.events.values() for kind in events]
    named += [kind for text in _TEXTS.values() for kind in text.not_ready]
    unique = list({repr(kind): kind for kind in (*inner, *named)}.values())
    _, schemas = msgspec.json.schema_components(unique, ref_template=_REF)
    schemas["Message"]["properties"]["content"] = {
        "anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"anyOf": [_ref("TextPart"), _ref("ImagePart"), {"type": "string"}]}},
        ]
    }
    schemas["ChatBody"]["properties"]["messages"] = {
        "type": "array",
        "items": {"anyOf": [_ref("Message"), _ref("AssistantMessage")]},
        "minItems": 1,
    }
    for body in ("ChatBody", "CompletionBody", *_RENAMED):
        for name, bounds in _BOUNDS.items():
            if name in schemas[body]["properties"]:
                schemas[body]["properties"][name]["anyOf"][0] |= bounds
    for name, parameters in (("LmiBody", lmi_parameters.Parameters), ("TgiBody", tgi.Parameters)):
        schemas[name]["properties"]["parameters"] = {
            "anyOf": [_ref(f"{parameters.__module__}.Parameters"), {"type": "null"}]
        }
    return schemas


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REF.format(name=name)}


def _renamed(document: bytes) -> bytes:
    """Shorter names for Structs that share theirs."""
    for name, shown in _RENAMED.items():
        document = document.replace(name.encode(), shown.encode())
    return document
