"""Which dialect a body speaks: told by its route where that is enough, else by its keys."""

from __future__ import annotations

from typing import Any

from handlers.dialects.base import Conventions, Task
from handlers.dialects.error_replies import ErrorStyle
from handlers.dialects.lmi import read_lmi
from handlers.dialects.openai_chat import read_chat
from handlers.errors import InvalidRequest
from handlers.exchange import Incoming

ADAPTER_HEADER = "x-amzn-sagemaker-adapter-identifier"


def read_task(body: dict[str, Any], conventions: Conventions, incoming: Incoming) -> Task:
    """Raises InvalidRequest naming the field at fault."""
    adapter = incoming.headers.get(ADAPTER_HEADER) or None
    if "messages" in body:
        return read_chat(body, conventions, request_id=incoming.request_id, adapter=adapter)
    if "inputs" in body:
        accept = incoming.headers.get("accept", "")
        return read_lmi(body, conventions, request_id=incoming.request_id, adapter=adapter, accept=accept)
    if "prompt" in body:
        raise InvalidRequest("completions (`prompt`) are not served: send messages or inputs", param="prompt")
    raise InvalidRequest("the body has neither messages nor inputs", param="messages")


def style_of_body(body: dict[str, Any], otherwise: ErrorStyle) -> ErrorStyle:
    """How errors look once the body is known. otherwise: what its route says."""
    if "messages" in body:
        return "openai"
    return "lmi" if "inputs" in body else otherwise
