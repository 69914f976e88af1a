"""Lists that vLLM's newer model runner has no room for, which its front takes: there they would end the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any

from handlers.backends.vllm.compat import runner_room
from handlers.backends.vllm.failures import refused
from handlers.errors import InvalidRequest

if TYPE_CHECKING:
    from handlers.backends.vllm.compat import RunnerRoom, Vllm


async def check_room(
    vllm: Vllm, engine: Any, theirs: Any, eos_token_ids: Collection[int], threads: Executor
) -> None:
    """Raise InvalidRequest for parameters that the engine's model runner has no room for.

    theirs: vLLM's SamplingParams. threads: where bad words become tokens.
    """
    if not (theirs.allowed_token_ids or theirs.logit_bias or theirs.min_tokens or theirs.bad_words):
        return
    room = runner_room(engine.vllm_config)
    if room is None:
        return
    check_ids(room, theirs, eos_token_ids)
    if theirs.bad_words:
        await asyncio.get_running_loop().run_in_executor(
            threads, check_bad_words, vllm, room, theirs, engine.get_tokenizer()
        )


def check_ids(room: RunnerRoom, theirs: Any, eos_token_ids: Collection[int]) -> None:
    for name, most in (("allowed_token_ids", room.allowed_token_ids), ("logit_bias", room.logit_bias)):
        count = len(getattr(theirs, name) or ())
        if count > most:
            raise _too_many(name, f"names {count} tokens", most)
    count = len({*theirs.stop_token_ids, *eos_token_ids})
    if theirs.min_tokens and count > room.stop_token_ids:
        raise _too_many(
            "stop_token_ids",
            f"and the model's own ends are {count} tokens",
            f"{room.stop_token_ids} with min_tokens",
        )


def check_bad_words(vllm: Vllm, room: RunnerRoom, theirs: Any, tokenizer: Any) -> None:
    count = len(theirs.bad_words)
    if count > room.bad_words:
        raise _too_many("bad_words", f"holds {count} words", room.bad_words)
    spelled = theirs.clone()
    # The last one comes of a word of spaces alone in vLLM 0.28.
    refusals: tuple[type[Exception], ...] = (*vllm.refusals, IndexError)
    try:
        spelled.update_from_tokenizer(tokenizer)
    except refusals as error:
        raise refused(error, "bad_words") from error
    tokens = sum(map(len, spelled.bad_words_token_ids or ()))
    if tokens > room.bad_word_tokens:
        raise _too_many(
            "bad_words",
            f"are {tokens} tokens, as they begin a text and after a space",
            f"{room.bad_word_tokens} in all",
        )


def _too_many(name: str, what: str, allowed: object) -> InvalidRequest:
    return InvalidRequest(f"{name} {what}; allowed: {allowed}", param=name)
