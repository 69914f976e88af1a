"""Errors of the engine, independent of HTTP."""

from __future__ import annotations

NO_TOKEN_LEFT = "the request's limits on tokens (masks, min_tokens, a grammar) together leave no token to choose"
"""Message for the client when every token is masked."""

_LONGEST_REASON = 400


class EngineError(Exception):
    """Base class of the engine's errors. The message may be shown to an operator, but not to a client."""


class ModelLoadError(EngineError):
    """The model cannot be loaded; the message says why and what to do."""


class FaultyModel(ModelLoadError):
    """The model's files are at fault: on any machine and with any options it cannot be loaded."""


class EngineDead(EngineError):
    """The engine process has ended, and the requests that it held are lost."""


class EngineStopped(EngineDead):
    """The engine was stopped on purpose while it held the request."""


class RequestRejected(EngineError):
    """The request cannot be given to the engine; the message may be shown to the client."""


def one_line(error: BaseException) -> str:
    """Shorten a library's error to one line: some messages fill a page, and some are only a key."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 1] + "…"
    known = isinstance(error, OSError | ValueError | RuntimeError | ImportError) and text
    return text if known else f"{type(error).__name__}: {text}"
