"""What clients and the log learn about errors; each API writes them in its own format."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

import msgspec

from handlers.errors import Overloaded, ServingError, raised_at, short_of
from handlers.exchange import Reply
from handlers.own_words import own_words_of
from handlers.protocols.base import JSON
from processes.shortage import shortage

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ErrorFormat:
    """How one API writes errors.

    Attributes:
        body: Makes of an error what is encoded as JSON.
        status: The HTTP status of its reply, where that is not the error's own.
    """

    body: Callable[[ServingError], object]
    status: Callable[[ServingError], int] = attrgetter("status")


def error_reply(error: ServingError, written: ErrorFormat) -> Reply:
    """Returns the reply to a request that failed before its reply began."""
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    return Reply(written.status(error), JSON, msgspec.json.encode(written.body(error)), headers=headers)


def client_error(error: Exception, request_id: str) -> ServingError:
    """Return the error that a client gets for an exception.

    An expected error is passed on as it is. Any other one is replaced by the request's id, unless the server was short
    of a resource: then the client is advised to try again.
    """
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
    """Log the client's error in the program's own words.

    A failure of the server is logged with its stack trace. For a mistake of the client only the place in the code is
    logged, because messages of other exceptions may quote what the client sent. Overload is logged in one line, since
    there may be thousands.
    """
    told, reason = (request_id, error.kind, error.status), own_words_of(error)
    if isinstance(error, Overloaded):
        log.info("request %s: %s (%d): %s", *told, reason)
    elif error.status >= 500 or error.status == 424:
        log.error("request %s: %s (%d): %s", *told, reason, exc_info=error)
    else:
        log.info("request %s: %s (%d) at %s: %s", *told, _places(error), reason)


_MOST_PLACES = 6


def _places(error: BaseException) -> str:
    """Return the innermost frames of the first cause of an exception."""
    while error.__cause__ is not None:
        error = error.__cause__
    return ", ".join(f"{file}:{line} {function}" for file, line, function in raised_at(error)[:_MOST_PLACES])
