"""What can go wrong in the engine, in terms that do not know HTTP."""

from __future__ import annotations

NO_TOKEN_LEFT = (
    "the request's limits on tokens (masks, min_tokens, a grammar) together leave no token to choose"
)
"""For the client, of an answer that cannot go on."""

_LONGEST_REASON = 400


class EngineError(Exception):
    """Root of the engine's errors. The message may be shown to an operator, not to a client."""


class ModelLoadError(EngineError):
    """The model cannot be loaded; the message says which fact stands against it and what to do."""


class EngineDead(EngineError):
    """The engine process is gone; the requests it held are lost."""


class EngineStopped(EngineDead):
    """The engine was asked to stop, in good order, while it held the request."""


class RequestRejected(EngineError):
    """This request cannot be handed to the engine; the message may be shown to the client."""


def one_line(error: BaseException) -> str:
    """What a library says of its failure, in one line: some write a page, and some only a key."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 1] + "…"
    known = isinstance(error, OSError | ValueError | RuntimeError | ImportError) and text
    return text if known else f"{type(error).__name__}: {text}"
