"""Which dialect a body speaks: told by its route where that is enough, else by its keys."""

from __future__ import annotations

from typing import Any

from handlers.errors import InvalidRequest
from handlers.exchange import Incoming
from handlers.protocols.base import Conventions, Task
from handlers.protocols.error_replies import ErrorStyle
from handlers.protocols.json_lines import JsonLines
from handlers.protocols.lmi.requests import read_lmi
from handlers.protocols.lmi.sagemaker import ROUTES, accept_of, adapter_of, wants_lines
from handlers.protocols.openai.chat import read_chat
from handlers.protocols.openai.completions import read_completion
from handlers.protocols.tgi import generate as tgi

_SCHEMAS = frozenset({"messages", "prompt", "inputs"})


def read_task(body: dict[str, Any], conventions: Conventions, incoming: Incoming) -> Task:
    """Raises InvalidRequest naming the field at fault."""
    if incoming.route not in ROUTES or "inputs" in body:
        return _read(body, conventions, incoming)
    formatter = conventions.output_formatter
    if body.get("stream") is None and formatter in ("jsonlines_chat", "sse_chat"):
        body = {**body, "stream": True}
    task = _read(body, conventions, incoming)
    accept = accept_of(incoming.headers)
    lines = formatter == "jsonlines_chat" and "text/event-stream" not in accept
    if task.stream and (lines or wants_lines(accept)) and not conventions.custom_output:
        task.writer = JsonLines(task.writer)
    return task


def _read(body: dict[str, Any], conventions: Conventions, incoming: Incoming) -> Task:
    adapter = adapter_of(incoming.headers)
    if incoming.route == "/v1/completions":
        return read_completion(body, conventions, request_id=incoming.request_id, adapter=adapter)
    if "messages" in body:
        return read_chat(body, conventions, request_id=incoming.request_id, adapter=adapter)
    if incoming.route in tgi.ROUTES and ("inputs" in body or "prompt" not in body):
        return tgi.read_tgi(
            body, conventions, request_id=incoming.request_id, route=incoming.route, adapter=adapter
        )
    if "inputs" in body:
        accept = accept_of(incoming.headers)
        return read_lmi(body, conventions, request_id=incoming.request_id, adapter=adapter, accept=accept)
    if "prompt" in body:
        return read_completion(body, conventions, request_id=incoming.request_id, adapter=adapter)
    raise InvalidRequest("the body has neither messages, prompt nor inputs", param="messages")


def asks_for_session(body: dict[str, Any], incoming: Incoming) -> bool:
    """Whether the body opens or closes a session instead of asking for an answer."""
    return incoming.route in ROUTES and "requestType" in body and not _SCHEMAS & body.keys()


def style_of_body(body: dict[str, Any], otherwise: ErrorStyle, route: str) -> ErrorStyle:
    """How errors look once the body is known. otherwise: what its route says."""
    if otherwise == "tgi" or (route == "/tokenize" and "inputs" in body):
        return "tgi"
    if "messages" in body or ("prompt" in body and "inputs" not in body):
        return "openai"
    return "lmi" if "inputs" in body else otherwise
