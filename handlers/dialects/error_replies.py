"""The error tree as each dialect writes it: the one place where a status and a body are chosen."""

from __future__ import annotations

import logging
import math
from typing import Any, Literal

import msgspec

from handlers.dialects.base import JSON
from handlers.errors import Overloaded, ServingError
from handlers.exchange import Reply

log = logging.getLogger(__name__)

ErrorStyle = Literal["openai", "lmi"]

_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    424: "model_code_error",
    500: "server_error",
    503: "service_unavailable_error",
}


def style_of(route: str) -> ErrorStyle:
    """How errors look on a route before the body has told its dialect."""
    return "openai" if route.startswith("/v1/") else "lmi"


def openai_error(error: ServingError) -> dict[str, Any]:
    return {
        "error": {
            "message": error.message,
            "type": _OPENAI_TYPES.get(error.status, "invalid_request_error"),
            "param": error.param,
            "code": error.kind,
        }
    }


def lmi_error(error: ServingError) -> dict[str, Any]:
    """`message` is where djl-serving's front puts the text, `error` where its handlers do."""
    return {"code": error.status, "type": error.kind, "message": error.message, "error": error.message}


def error_reply(error: ServingError, style: ErrorStyle) -> Reply:
    body = msgspec.json.encode(openai_error(error) if style == "openai" else lmi_error(error))
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    return Reply(status=error.status, content_type=JSON, body=body, headers=headers)


def client_error(error: Exception, request_id: str) -> ServingError:
    """What a client learns of an exception: all of an expected one, of any other only where to look."""
    if isinstance(error, ServingError):
        return error
    unexpected = ServingError(f"internal error; the log has more under request id {request_id}")
    unexpected.__cause__ = error
    return unexpected


def log_error(error: ServingError, request_id: str) -> None:
    """The stack trace that the client does not see. Overload is not traced: it comes in thousands."""
    traced = None if isinstance(error, Overloaded) else error
    level = logging.ERROR if error.status >= 500 or error.status == 424 else logging.INFO
    log.log(level, "request %s: %s (%d)", request_id, error.kind, error.status, exc_info=traced)
