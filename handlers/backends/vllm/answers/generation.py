"""One request in vLLM: its outputs become deltas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any

from engine.errors import NO_TOKEN_LEFT
from handlers.backends.base import Delta, FinishReason, PositionLogprobs, PromptStats, TokenLogprob
from handlers.errors import EngineFailed, InvalidRequest, PicturesLost, ServingError

if TYPE_CHECKING:
    from engine.sampling_params import SamplingParams
    from handlers.prompts.detokenizer import Detokenizer

LOWEST_LOGPROB = -9999.0
"""Stands for a probability of zero, which JSON has no logarithm for; vLLM's own value."""


class VllmGeneration:
    """See `handlers.backends.base.Generation`."""

    def __init__(
        self,
        outputs: AsyncGenerator[Any, None],
        stats: PromptStats,
        params: SamplingParams,
        *,
        texts: list[Detokenizer],
        copies: int,
        constrained: bool,
        eos_token_ids: Sequence[int],
        token_text: Callable[[int], str],
        failure: Callable[[Exception, bool], ServingError],
        ended: Callable[[VllmGeneration], None],
    ) -> None:
        """outputs: vLLM's, each holding what is new. texts: one for each answer that the engine makes; vLLM may hand
        over several tokens at once, and they say what each of them added.
        copies: how often each answer is told: a greedy one is made once for all n. constrained: by a grammar.
        failure: what a client is told of vLLM's exception, and whether an output came before it.
        ended: called once, when nothing runs any more.
        """
        self.stats = stats
        self.started = False
        self._outputs = outputs
        self._params = params
        self._texts = texts
        self._open = set(range(len(texts)))
        self._copies = copies
        self._constrained = constrained
        self._eos = frozenset(eos_token_ids) - frozenset(params.stop_token_ids)
        self._token_text = token_text
        self._failure = failure
        self._ended: Callable[[VllmGeneration], None] | None = ended
        self._first: Any = None

    async def start(self) -> None:
        """Wait for the first output, so that whatever vLLM refuses is raised before any reply has begun."""
        try:
            self._first = await anext(self._outputs)
        except StopAsyncIteration:
            self._end()
            raise EngineFailed("the engine ended the answer before it began") from None
        except Exception as error:
            self._end()
            raise self._failure(error, False) from error
        except BaseException:
            self._end()
            raise
        if self.stats.image_tokens and any(map(_failed_unseen, self._first.outputs)):
            # Its own picture, or another client's that it shares. vLLM has taken note that it must be sent again.
            # Each of several answers misses it by itself; those that have not told yet are aborted.
            await self.aclose()
            raise PicturesLost("the engine has lost a picture of this request; try again")
        self.started = True

    async def __aiter__(self) -> AsyncIterator[Delta]:
        output = self._first
        self._first = None
        try:
            while True:
                await self._note(output)
                for completion in output.outputs:
                    if completion.index in self._open and (completion.token_ids or completion.finish_reason):
                        for delta in self._deltas(completion):
                            yield delta
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

    async def aclose(self) -> None:
        try:
            await self._outputs.aclose()
        except RuntimeError:
            # Somebody waits for the next output at this moment; that somebody's cancellation aborts.
            pass
        finally:
            self._end()

    def _end(self) -> None:
        if self._ended is not None:
            ended, self._ended = self._ended, None
            ended(self)

    async def _note(self, output: Any) -> None:
        if output.num_cached_tokens:
            self.stats.cached_tokens = max(self.stats.cached_tokens, int(output.num_cached_tokens))
        if output.prompt_logprobs is not None and self.stats.prompt_logprobs is None:
            await asyncio.to_thread(self._note_prompt_logprobs, output.prompt_logprobs)

    def _note_prompt_logprobs(self, entries: Sequence[dict[int, Any] | None]) -> None:
        ids = self.stats.prompt_token_ids
        count = self._params.prompt_logprobs or 0
        if ids:
            self.stats.first_token_text = self._token_text(ids[0])
        self.stats.prompt_logprobs = [
            None if not entry else self._position(token, entry, count)
            for token, entry in zip(ids, entries, strict=False)
        ]

    def _deltas(self, completion: Any) -> list[Delta]:
        """One delta, or one for each of `copies` answers that are the same."""
        reason = completion.finish_reason
        if reason == "error" and self._constrained:
            # The grammar did not allow the token, which is chosen from what the grammar allows.
            raise InvalidRequest(NO_TOKEN_LEFT)
        if reason == "error":
            raise EngineFailed("the engine failed on this request")
        token_ids = list(completion.token_ids)
        logprobs = None
        if completion.logprobs is not None:
            count = self._params.logprobs or 0
            logprobs = [
                self._position(token, entry, count)
                for token, entry in zip(token_ids, completion.logprobs, strict=False)
            ]
        stop_reason = completion.stop_reason
        by_token = reason == "stop" and not isinstance(stop_reason, str)
        if stop_reason in self._eos:
            stop_reason = None
        text = self._texts[completion.index]
        pieces = text.pieces(
            token_ids,
            silent=by_token and not self._params.include_stop_str_in_output,
            finished=reason is not None,
        )
        finish: FinishReason | None = None
        if text.stopped_by is not None:
            # vLLM found it too, and has ended the answer.
            finish, stop_reason, by_token = "stop", text.stopped_by, False
        elif reason is not None:
            finish = reason if reason in ("length", "abort") else "stop"
        if finish is not None:
            self._open.discard(completion.index)
        return [
            Delta(
                index=completion.index + copy,
                token_ids=list(token_ids) if copy else token_ids,
                text="".join(pieces),
                pieces=pieces,
                logprobs=logprobs,
                finish_reason=finish,
                stop_reason=stop_reason,
                eos=by_token and stop_reason is None,
            )
            for copy in range(self._copies)
        ]

    def _position(self, token: int, entry: dict[int, Any], count: int) -> PositionLogprobs:
        ranked = sorted(entry.items(), key=lambda item: item[1].rank or 0)
        return PositionLogprobs(
            self._one(token, entry[token]), tuple(self._one(*item) for item in ranked[:count])
        )

    def _one(self, token: int, entry: Any) -> TokenLogprob:
        return TokenLogprob(
            token, self._token_text(token), max(float(entry.logprob), LOWEST_LOGPROB), int(entry.rank or 0)
        )


def _failed_unseen(completion: Any) -> bool:
    """Whether an answer ends by a failure of the engine's, without a token."""
    return completion.finish_reason == "error" and not completion.token_ids
