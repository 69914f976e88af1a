"""Lists that vLLM's front takes and that are too long for its newer model runner, where they would end the engine.

So in 0.32 still. The number of bad words is counted by its front.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any

from handlers.backends.vllm.compat import runner_limits
from handlers.backends.vllm.failures import refused
from handlers.errors import InvalidParameter

if TYPE_CHECKING:
    from handlers.backends.vllm.compat import RunnerLimits, Vllm


async def check_runner_limits(
    vllm: Vllm, engine: Any, theirs: Any, eos_token_ids: Collection[int], threads: Executor
) -> None:
    """Raise InvalidRequest for parameters that the engine's model runner cannot hold.

    theirs: vLLM's SamplingParams. threads: where bad words become tokens.
    """
    if not (theirs.allowed_token_ids or theirs.logit_bias or theirs.min_tokens or theirs.bad_words):
        return
    limits = runner_limits(engine.vllm_config)
    if limits is None:
        return
    check_ids(limits, theirs, eos_token_ids)
    if theirs.bad_words:
        await asyncio.get_running_loop().run_in_executor(
            threads, check_bad_words, vllm, limits, theirs, engine.get_tokenizer()
        )


def check_ids(limits: RunnerLimits, theirs: Any, eos_token_ids: Collection[int]) -> None:
    """Raise InvalidParameter if a request names more token ids than the runner has slots for."""
    for name, most in (("allowed_token_ids", limits.allowed_token_ids), ("logit_bias", limits.logit_bias)):
        count = len(getattr(theirs, name) or ())
        if count > most:
            raise InvalidParameter(name, f"names {count} tokens; allowed: {most}")
    count, most = len({*theirs.stop_token_ids, *eos_token_ids}), limits.stop_token_ids
    if theirs.min_tokens and count > most:
        raise InvalidParameter(
            "stop_token_ids",
            f"and the model's own ends are {count} tokens; allowed: {most} with min_tokens",
        )


def check_bad_words(vllm: Vllm, limits: RunnerLimits, theirs: Any, tokenizer: Any) -> None:
    """Raise InvalidParameter if the bad words are more tokens than the runner has slots for."""
    spelled = theirs.clone()
    try:
        spelled.update_from_tokenizer(tokenizer)
    except vllm.refusals as error:
        raise refused(error, "bad_words") from error
    count, most = sum(map(len, spelled.bad_words_token_ids or ())), limits.bad_word_tokens
    if count > most:
        raise InvalidParameter(
            "bad_words", f"are {count} tokens, as they begin a text and after a space; allowed: {most} in all"
        )
