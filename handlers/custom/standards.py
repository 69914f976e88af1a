"""Invocation handlers as AWS's vLLM and SGLang images take them, by the package model-hosting-container-standards.

Such a handler is called with Starlette's request, and returns one of its responses or what is written as JSON. It is
adapted in its own process; Starlette comes with the handler, as a package of its requirements.txt.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from handlers.custom import djl

FUNCTION = "custom_sagemaker_invocation_handler"
DECORATOR = "custom_invocation_handler"


def adapted(function: Callable[..., Any]) -> Callable[[djl.Input], Awaitable[Any]]:
    """Return a handler in DJL's manner that calls one of the standard's. Raises ImportError."""
    try:
        from starlette.exceptions import HTTPException
        from starlette.requests import Request
        from starlette.responses import Response
    except ImportError as error:
        raise ImportError("it needs fastapi or starlette: name one in requirements.txt") from error
    asynchronous = inspect.iscoroutinefunction(function)
    takes_request = bool(inspect.signature(function).parameters)

    async def handle(inputs: djl.Input) -> Any:
        if inputs.is_empty():
            return None
        given = [_request(Request, inputs)] if takes_request else []
        try:
            result = await (function(*given) if asynchronous else asyncio.to_thread(function, *given))
        except HTTPException as error:
            return djl.Output().error(str(error.detail), error.status_code)
        return _output(result) if isinstance(result, Response) else result

    return handle


def _request(kind: Any, inputs: djl.Input) -> Any:
    headers = [
        (name.lower().encode("latin-1"), value.encode("latin-1", "replace"))
        for name, value in inputs.get_properties().items()
    ]
    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": "/invocations",
        "raw_path": b"/invocations", "root_path": "", "query_string": b"", "headers": headers, "state": {},
    }  # fmt: skip
    body = inputs.get_as_bytes() or b""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return kind(scope, receive)


def _output(response: Any) -> djl.Output:
    output = djl.Output(response.status_code)
    output.properties.update(response.headers)
    stream = getattr(response, "body_iterator", None)
    if stream is None:
        return output.add(response.body)
    return output.add_stream_content(stream, lambda part: part if isinstance(part, str) else bytes(part))
