"""The server's own description, as an OpenAPI 3.1 document: GET /openapi.json.

It is made from the routes, and from the structs that read their bodies and write their replies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from container.models.models import REGISTRY
from handlers.protocols.base import JSON, JSON_LINES, REFERENCE, Route
from handlers.service import ERRORS_ANYWHERE
from handlers.version import VERSION

_STATUSES = {
    400: "The body is not a valid request; the message names the field.",
    401: "The server's key is missing or wrong.",
    404: "There is no such model or adapter.",
    408: "The body, an image or the answer took too long.",
    409: "The name is taken.",
    413: "The body or an image is too large.",
    415: "The body's content type or charset is not read here.",
    422: "An image's host failed to deliver it; on TGI's routes: a value is not allowed.",
    424: "The engine failed while it worked on the request.",
    429: "Too many requests are waiting: try again after `Retry-After` seconds.",
    500: "An error of the server's own; its log has more under the request's id.",
    503: "The model is not ready, or the server is stopping.",
    507: "No place is left for another adapter or model.",
}
_QUERY = {"model_name": "The model, where the path names none.", "adapter": "The adapter, where no header names one."}
_HEADERS = {
    "x-request-id": "The request's id, for the log and the reply; a harmless token of at most 128 characters.",
    "X-Amzn-SageMaker-Inference-Id": "The same, as SageMaker sends it; it wins.",
    "X-Amzn-SageMaker-Adapter-Identifier": "The adapter to answer with.",
    "X-Amzn-SageMaker-Session-Id": "The session that the request belongs to.",
    "X-Amzn-SageMaker-Custom-Attributes": "`name=value` pairs between semicolons.",
}


def document(routes: Sequence[Route]) -> bytes:
    """Return the document of these routes as JSON."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        for method in route.methods:
            paths.setdefault(route.path, {})[method.lower()] = _operation(route, method)
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
        "components": {"schemas": _schemas(routes), "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }
    return msgspec.json.encode(body) + b"\n"


def _operation(route: Route, method: str) -> dict[str, Any]:
    named = [_parameter("path", name) for name in ("name", "adapter") if f"{{{name}}}" in route.path]
    headers, query = (_HEADERS, _QUERY) if route.action == "answer" else ({}, {})
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": f"{method.lower()}:{route.path}",
        "parameters": [
            *named,
            *(_parameter("header", name, meaning) for name, meaning in headers.items()),
            *(_parameter("query", name, meaning) for name, meaning in {**query, **route.query}.items()),
        ],
        "responses": _responses(route, method),
    }
    if not route.open:
        operation["security"] = [{}, {"key": []}]
    if route.bodies:
        content: dict[str, Any] = {JSON: {"schema": _any_of(route.bodies)}}
        if route.plain_text:
            content["text/plain"] = {"schema": {"type": "string"}}
        operation["requestBody"] = {"required": route.action not in ("adapters", REGISTRY), "content": content}
    return operation


def _parameter(where: str, name: str, meaning: str | None = None) -> dict[str, Any]:
    described = {"required": True} if meaning is None else {"description": meaning}
    return {"name": name, "in": where, **described, "schema": {"type": "string"}}


def _responses(route: Route, method: str) -> dict[str, Any]:
    content: dict[str, Any] = {kind: {"schema": {"type": "string"}} for kind in route.texts}
    errors = (*route.errors, *ERRORS_ANYWHERE)
    if route.replies:
        content[JSON] = {"schema": _any_of(route.replies)}
    for kind, events in route.events.items():
        content[kind] = {"schema": _stream(kind, _any_of((*events, *errors)))}
    codes = [500, 503]
    if not route.open:
        codes = [401, *codes]
    if route.action == "models" or route.bodies:
        codes = [404, *codes]
    if route.codes:
        codes = [*codes, *route.codes]
    elif route.bodies:
        codes = [400, 404, 408, 413, 415, 422, 424, 429, *codes]
    responses: dict[str, Any] = {"200": {"description": "As asked.", "content": content}}
    for code in sorted(set(codes)):
        shown = route.not_ready if code == 503 and route.not_ready else errors
        responses[str(code)] = {"description": _STATUSES[code], "content": {JSON: {"schema": _any_of(shown)}}}
    if method == "HEAD":
        for response in responses.values():
            response.pop("content")
    return responses


def _stream(kind: str, item: dict[str, Any]) -> dict[str, Any]:
    """Describe a stream: one event, as is customary before OpenAPI 3.2, or an array of all JSON lines."""
    if kind == JSON_LINES:
        return {"type": "array", "items": item, "description": "One JSON value on each line."}
    data = {"type": "string", "contentMediaType": JSON, "contentSchema": item}
    return {
        "type": "object",
        "description": "One event.",
        "required": ["data"],
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, data]}},
    }


def _any_of(kinds: Sequence[Any]) -> dict[str, Any]:
    unique = list({repr(kind): kind for kind in kinds}.values())
    found, _ = msgspec.json.schema_components(unique, ref_template=REFERENCE)
    return found[0] if len(found) == 1 else {"anyOf": list(found)}


def _schemas(routes: Sequence[Route]) -> dict[str, Any]:
    """Return the schemas of all structs that routes name, and of the parts that are read by hand."""
    named = [
        kind
        for route in routes
        for kinds in (route.bodies, route.replies, *route.events.values(), route.errors, route.not_ready)
        for kind in kinds
    ]
    everything = {repr(kind): kind for kind in _with_parts((*named, *ERRORS_ANYWHERE))}
    schemas = msgspec.json.schema_components(everything.values(), ref_template=REFERENCE)[1]
    for kind in everything.values():
        for field, meta in _described_fields(kind):
            # msgspec writes the `anyOf` of a union's types over the one that is given here.
            schemas[kind.__name__]["properties"][field.encode_name] |= meta.extra_json_schema or {}
    return schemas


def _with_parts(kinds: Iterable[Any]) -> Iterator[Any]:
    for kind in kinds:
        yield kind
        for _, meta in _described_fields(kind):
            yield from _with_parts((meta.extra or {}).get("parts", ()))


def _described_fields(kind: Any) -> Iterator[tuple[msgspec.structs.FieldInfo, msgspec.Meta]]:
    """Yield the fields of a struct whose schema says more than their types do."""
    if isinstance(kind, type) and issubclass(kind, Struct):
        for field in msgspec.structs.fields(kind):
            for meta in getattr(field.type, "__metadata__", ()):
                yield field, meta
