"""A request's tokens and sampling parameters, checked against the model's vocabulary and context.

What would be refused in any case is refused here, before the request's images cost anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from engine.sampling_params import MAX_BAD_WORD_TOKENS
from handlers.errors import ContextExceeded, InvalidParameter, InvalidRequest
from handlers.request import MOST_TOKEN_IDS, GenerationRequest, RequestSampling, TextPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DRY_BREAKERS = ("\n", ":", '"', "*")
"""DRY's own sequence breakers, for requests that name none."""

MANY_CHARACTERS = 2000
"""Bad words and sequence breakers of more characters together are tokenised in a thread, not on the event loop."""

_CHARACTERS_PER_TOKEN = 32
"""Far more than the tokens of any text have on average."""

_FEWEST = 2**17
"""The limit for models with a short context. While a prompt is tokenised, each character takes about 210 bytes."""


def longest_prompt(max_model_len: int) -> int:
    """Return the number of characters, or of a client's own token ids, beyond which a prompt is not processed.

    Tokenising a body of 60 MB would take a thread a minute and the process 8 GB, only to find that the tokens are too
    many.
    """
    return max(_FEWEST, _CHARACTERS_PER_TOKEN * max_model_len)


def check_images(count: int, most: int, limit: str, *, accepted: bool) -> None:
    """Raise InvalidRequest if a prompt may not have so many images.

    Args:
        count: How many it has.
        most: How many option.limit_mm_per_prompt allows.
        limit: The words for that, for whoever sent the prompt.
        accepted: Whether the model takes images at all.
    """
    if count and not accepted:
        raise InvalidRequest("this model does not take images")
    if count > most:
        raise InvalidRequest(f"the prompt holds {count} images; {limit}")


def require_known(request: GenerationRequest, vocab_size: int, image_token_id: int | None = None) -> None:
    """Raise InvalidRequest for token ids from the client that the model does not know.

    image_token_id may lie outside the vocabulary.
    """
    prompt = request.prompt
    if not isinstance(prompt, TextPrompt) or prompt.token_ids is None:
        return
    bad = next((t for t in prompt.token_ids if not 0 <= t < vocab_size and t != image_token_id), None)
    if bad is not None:
        raise InvalidRequest(
            f"the prompt holds the token id {str(bad)[:40]}; this model's are 0 to {vocab_size - 1}", param="prompt"
        )


def checked_tokens(request: GenerationRequest, token_ids: list[int], max_model_len: int, vocab_size: int) -> list[int]:
    """Return the tokens of a prompt without images, truncated as the request says. Raises as `require_known`.

    A prompt that is longer than the context is returned as it is: `checked_sampling` refuses it.
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


def fitting_max_tokens(
    request: GenerationRequest, used: int, max_model_len: int, *, images_follow: bool = False
) -> int | None:
    """Return the `max_tokens` with which an answer fits behind the `used` tokens of its prompt.

    images_follow: the tokens of images are still to be counted, so that a long answer is refused only then. Raises
    InvalidRequest if the prompt is empty, or if it, the answer or `min_tokens` does not fit.
    """
    wanted, least, room = request.sampling.max_tokens, request.sampling.min_tokens, max_model_len - used
    if used == 0:
        raise InvalidRequest("the prompt is empty")
    if room <= 0:
        raise ContextExceeded(prompt_tokens=used, max_tokens=None, context=max_model_len)
    if not images_follow:
        if wanted is not None and wanted > room and not request.max_tokens_is_default:
            raise ContextExceeded(prompt_tokens=used, max_tokens=wanted, context=max_model_len)
        if least > room:
            raise InvalidParameter("min_tokens", f"is {least}; the context has room for {room} tokens after the prompt")
    return None if wanted is None else min(wanted, room)


def checked_sampling(
    request: GenerationRequest, used: int, max_model_len: int, vocab_size: int, *, images_follow: bool = False
) -> RequestSampling:
    """Return the sampling parameters to use. The arguments are those of `fitting_max_tokens`.

    Raises:
        InvalidRequest: The engine would have to refuse them.
    """
    params = request.sampling
    most = fitting_max_tokens(request, used, max_model_len, images_follow=images_follow)
    if most != params.max_tokens:
        params = msgspec.structs.replace(params, max_tokens=most)
    for name, ids in (("logit_bias", params.logit_bias or ()), ("stop_token_ids", params.stop_token_ids)):
        if len(ids) > MOST_TOKEN_IDS:
            raise InvalidParameter(name, f"names {len(ids)} tokens; allowed: {MOST_TOKEN_IDS}")
        if (bad := next((t for t in ids if not 0 <= t < vocab_size), None)) is not None:
            raise InvalidParameter(name, f"names a token that is not in the vocabulary: {str(bad)[:40]}")
    for name, ids in (
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("bad_words_token_ids", tuple(token for run in params.bad_words_token_ids for token in run)),
        ("dry_sequence_breaker_ids", params.dry_sequence_breaker_ids),
    ):
        if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
            bad = max(ids) if min(ids) >= 0 else min(ids)
            raise InvalidParameter(name, f"names a token that is not in the vocabulary: {str(bad)[:40]}")
    try:
        params.validate()
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
    return params


def has_many_words(params: RequestSampling) -> bool:
    """Whether `tokenise_words` may take long, so that it should run in a thread."""
    return sum(map(len, (*params.bad_words, *(params.dry_sequence_breakers or ())))) > MANY_CHARACTERS


def tokenise_words(
    params: RequestSampling, tokenizer: PreTrainedTokenizerFast, *, words: bool = True
) -> RequestSampling:
    """Return the parameters with token ids instead of the words; unchanged if there are none. words: also bad_words.

    A bad word is matched as it is tokenised at the beginning of a text and after a space (as in vLLM), a breaker by
    the last token that it ends with inside a text (as DRY's author does).

    Raises:
        InvalidRequest: There are too many words, or they are too long.
    """
    if params.bad_words and words:
        runs = dict.fromkeys(params.bad_words_token_ids)
        for word in params.bad_words:
            for spelling in (word.lstrip(), f" {word.lstrip()}"):
                if run := tuple(_encode(tokenizer, spelling)):
                    runs[run] = None
        if (total := sum(map(len, runs))) > MAX_BAD_WORD_TOKENS:
            raise InvalidParameter(
                "bad_words",
                f"are {total} tokens, as they begin a text and after a space; allowed: {MAX_BAD_WORD_TOKENS} in all",
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
