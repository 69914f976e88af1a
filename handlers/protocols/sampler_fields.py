"""Fields of a body that go to the sampler under their own names: vLLM's, and Aphrodite's beyond them."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from engine.sampling_params import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORDS,
    MAX_BREAKERS,
    MAX_INTEGER,
    MAX_LOGPROBS,
    MAX_STOP_TOKEN_IDS,
    RANGES,
    SAMPLERS,
)
from handlers.errors import InvalidRequest
from handlers.protocols.api import described
from handlers.protocols.base import MAX_ANSWERS, TokenId
from handlers.sampling import RequestSampling

_Texts = Annotated[list[str], Meta(max_length=MAX_BREAKERS)]
_TextsInText = Annotated[str, Meta(max_length=MAX_BREAKERS * 16)]
"""A JSON list in a string, with its brackets or without: so some front ends send it."""

_Sampler = Annotated[str, Meta(max_length=32)] | Annotated[int, Meta(ge=0, le=MAX_INTEGER)]


# Described, not checked here: `RequestSampling.validate` says what is wrong in words that name the bounds.
Temperature = Annotated[float, described(minimum=0, maximum=100)]
TopK = Annotated[int, described(minimum=-1, maximum=MAX_INTEGER)]
Fraction = Annotated[float, described(exclusiveMinimum=0, maximum=1)]
Penalty = Annotated[float, described(minimum=-2, maximum=2)]
RepetitionPenalty = Annotated[float, described(exclusiveMinimum=0, maximum=100)]
MaxTokens = Annotated[int, described(minimum=1, maximum=MAX_INTEGER)]
LogprobsCount = Annotated[int, described(minimum=0, maximum=MAX_LOGPROBS)]
ChoiceCount = Annotated[int, described(minimum=1, maximum=MAX_ANSWERS)]


def _range(name: str) -> Meta:
    least, greatest, _ = RANGES[name]
    return described(minimum=least, maximum=greatest)


class SamplerFields(msgspec.Struct, kw_only=True):
    """What each does: `RequestSampling`. Those of the first block are OpenAI's and vLLM's, the others Aphrodite's."""

    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    temperature: Temperature | None = None
    top_p: Fraction | None = None
    top_k: TopK | None = None
    min_p: Annotated[float, described(minimum=0, maximum=1)] | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: Annotated[int, described(minimum=0, maximum=MAX_INTEGER)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: LogprobsCount | None = None
    allowed_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_ALLOWED_TOKEN_IDS)] | None = None
    bad_words: Annotated[list[str], Meta(max_length=MAX_BAD_WORDS)] | None = None

    typical_p: Fraction | None = None
    top_a: Annotated[float, _range("top_a")] | None = None
    tfs: Fraction | None = None
    eta_cutoff: Annotated[float, _range("eta_cutoff")] | None = None
    epsilon_cutoff: Annotated[float, _range("epsilon_cutoff")] | None = None
    smoothing_factor: Annotated[float, _range("smoothing_factor")] | None = None
    smoothing_curve: Annotated[float, _range("smoothing_curve")] | None = None
    dynatemp_min: Annotated[float, _range("dynatemp_min")] | None = None
    dynatemp_max: Annotated[float, _range("dynatemp_max")] | None = None
    dynatemp_exponent: Annotated[float, _range("dynatemp_exponent")] | None = None
    temperature_last: bool | None = None
    xtc_threshold: Annotated[float, _range("xtc_threshold")] | None = None
    xtc_probability: Annotated[float, _range("xtc_probability")] | None = None
    nsigma: Annotated[float, _range("nsigma")] | None = None
    dry_multiplier: Annotated[float, _range("dry_multiplier")] | None = None
    dry_base: Annotated[float, _range("dry_base")] | None = None
    dry_allowed_length: Annotated[int, _range("dry_allowed_length")] | None = None
    dry_range: Annotated[int, _range("dry_range")] | None = None
    dry_sequence_breakers: _Texts | _TextsInText | None = None
    dry_sequence_breaker_ids: Annotated[list[TokenId], Meta(max_length=MAX_BREAKERS)] | None = None
    mirostat_mode: int | None = None
    mirostat_tau: Annotated[float, _range("mirostat_tau")] | None = None
    mirostat_eta: Annotated[float, _range("mirostat_eta")] | None = None
    no_repeat_ngram_size: Annotated[int, _range("no_repeat_ngram_size")] | None = None
    skew: Annotated[float, _range("skew")] | None = None
    sampler_priority: Annotated[list[_Sampler], Meta(max_length=len(SAMPLERS))] | None = None
    custom_token_bans: Annotated[list[TokenId], Meta(max_length=MAX_BAD_WORDS)] | None = None

    dry_penalty_last_n: int | None = None
    dynatemp_low: float | None = None
    dynatemp_high: float | None = None


_ALIASES = {
    "dry_penalty_last_n": "dry_range",
    "dynatemp_low": "dynatemp_min",
    "dynatemp_high": "dynatemp_max",
    "custom_token_bans": "bad_words_token_ids",
}
_NAMES = tuple(
    name for name in SamplerFields.__struct_fields__ if name in set(RequestSampling.__struct_fields__)
)


def sampler_values(asked: SamplerFields) -> dict[str, Any]:
    """Fields of RequestSampling, None for what was not given. Raises InvalidRequest."""
    values: dict[str, Any] = {}
    for name in _NAMES:
        value = getattr(asked, name)
        values[name] = tuple(value) if isinstance(value, list) else value
    if asked.allowed_token_ids is not None:
        # Once for each: repeated a million times, it would be copied for every answer.
        values["allowed_token_ids"] = tuple(dict.fromkeys(asked.allowed_token_ids))
    if isinstance(asked.dry_sequence_breakers, str):
        values["dry_sequence_breakers"] = _texts(asked.dry_sequence_breakers)
    for alias, name in _ALIASES.items():
        if values.get(name) is None:
            values[name] = getattr(asked, alias)
    if asked.custom_token_bans is not None:
        values["bad_words_token_ids"] = tuple((token,) for token in asked.custom_token_bans)
    return values


def sampler_names(asked: SamplerFields) -> dict[str, str]:
    """What the client calls a field of RequestSampling where it used an alias."""
    return {
        name: alias
        for alias, name in _ALIASES.items()
        if getattr(asked, alias) is not None and getattr(asked, name, None) is None
    }


def _texts(text: str) -> tuple[str, ...]:
    try:
        found = msgspec.json.decode(text if text.lstrip().startswith("[") else f"[{text}]", type=_Texts)
    except msgspec.MsgspecError:
        raise InvalidRequest(
            "dry_sequence_breakers: send a list of texts", param="dry_sequence_breakers"
        ) from None
    return tuple(found)
