"""What clients and the log learn about errors; each API writes them in its own format.

Messages quote what clients sent: a role, a tool's name, what a chat template says of a turn. So before a message is
logged, everything in quotes and the text of libraries' exceptions are removed; of the rest, only short numbers and
words that this program's own code contains remain (`own_words_of`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import traceback
from collections.abc import Iterator
from functools import cache
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType

import msgspec

from handlers.errors import Overloaded, ServingError, Unavailable, raised_at, short_of, stopping
from handlers.protocols.base import JSON, ErrorFormat
from handlers.request import Reply
from processes.shortage import shortage

log = logging.getLogger(__name__)


def error_reply(error: ServingError, written: ErrorFormat) -> Reply:
    """Return the reply to a request that failed before its reply began."""
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    return Reply(written.status(error), JSON, msgspec.json.encode(written.body(error)), headers=headers)


def client_error(error: Exception | asyncio.CancelledError, request_id: str) -> ServingError:
    """Return the error that a client gets for an exception.

    An expected error is passed on as it is. Any other one is replaced by the request's id, unless the server was short
    of a resource: then the client is advised to try again. Whatever a request awaits is cancelled only when the server
    stops.
    """
    if isinstance(error, ServingError):
        return error
    if isinstance(error, asyncio.CancelledError):
        return stopping(error)
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


_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("container", "engine", "handlers", "processes", "properties")
_OF_LIBRARIES = frozenset({"expected", "got", "array", "length", "matching", "regex", "json"})
"""Words of msgspec's, whose messages are passed on."""

_QUOTED = re.compile(r"(?<!\w)(?:'(?:[^'\\]|\\.)*(?:'|$)|\"(?:[^\"\\]|\\.)*(?:\"|$))", re.DOTALL)
_WORD = re.compile(r"[^\W\d]\w*")
_LONGEST_NUMBER = 10
_CUT = "…"
_LONGEST = 1000
_RECOGNISED = 20
"""The number of characters by which another exception's text is recognised in a message."""


def own_words_of(error: ServingError) -> str:
    """Return the error's message with `…` for everything that is not the program's own."""
    if isinstance(error, Unavailable):
        return error.message  # says how the server is, nothing of the client's; and is the first while it loads
    message = _without_libraries(error.message[:_LONGEST], error)
    words = _QUOTED.sub(_CUT, message).split()
    return " ".join(word if _is_own(word) else _CUT + word[-1] * (word[-1] in ",;:.") for word in words)


@cache
def own_words() -> frozenset[str]:
    """Return every word in a string of the program's code, docstrings excepted. The first call takes a moment."""
    words = set(_OF_LIBRARIES)
    for package in _PACKAGES:
        for path in (_ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(_ROOT).with_suffix("").parts)
            for text in _texts(SourceFileLoader(name, str(path)).get_code(name)):
                words.update(word.casefold() for word in _WORD.findall(text))
    return frozenset(words)


def _without_libraries(message: str, error: BaseException) -> str:
    """Cut off the message where the text of an exception from a library begins.

    jinja's messages, for example, hold what a template makes of a conversation.
    """
    cause = error.__cause__
    while cause is not None:
        said = str(cause)[:_RECOGNISED]
        if said and not _raised_here(cause) and said in message:
            message = message[: message.index(said)] + _CUT
        cause = cause.__cause__
    return message


def _raised_here(error: BaseException) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not frames:
        return False
    file = Path(frames[-1].f_code.co_filename)
    # not in the folder that holds the packages: an environment with the libraries may lie in it
    return any(file.is_relative_to(_ROOT / package) for package in _PACKAGES)


def _is_own(word: str) -> bool:
    if any(len(digits) > _LONGEST_NUMBER for digits in re.findall(r"\d+", word)):
        return False
    return all(part.casefold() in own_words() for part in _WORD.findall(word))


def _texts(code: CodeType | None) -> Iterator[str]:
    """Yield the string constants of a module, function or class, and of everything in it."""
    if code is None:
        return
    has_docstring = 1 if "__qualname__" in code.co_names else 0  # in a class, its name comes first
    for index, constant in enumerate(code.co_consts):
        if isinstance(constant, CodeType):
            yield from _texts(constant)
        elif isinstance(constant, tuple | frozenset):
            yield from (item for item in constant if isinstance(item, str))
        elif isinstance(constant, str) and index != has_docstring:
            yield constant
