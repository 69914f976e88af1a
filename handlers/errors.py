"""The tree of all errors that are reported to clients.

An error is raised where the fact is known and turned into a reply in one place per API. `message` is for the client: it
says what was wrong, with which value and what to do, and never contains a path, a secret, a prompt or a stack trace.
What only the operator may know is in `__cause__`, and so in the log.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from pathlib import Path


class ServingError(Exception):
    """Root of the tree. `status` is the HTTP status code, `kind` the label used in replies and metrics."""

    status = 500
    kind = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        """param: the request's field at fault. retry_after: seconds, sent as `Retry-After`."""
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def __str__(self) -> str:
        return self.message


class InvalidRequest(ServingError):
    """The request asks for something impossible: a bad value, too long a prompt, too many images."""

    status = 400
    kind = "invalid_request"

    def rename(self, names: Mapping[str, str]) -> None:
        """Use the client's name for the field at fault. names: the client's names by the fields of `SamplingParams`."""
        if self.param is not None:
            self.param = names.get(self.param, self.param)


class InvalidParameter(InvalidRequest):
    """A field has a value that cannot be used; the message begins with the field's name.

    Where a sampling parameter is checked, that is its name in `SamplingParams`, until `rename`. problem: the part of
    the message after the name.
    """

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{name} {problem}", param=name)
        self.problem = problem

    def rename(self, names: Mapping[str, str]) -> None:
        super().rename(names)
        self.message = f"{self.param} {self.problem}"


class ContextExceeded(InvalidRequest):
    """Prompt and answer together do not fit into the model's context.

    prompt_tokens: images included. max_tokens: as the client asked, None for a prompt that leaves no space at all.
    context: tokens of prompt and answer that the model takes.
    """

    def __init__(self, *, prompt_tokens: int, max_tokens: int | None, context: int) -> None:
        super().__init__("", param=None if max_tokens is None else "max_tokens")
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.context = context
        self._write()

    def rename(self, names: Mapping[str, str]) -> None:
        super().rename(names)
        self._write()

    def _write(self) -> None:
        if self.max_tokens is None:
            self.message = (
                f"the prompt has {self.prompt_tokens} tokens, images included; this model's context is "
                f"{self.context} tokens, the answer included: shorten the prompt or send fewer images"
            )
        else:
            self.message = (
                f"the prompt has {self.prompt_tokens} tokens and {self.param} is {self.max_tokens}, together more "
                f"than this model's context of {self.context} tokens: ask for at most "
                f"{self.context - self.prompt_tokens}"
            )


class MalformedBody(InvalidRequest):
    """The body is not a JSON object."""


class ImageError(InvalidRequest):
    """An image cannot be used. `index` counts the request's images from 0, in reading order."""

    kind = "invalid_image"

    def __init__(self, index: int, reason: str, *, param: str | None = None) -> None:
        super().__init__(f"image {index}: {reason}", param=param)
        self.index = index


class ImageFetchFailed(ImageError):
    """The image's own host answered with an error or not at all: the request is well formed, its link does not work."""

    status = 422
    kind = "image_fetch_failed"


class ImageFetchTimeout(ImageError):
    """The image did not arrive before the deadline."""

    status = 408
    kind = "image_fetch_timeout"


class ImageTooLarge(ImageError):
    """The image has more bytes or pixels than the operator allows."""

    status = 413
    kind = "image_too_large"


class NotFound(ServingError):
    """There is no such model, adapter or route."""

    status = 404
    kind = "not_found"


class DeadlineExceeded(ServingError):
    """The request's own deadline (`option.predict_timeout`) passed."""

    status = 408
    kind = "deadline_exceeded"

    def __init__(self, message: str = "the request's time (option.predict_timeout) is up") -> None:
        super().__init__(message)


class PayloadTooLarge(ServingError):
    """The body is larger than `option.max_request_size`."""

    status = 413
    kind = "payload_too_large"


class UnsupportedMediaType(ServingError):
    """The body is not of a content type that this route reads."""

    status = 415
    kind = "unsupported_media_type"


class Conflict(ServingError):
    """The name is taken."""

    status = 409
    kind = "conflict"


class CustomCodeError(ServingError):
    """The user's own model.py raised."""

    status = 424
    kind = "custom_code_error"


class Overloaded(ServingError):
    """The queue is full: try again later, elsewhere or with less."""

    status = 429
    kind = "overloaded"


class Unavailable(ServingError):
    """The engine is loading, draining, restarting or dead."""

    status = 503
    kind = "unavailable"


class EngineFailed(ServingError):
    """The engine failed on this request, or died while it held it."""

    status = 500
    kind = "engine_failed"


class ImagesLost(EngineFailed):
    """The engine dropped an image that it was assumed to hold: with its images sent again, the request succeeds."""


class InsufficientStorage(ServingError):
    """There is no space left for what is to be loaded."""

    status = 507
    kind = "insufficient_storage"


class InvalidConfiguration(ServingError):
    """The model cannot be served with these options; raised at the start, never to a client."""

    kind = "invalid_configuration"


RETRY_AFTER = 1.0
"""Seconds after which a request that found the queue full may be sent again."""


def overloaded(problem: str = "too many requests are waiting") -> Overloaded:
    """Return the refusal for a request that finds the queue full, or too many connections."""
    return Overloaded(f"{problem}: try again later", retry_after=RETRY_AFTER)


def short_of(what: str) -> Unavailable:
    """Return the error for a request that failed because the server ran out of something (see `shortage`)."""
    return Unavailable(f"the server is short of {what}; try again", retry_after=5)


def stopping(cause: BaseException | None = None) -> Unavailable:
    """Return the error for a request that the server, which is ending, cannot answer any more."""
    error = Unavailable("the server is stopping; send the request again", retry_after=5)
    error.__cause__ = cause
    return error


def raised_at(error: BaseException) -> list[tuple[str, int, str]]:
    """Return (file name, line, function) of each frame that an exception passed through, innermost first.

    It reads no source files, so it may be called on the event loop, and it contains no message, which may quote a
    client.
    """
    frames = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    return [(Path(code.co_filename).name, line, code.co_name) for code, line in reversed(frames)]
