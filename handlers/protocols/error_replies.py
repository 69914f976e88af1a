"""The error tree as each dialect writes it: the one place where a status and a body are chosen."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from handlers.errors import (
    ContextExceeded,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    MalformedBody,
    Overloaded,
    ServingError,
    Unavailable,
    raised_at,
    short_of,
)
from handlers.exchange import Reply
from handlers.own_words import own_words_of
from handlers.protocols.base import JSON
from processes.shortage import shortage

log = logging.getLogger(__name__)

ErrorStyle = Literal["openai", "lmi", "tgi"]

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


_TGI_ROUTES = frozenset({"/", "/generate", "/generate_stream", "/chat_tokenize", "/info"})
_OPENAI_ROUTES = frozenset({"/tokenize", "/detokenize", "/version"})


def style_of(route: str, headers: Mapping[str, str]) -> ErrorStyle:
    """How errors look on a route before the body has told its dialect.

    headers: names in lower case. Hugging Face's JavaScript client shows an error only where it is a string, on every
    route, and calls again at once and for ever where the status is 503: it gets TGI's errors.
    """
    if route in _TGI_ROUTES or headers.get("user-agent", "").startswith("@huggingface/"):
        return "tgi"
    return "openai" if route.startswith("/v1/") or route in _OPENAI_ROUTES else "lmi"


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


def tgi_error(error: ServingError) -> dict[str, str]:
    """`error_type` is what TGI's clients choose their exception by; some also know the words."""
    if isinstance(error, InvalidRequest):
        words = _tgi_length(error) if isinstance(error, ContextExceeded) else error.message
        return {"error": f"Input validation error: {words}", "error_type": "validation"}
    if isinstance(error, Overloaded):
        return {"error": "Model is overloaded", "error_type": "overloaded"}
    if isinstance(error, Unavailable):
        return {"error": error.message, "error_type": "overloaded"}
    if isinstance(error, DeadlineExceeded):
        return {"error": f"Incomplete generation: {error.message}", "error_type": "incomplete_generation"}
    if error.status == 500:
        failed = f"Request failed during generation: Server error: {error.message}"
        return {"error": failed, "error_type": "generation"}
    return {"error": error.message, "error_type": error.kind}


def _tgi_length(error: ContextExceeded) -> str:
    prompt, wanted, longest = error.prompt_tokens, error.max_tokens, error.context
    if wanted is None:
        return f"`inputs` must have less than {longest - 1} tokens. Given: {prompt}"
    return (
        f"`inputs` tokens + `max_new_tokens` must be <= {longest}. "
        f"Given: {prompt} `inputs` tokens and {wanted} `max_new_tokens`"
    )


def tgi_status(error: ServingError) -> int:
    """TGI's status codes; 429 where others say 503, as its JavaScript client would not wait before it calls again."""
    if isinstance(error, InvalidRequest):
        return 400 if isinstance(error, MalformedBody) else 422
    if isinstance(error, Unavailable):
        return 429
    return 424 if isinstance(error, EngineFailed) else error.status


_BODIES = {"openai": openai_error, "lmi": lmi_error, "tgi": tgi_error}


def error_reply(error: ServingError, style: ErrorStyle) -> Reply:
    body = msgspec.json.encode(_BODIES[style](error))
    status = tgi_status(error) if style == "tgi" else error.status
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    return Reply(status=status, content_type=JSON, body=body, headers=headers)


def client_error(error: Exception, request_id: str) -> ServingError:
    """What a client learns of an exception: all of an expected one, of any other only where to look, unless the server
    was short of something: then that trying again may help."""
    if isinstance(error, ServingError):
        return error
    if (what := shortage(error)) is not None:
        short: ServingError = short_of(what)
        short.__cause__ = error
        return short
    unexpected = ServingError(f"internal error; the log has more under request id {request_id}")
    unexpected.__cause__ = error
    return unexpected


def log_error(error: ServingError, request_id: str) -> None:
    """What the client was told, in the program's own words; for a failure that is not the client's the stack trace that
    it does not see, else where it comes from, without messages of other exceptions, which may quote what the client
    sent. Overload is not traced: it comes in thousands."""
    told, reason = (request_id, error.kind, error.status), own_words_of(error)
    if isinstance(error, Overloaded):
        log.info("request %s: %s (%d): %s", *told, reason)
    elif error.status >= 500 or error.status == 424:
        log.error("request %s: %s (%d): %s", *told, reason, exc_info=error)
    else:
        log.info("request %s: %s (%d) at %s: %s", *told, _places(error), reason)


_MOST_PLACES = 6


def _places(error: BaseException) -> str:
    """Where the first cause of an exception comes from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return ", ".join(f"{file}:{line} {function}" for file, line, function in raised_at(error)[:_MOST_PLACES])
