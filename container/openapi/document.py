"""The server's own description, as an OpenAPI 3.1 document: GET /openapi.json.

Bodies are described by the very Structs that read them, replies by the shapes in this folder.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import msgspec

from container.openapi import openai_shapes
from container.openapi.table import TEXTS, Text
from container.routes import Route, every
from engine.sampling_params import MAX_INTEGER, MAX_LOGPROBS, RANGES
from handlers.protocols.base import JSON, JSON_LINES, MAX_PROMPTS
from handlers.protocols.lmi.requests import LmiParameters
from handlers.protocols.openai.fields import MAX_ANSWERS
from handlers.protocols.tgi.requests import TgiParameters
from handlers.version import VERSION

_REF = "#/components/schemas/{name}"
_STATUSES = {
    400: "The body is no valid request; the message names the field.",
    401: "The server's key is missing or wrong.",
    404: "There is no such model or adapter.",
    408: "The body, a picture or the answer took too long.",
    409: "The name is taken.",
    413: "The body or a picture is too large.",
    415: "The body's content type or charset is not read here.",
    422: "A picture's host failed to deliver it; on TGI's routes: a value is not allowed.",
    424: "The engine failed while it worked on the request.",
    429: "Too many requests are waiting: try again after `Retry-After` seconds.",
    500: "An error of the server's own; its log has more under the request's id.",
    503: "The model is not ready, or the server is stopping.",
    507: "No place is left for another adapter.",
}


_QUERY = {
    "model_name": "The model, where the path names none.",
    "adapter": "The adapter, where no header names one.",
}
_HEADERS = {
    "x-request-id": "The request's id, for the log and the reply; a harmless token of at most 128 characters.",
    "X-Amzn-SageMaker-Inference-Id": "The same, as SageMaker sends it; it wins.",
    "X-Amzn-SageMaker-Adapter-Identifier": "The adapter to answer with.",
    "X-Amzn-SageMaker-Session-Id": "The session that the request belongs to.",
    "X-Amzn-SageMaker-Custom-Attributes": "`name=value` pairs between semicolons.",
}


_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": MAX_INTEGER}, "minItems": 1}

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
    return msgspec.json.encode(body) + b"\n"


def _operation(path: str, route: Route, method: str) -> dict[str, Any]:
    text = _text(path, route, method)
    operation: dict[str, Any] = {
        "summary": text.summary,
        "operationId": f"{method.lower()}:{path}",
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in ("name", "adapter")
            if f"{{{name}}}" in path
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
        operation["parameters"] += [
            {"name": name, "in": "query", "description": description, "schema": {"type": "string"}}
            for name, description in _QUERY.items()
        ]
    operation["parameters"] += [
        {"name": name, "in": "query", "description": description, "schema": {"type": "string"}}
        for name, description in text.query.items()
    ]
    if text.bodies:
        content: dict[str, Any] = {JSON: {"schema": _any_of(text.bodies)}}
        if text.plain_text:
            content["text/plain"] = {"schema": {"type": "string"}}
        operation["requestBody"] = {"required": route.action != "adapters", "content": content}
    return operation


def _text(path: str, route: Route, method: str) -> Text:
    if route.action == "adapters":
        return TEXTS[f"{'GET' if method == 'HEAD' else method} {route.template}"]
    return TEXTS[path if route.action in ("answer", "models") else route.template]


def _responses(route: Route, text: Text, method: str) -> dict[str, Any]:
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
    if text.codes:
        codes = [*codes, *text.codes]
    elif text.bodies:
        codes = [400, 404, 408, 413, 415, 422, 424, 429, *codes]
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
        LmiParameters,
        TgiParameters,
        openai_shapes.Message,
        openai_shapes.AssistantMessage,
        openai_shapes.TextPart,
        openai_shapes.ImagePart,
        openai_shapes.EmbeddingsPart,
    )
    named = [kind for text in TEXTS.values() for kind in (*text.bodies, *text.replies, *text.errors)]
    named += [kind for text in TEXTS.values() for events in text.events.values() for kind in events]
    named += [kind for text in TEXTS.values() for kind in text.not_ready]
    unique = list({repr(kind): kind for kind in (*inner, *named)}.values())
    _, schemas = msgspec.json.schema_components(unique, ref_template=_REF)
    schemas["Message"]["properties"]["content"] = {
        "anyOf": [
            {"type": "string"},
            {
                "type": "array",
                "items": {
                    "anyOf": [*map(_ref, ("TextPart", "ImagePart", "EmbeddingsPart")), {"type": "string"}]
                },
            },
        ]
    }
    schemas["CompletionBody"]["properties"]["prompt"] = {
        "anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
            _TOKENS,
            {"type": "array", "items": _TOKENS, "minItems": 1, "maxItems": MAX_PROMPTS},
        ]
    }
    schemas["ChatBody"]["properties"]["messages"] = {
        "type": "array",
        "items": {"anyOf": [_ref("Message"), _ref("AssistantMessage")]},
        "minItems": 1,
    }
    for body in ("ChatBody", "CompletionBody", "LmiParameters", "TgiParameters"):
        for name, bounds in _BOUNDS.items():
            if name in schemas[body]["properties"]:
                schemas[body]["properties"][name]["anyOf"][0] |= bounds
    for name, parameters in (("LmiBody", "LmiParameters"), ("TgiBody", "TgiParameters")):
        schemas[name]["properties"]["parameters"] = {"anyOf": [_ref(parameters), {"type": "null"}]}
    return schemas


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REF.format(name=name)}
