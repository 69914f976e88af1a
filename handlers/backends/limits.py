"""What every backend asks of a request once its prompt's length is known, in one set of words."""

from __future__ import annotations

import msgspec

from engine.sampling_params import SamplingParams
from handlers.errors import ContextExceeded, InvalidRequest
from handlers.request import GenerationRequest, TextPrompt

MOST_TOKEN_IDS = 1024
"""Tokens that logit_bias or stop_token_ids may name."""


_CHARACTERS_PER_TOKEN = 32
"""Far more than the tokens of any text have on average."""

_FEWEST = 2**17
"""Where the context is short. While it is tokenised, a character takes about 210 bytes."""


def longest_prompt(max_model_len: int) -> int:
    """Characters of a prompt, or token ids of a client's own, beyond which nothing is done with it.

    A body of 60 MB would take a thread a minute and the process 8 GB to be turned into tokens, all to be told that
    they are too many.
    """
    return max(_FEWEST, _CHARACTERS_PER_TOKEN * max_model_len)


def require_known(request: GenerationRequest, vocab_size: int, image_token_id: int | None = None) -> None:
    """Raises InvalidRequest for token ids of the client's own that the model does not know.

    image_token_id: may lie outside the vocabulary.
    """
    prompt = request.prompt
    if not isinstance(prompt, TextPrompt) or prompt.token_ids is None:
        return
    bad = next((t for t in prompt.token_ids if not 0 <= t < vocab_size and t != image_token_id), None)
    if bad is not None:
        raise InvalidRequest(
            f"the prompt holds the token id {str(bad)[:40]}; this model's are 0 to {vocab_size - 1}",
            param="prompt",
        )


def checked_tokens(
    request: GenerationRequest, token_ids: list[int], max_model_len: int, vocab_size: int
) -> list[int]:
    """The tokens of a prompt without pictures, cut as the request says. Raises as `require_known`.

    What is longer than the context is refused by who counts its tokens (`checked_sampling`), whatever they are.
    """
    if request.truncate_prompt_tokens is None and len(token_ids) >= max_model_len:
        return token_ids
    require_known(request, vocab_size)
    most = request.truncate_prompt_tokens
    if most is None:
        return token_ids
    if most == -1:
        most = max_model_len - (request.sampling.max_tokens or 1)
        # A default leaves the prompt half of the context at least.
        most = max(1, most, max_model_len // 2 if request.max_tokens_is_default else 1)
    return token_ids[:most] if request.truncation_side == "right" else token_ids[-most:]


def checked_sampling(
    request: GenerationRequest, used: int, max_model_len: int, vocab_size: int
) -> SamplingParams:
    """The sampling parameters to use. used: tokens of the prompt, pictures included.

    Raises InvalidRequest for what an engine would have to refuse.
    """
    params = request.sampling
    wanted = params.max_tokens
    if used == 0:
        raise InvalidRequest("the prompt is empty")
    if used >= max_model_len:
        raise ContextExceeded(
            f"the prompt has {used} tokens, pictures included; this model's context is {max_model_len} tokens, "
            "the answer included: shorten the prompt or send fewer pictures",
            prompt_tokens=used,
            max_tokens=None,
            context=max_model_len,
        )
    if wanted is not None and used + wanted > max_model_len:
        if not request.max_tokens_is_default:
            name = request.names.get("max_tokens", "max_tokens")
            raise ContextExceeded(
                f"the prompt has {used} tokens and {name} is {wanted}, together more than this model's context "
                f"of {max_model_len} tokens: ask for at most {max_model_len - used}",
                prompt_tokens=used,
                max_tokens=wanted,
                context=max_model_len,
                param=name,
            )
        params = msgspec.structs.replace(params, max_tokens=max_model_len - used)
    for name, ids in (("logit_bias", params.logit_bias or ()), ("stop_token_ids", params.stop_token_ids)):
        if len(ids) > MOST_TOKEN_IDS:
            raise InvalidRequest(f"{name} names {len(ids)} tokens; allowed: {MOST_TOKEN_IDS}", param=name)
        if (bad := next((t for t in ids if not 0 <= t < vocab_size), None)) is not None:
            raise InvalidRequest(
                f"{name} names a token that is not in the vocabulary: {str(bad)[:40]}", param=name
            )
    for name, ids in (
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("bad_words_token_ids", tuple(token for run in params.bad_words_token_ids for token in run)),
        ("dry_sequence_breaker_ids", params.dry_sequence_breaker_ids),
    ):
        if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
            bad = max(ids) if min(ids) >= 0 else min(ids)
            raise InvalidRequest(
                f"{name} names a token that is not in the vocabulary: {str(bad)[:40]}", param=name
            )
    try:
        params.validate()
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
    return params
