"""Errors as OpenAI's API writes them."""

from __future__ import annotations

from typing import Any

from handlers.errors import ServingError
from handlers.protocols.errors import ErrorFormat

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    424: "model_code_error",
    500: "server_error",
    503: "service_unavailable_error",
}


def openai_error(error: ServingError) -> dict[str, Any]:
    return {
        "error": {
            "message": error.message,
            "type": _TYPES.get(error.status, "invalid_request_error"),
            "param": error.param,
            "code": error.kind,
        }
    }


OPENAI_ERRORS = ErrorFormat(openai_error)
