"""Words of a request that samplers follow by token: what must not be said, and where DRY stops looking."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from engine.sampling_params import MAX_BAD_WORD_TOKENS, SamplingParams
from handlers.errors import InvalidRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DRY_BREAKERS = ("\n", ":", '"', "*")
"""DRY's own sequence breakers, for requests that name none."""

MANY_CHARACTERS = 2000
"""Of words: more are tokenised in a thread, not on the event loop."""


def count_characters(params: SamplingParams) -> int:
    return sum(map(len, params.bad_words)) + sum(map(len, params.dry_sequence_breakers or ()))


def spelled(params: SamplingParams, tokenizer: PreTrainedTokenizerFast) -> SamplingParams:
    """The same with ids instead of the words; itself where there are none.

    A bad word is followed as it is tokenised at a text's beginning and after a space (as vLLM does), a breaker by
    the last token that it ends with inside a text (as DRY's author does). Raises InvalidRequest.
    """
    if params.bad_words:
        runs = dict.fromkeys(params.bad_words_token_ids)
        for word in params.bad_words:
            for spelling in (word.lstrip(), f" {word.lstrip()}"):
                if run := tuple(_encode(tokenizer, spelling)):
                    runs[run] = None
        if (total := sum(map(len, runs))) > MAX_BAD_WORD_TOKENS:
            raise InvalidRequest(
                f"bad_words are {total} tokens, as they begin a text and after a space; allowed: "
                f"{MAX_BAD_WORD_TOKENS} in all",
                param="bad_words",
            )
        params = msgspec.structs.replace(params, bad_words=(), bad_words_token_ids=tuple(runs))
    texts = params.dry_sequence_breakers
    if params.dry_multiplier > 0.0 and (texts or (texts is None and not params.dry_sequence_breaker_ids)):
        ends = [_encode(tokenizer, f"a{text}")[-1:] for text in (DRY_BREAKERS if texts is None else texts)]
        ids = {*params.dry_sequence_breaker_ids, *(token for end in ends for token in end)}
        params = msgspec.structs.replace(
            params, dry_sequence_breakers=None, dry_sequence_breaker_ids=tuple(sorted(ids))
        )
    return params


def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
