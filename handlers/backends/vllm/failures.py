"""vLLM's exceptions as ours: what a client and an operator are told of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from handlers.errors import EngineFailed, InvalidRequest, Overloaded, ServingError

if TYPE_CHECKING:
    from handlers.backends.vllm.compat import Vllm

_LONGEST_REASON = 300
_LONGEST_CONFIGURATION_REASON = 600
_ELSEWHERE = "Engine core initialization failed"
"""vLLM's words where the engine's process knows why, and has logged it, and the front does not."""


def failed(vllm: Vllm, error: Exception, param: str | None = None, *, accepted: bool = False) -> ServingError:
    """What a client is told when its request ended with an exception of vLLM's.

    param: the client's field, where a refusal names none. accepted: whether the engine had the request. What fails
    then is no refusal of it, whatever its type: vLLM tells a failure of its own loop to all requests.
    """
    if isinstance(error, vllm.EngineDeadError):
        return EngineFailed("the engine process died while it worked on this request; try again")
    if accepted:
        return EngineFailed("the engine failed on this request")
    if isinstance(error, vllm.busy_errors):
        return Overloaded("the engine's queue is full; try again later", retry_after=1)
    cause = error.__cause__
    if isinstance(error, vllm.client_errors):
        cause = error
    wrapped = isinstance(error, vllm.EngineGenerateError | vllm.client_errors[0])
    if wrapped and cause is not None and isinstance(cause, vllm.refusals):
        return refused(cause, param)
    return EngineFailed("the engine failed on this request")


def refused(error: BaseException, param: str | None = None) -> InvalidRequest:
    """vLLM's own refusal of a request as ours: its first line, without names of its internals.

    param: the client's field, where vLLM does not name one.
    """
    lines = (str(getattr(error, "message", "")) or str(error.args[0] if error.args else "")).splitlines()
    reason = lines[0][:_LONGEST_REASON].rstrip(". ") if lines else type(error).__name__
    return InvalidRequest(
        f"the engine refuses this request: {reason}", param=getattr(error, "parameter", None) or param
    )


def refusal_reason(error: BaseException) -> str:
    """Why vLLM refuses a configuration, on one line."""
    listed = getattr(error, "errors", None)
    if callable(listed):
        try:
            return "; ".join(
                str(item["msg"]).removeprefix("Value error, ") for item in listed(include_url=False)
            )[:_LONGEST_CONFIGURATION_REASON]
        except (TypeError, KeyError):
            pass
    text = " ".join(str(error).split()) or type(error).__name__
    if _ELSEWHERE in text:
        text = (
            "its engine's processes did not start; the reason is in the log above, in the last lines that begin with "
            "(Worker or (EngineCore"
        )
    return text[:_LONGEST_CONFIGURATION_REASON]
