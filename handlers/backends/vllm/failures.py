"""Converts vLLM's exceptions to ours, with messages for clients and operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from handlers.errors import EngineFailed, InvalidRequest, Overloaded, ServingError

if TYPE_CHECKING:
    from handlers.backends.vllm.compat import Vllm

_LONGEST_REASON = 300
_LONGEST_CONFIGURATION_REASON = 600
_ELSEWHERE = "Engine core initialization failed"
"""vLLM's message when the engine's process has logged the reason, but the front end does not know it."""


def failed(vllm: Vllm, error: Exception, param: str | None = None, *, accepted: bool = False) -> ServingError:
    """Return the client's error for a request that ended with an exception of vLLM's.

    Args:
        vllm: The imported names.
        error: vLLM's exception.
        param: The client's field, if a refusal names none.
        accepted: Whether the engine had accepted the request. A later failure is not a refusal, whatever its type: vLLM
            passes a failure of its own loop to all requests.
    """
    if isinstance(error, vllm.EngineDeadError):
        return EngineFailed("the engine process died while it worked on this request; try again")
    if isinstance(error, vllm.GracefulHTTPError) and not accepted:
        return Overloaded("the engine's queue is full; try again later", retry_after=1)
    cause = error.__cause__ if isinstance(error, vllm.EngineGenerateError) else None
    if isinstance(error, vllm.VLLMClientError):
        cause = error
    if isinstance(cause, vllm.refusals) and not accepted:
        return refused(cause, param)
    return EngineFailed("the engine failed on this request")


def refused(error: BaseException, param: str | None = None) -> InvalidRequest:
    """Return vLLM's refusal of a request as ours: its first line, without internal names.

    Args:
        error: vLLM's exception.
        param: The client's field, if vLLM does not name one.
    """
    lines = (str(getattr(error, "message", "")) or str(error.args[0] if error.args else "")).splitlines()
    reason = lines[0][:_LONGEST_REASON].rstrip(". ") if lines else type(error).__name__
    return InvalidRequest(
        f"the engine refuses this request: {reason}", param=getattr(error, "parameter", None) or param
    )


def refusal_reason(error: BaseException) -> str:
    """Return why vLLM refuses a configuration, on one line."""
    if found := wrong_fields(error):
        text = "; ".join(str(item["msg"]).removeprefix("Value error, ") for item in found)
    else:
        text = " ".join(str(error).split()) or type(error).__name__
    if _ELSEWHERE in text:
        text = (
            "its engine's processes did not start; the reason is in the log above, in the last lines that begin with "
            "(Worker or (EngineCore"
        )
    return text[:_LONGEST_CONFIGURATION_REASON]


def wrong_fields(error: BaseException | None) -> Sequence[Mapping[str, Any]]:
    """Return pydantic's description of each wrong field: `loc`, its path, and `msg`. Empty for other exceptions."""
    listed = getattr(error, "errors", None)
    try:
        return listed(include_url=False, include_input=False) if callable(listed) else ()
    except TypeError:
        return ()
