"""LMI's routes, which SageMaker calls: what its headers say, and how a stream is framed there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from handlers.exchange import Incoming
from handlers.protocols.base import JSON_LINES, READ, SSE_TYPE, Api, Reader, Route, ServerContext, Task
from handlers.protocols.lmi import adapters
from handlers.protocols.lmi.lines import ExecutionParameters, execution_parameters
from handlers.protocols.lmi.replies import (
    LMI_ERRORS,
    JsonLines,
    LmiBrokenLine,
    LmiError,
    LmiLine,
    LmiReply,
)
from handlers.protocols.lmi.requests import INVOKE_ROUTES, LmiBody, read_lmi, wants_lines
from handlers.protocols.lmi.sessions import SessionBody, SessionReply, Sessions
from handlers.protocols.openai.replies import ChatCompletion, ChatCompletionChunk, Completion, OpenAIError
from handlers.protocols.openai.requests import ChatBody, CompletionBody

_PREFIX = "x-amzn-sagemaker-"
_ADAPTER = f"{_PREFIX}adapter-identifier"
_ATTRIBUTES = f"{_PREFIX}custom-attributes"
_MOST_ATTRIBUTES = 1024
"""The most characters of the header: SageMaker's own limit."""


def accept_of(headers: Mapping[str, str]) -> str:
    """Return the media types that the client accepts, in lower case; empty if it does not say.

    Asynchronous and streamed invocations may name them in a header of SageMaker's own.

    Args:
        headers: With names in lower case.
    """
    return (headers.get("accept") or headers.get(f"{_PREFIX}accept") or "").lower()


def adapter_of(incoming: Incoming) -> str | None:
    """Return the adapter that SageMaker's header, the query or a custom attribute names."""
    return request_properties(incoming).get(_ADAPTER) or None


def request_properties(incoming: Incoming) -> dict[str, str]:
    """Return the headers, and under other names the query's adapter and the custom attributes.

    Attributes have the form `name=value;name=value`; their names are read in lower case, as in LMI.
    """
    text = incoming.headers.get(_ATTRIBUTES, "")[:_MOST_ATTRIBUTES]
    pairs = (part.partition("=") for part in text.split(";") if "=" in part)
    attributes = {name.strip().lower(): value.strip() for name, _, value in pairs}
    queried = {_ADAPTER: incoming.query["adapter"]} if incoming.query.get("adapter") else {}
    return {**attributes, **queried, **incoming.headers}


def _claims(route: str, headers: Mapping[str, str], keys: Collection[str]) -> bool:
    return True


def _reads(keys: Collection[str], route: str) -> Reader | None:
    return _read if "inputs" in keys else None


def _read(body: dict[str, Any], server: ServerContext, incoming: Incoming, adapter: str | None) -> Task:
    accept = accept_of(incoming.headers)
    return read_lmi(body, server, request_id=incoming.request_id, adapter=adapter, accept=accept)


def _framed(
    read: Reader,
    body: dict[str, Any],
    server: ServerContext,
    incoming: Incoming,
    adapter: str | None,
) -> Task:
    """Read another API's body; `option.output_formatter` and the `Accept` header decide whether and how to stream."""
    if "inputs" in body:
        return read(body, server, incoming, adapter)
    formatter = server.output_formatter
    if body.get("stream") is None and formatter in ("jsonlines_chat", "sse_chat"):
        body = {**body, "stream": True}
    task = read(body, server, incoming, adapter)
    accept = accept_of(incoming.headers)
    lines = formatter == "jsonlines_chat" and "text/event-stream" not in accept
    if task.stream and (lines or wants_lines(accept)) and not server.custom_output:
        task.writer = JsonLines(task.writer)
    return task


_EVENTS = (ChatCompletionChunk, Completion, LmiLine, LmiBrokenLine)
_ANSWER = Route(
    "/invocations",
    "answer",
    "Answer a body of any API, which its keys tell (messages, prompt, inputs or requestType), or JSON lines of them",
    queued=True,
    bodies=(ChatBody, CompletionBody, LmiBody, SessionBody),
    plain_text=True,
    replies=(ChatCompletion, Completion, LmiReply, list[LmiReply], SessionReply),
    events={SSE_TYPE: _EVENTS, JSON_LINES: (*_EVENTS, ChatCompletion, LmiReply)},
    errors=(OpenAIError, LmiError),
)

ROUTES = (
    *adapters.ROUTES,
    _ANSWER,
    Route(
        "/execution-parameters",
        "execution",
        "How batch transform sends records if its user does not say",
        methods=READ,
        light=True,
        replies=(ExecutionParameters,),
        errors=(OpenAIError, LmiError),
    ),
    replace(_ANSWER, path="/models/{name}/invoke", template="/models/{model}/invoke"),
    replace(_ANSWER, path="/predictions/{name}", template="/predictions/{model}"),
)

LMI = Api(
    LMI_ERRORS,
    _claims,
    _reads,
    ROUTES,
    frames=dict.fromkeys(INVOKE_ROUTES, _framed),
    adapter=adapter_of,
    calls={"adapters": adapters.answer_adapters, "execution": execution_parameters},
    request_id=f"{_PREFIX}inference-id",
    gate=lambda settings: Sessions(
        enabled=settings.enable_stateful_sessions, expiration=settings.sessions_expiration
    ),
)
