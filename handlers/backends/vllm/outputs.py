"""vLLM's outputs and exceptions, as the tokens and errors that the pipeline and the operator read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engine.errors import NO_TOKEN_LEFT
from engine.messages import Logprobs
from handlers.backends.base import EngineRequest, TokenOutput, engine_died
from handlers.errors import EngineFailed, ImagesLost, InvalidRequest, Overloaded, ServingError

if TYPE_CHECKING:
    from handlers.backends.vllm.compat import Vllm

_LONGEST_REASON = 300
_LONGEST_CONFIGURATION_REASON = 600
_ELSEWHERE = "Engine core initialization failed"
"""vLLM's message when the engine's process has logged the reason, but the front end does not know it."""


class VllmStream:
    """See `handlers.backends.base.TokenStream`.

    Attributes:
        started: Whether the first output has arrived.
    """

    def __init__(
        self,
        outputs: AsyncGenerator[Any, None],
        request: EngineRequest,
        *,
        images: bool,
        eos_token_ids: Sequence[int],
        failure: Callable[[Exception, bool], ServingError],
        ended: Callable[[VllmStream], None],
    ) -> None:
        """Prepare to read a request's outputs; `start` waits for the first.

        Args:
            outputs: vLLM's, each with what is new.
            request: What was asked for.
            images: Whether its prompt has any.
            eos_token_ids: The model's own.
            failure: Makes the client's error of vLLM's exception, and of whether an output came before it.
            ended: Called once, when nothing runs any more.
        """
        self.started = False
        self._outputs = outputs
        self._params = request.params
        self._open = set(range(request.n))
        self._images = images
        self._constrained = request.constraint is not None
        self._eos = frozenset(eos_token_ids) - frozenset(request.params.stop_token_ids)
        self._failure = failure
        self._ended: Callable[[VllmStream], None] | None = ended
        self._first: Any = None

    async def start(self) -> None:
        """Wait for the first output, so that every refusal is raised before a reply has begun."""
        try:
            self._first = await anext(self._outputs)
        except BaseException as error:
            self._end()
            if isinstance(error, StopAsyncIteration):
                raise EngineFailed("the engine ended the answer before it began") from None
            if isinstance(error, Exception):
                raise self._failure(error, False) from error
            raise
        if self._images and any(one.finish_reason == "error" and not one.token_ids for one in self._first.outputs):
            # vLLM knows now that the image must be sent again. Each of several choices reports this separately; those
            # that have not reported it yet are aborted.
            await self.aclose()
            raise ImagesLost("the engine has lost an image of this request; try again")
        self.started = True

    async def __aiter__(self) -> AsyncIterator[TokenOutput]:
        output, self._first = self._first, None
        entries: list[Logprobs | None] | None = None
        try:
            while True:
                if output.prompt_logprobs is not None and entries is None:
                    ids, count = output.prompt_token_ids, self._params.prompt_logprobs or 0
                    entries = await asyncio.to_thread(_read_all, ids, output.prompt_logprobs, count)
                for completion in output.outputs:
                    if completion.index in self._open and (completion.token_ids or completion.finish_reason):
                        made = self._read(completion)
                        made.cached_tokens, made.prompt_logprobs = int(output.num_cached_tokens or 0), entries
                        yield made
                if output.finished:
                    return
                if not self._open:
                    await self._outputs.aclose()
                    return
                output = await anext(self._outputs)
        except (ServingError, GeneratorExit):
            raise
        except StopAsyncIteration:
            return
        except Exception as error:
            raise self._failure(error, True) from error
        finally:
            self._end()

    def abort(self, index: int) -> None:
        """See `TokenStream`. vLLM continues a choice until it finds the stop string itself, or until all have ended."""
        self._open.discard(index)

    async def aclose(self) -> None:
        try:
            await self._outputs.aclose()
        except RuntimeError:
            pass  # Another task is waiting for the next output; its cancellation aborts the request.
        finally:
            self._end()

    def _end(self) -> None:
        ended, self._ended = self._ended, None
        if ended is not None:
            ended(self)

    def _read(self, completion: Any) -> TokenOutput:
        reason, stop_reason = completion.finish_reason, completion.stop_reason
        if reason == "error" and self._constrained:  # its grammar has refused the token
            raise InvalidRequest(NO_TOKEN_LEFT)
        if reason == "error":
            raise EngineFailed("the engine failed on this request")
        if reason is not None:
            self._open.discard(completion.index)
        token_ids, entries = list(completion.token_ids), completion.logprobs
        by_text = isinstance(stop_reason, str)
        return TokenOutput(
            completion.index,
            token_ids,
            finish=reason if reason in (None, "length", "abort") else "stop",
            logprobs=None if entries is None else _read_all(token_ids, entries, self._params.logprobs or 0),
            stop_token=None if by_text or stop_reason in self._eos else stop_reason,
            by_token=reason == "stop" and not by_text,
        )


def _read_all(token_ids: Sequence[int], entries: Sequence[Any], count: int) -> list[Any]:
    """Return for each position its token and the `count` most likely ones; None where vLLM has nothing."""
    return [_position(token, entry, count) if entry else None for token, entry in zip(token_ids, entries, strict=False)]


def _position(token: int, entry: dict[int, Any], count: int) -> Logprobs:
    ranked = sorted(entry.items(), key=lambda item: item[1].rank or 0)
    ids, found = zip((token, entry[token]), *ranked[:count], strict=True)
    return Logprobs(list(ids), [float(one.logprob) for one in found], [int(one.rank or 0) for one in found])


def failed(vllm: Vllm, engine: Any, error: Exception, param: str | None = None, *, begun: bool = False) -> ServingError:
    """Return the client's error for a request that ended with an exception of vLLM's.

    Args:
        vllm: The imported names.
        engine: The one that had the request.
        error: vLLM's exception.
        param: The client's field, if a refusal names none.
        begun: Whether an output came before it. A later failure is not a refusal, whatever its type: vLLM passes a
            failure of its own loop to all requests, which may also be before their first output.
    """
    if isinstance(error, vllm.EngineDeadError):
        return engine_died()
    if not (begun or engine.errored):
        if isinstance(error, vllm.GracefulHTTPError):
            return Overloaded("the engine's queue is full; try again later", retry_after=1)
        cause = error.__cause__ if isinstance(error, vllm.EngineGenerateError) else None
        cause = error if isinstance(error, vllm.VLLMClientError) else cause
        if isinstance(cause, vllm.refusals):
            return refused(cause, param)
    return EngineFailed("the engine failed on this request")


def refused(error: BaseException, param: str | None = None) -> InvalidRequest:
    """Return vLLM's refusal of a request as ours: its first line. param: the client's field, if vLLM names none."""
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
        return (
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
