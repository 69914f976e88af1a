"""The sampler's fields, which several APIs share: they have vLLM's names, and Aphrodite's beyond them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from engine.sampling_params import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORDS,
    MAX_BREAKERS,
    MAX_INTEGER,
    MAX_LOGPROBS,
    MAX_SEED,
    MAX_STOP_TOKEN_IDS,
    RANGES,
    SAMPLERS,
)
from handlers.errors import InvalidParameter, InvalidRequest
from handlers.protocols.base import MAX_ANSWERS, TokenId, described
from handlers.request import MAX_STOP_STRINGS, RequestSampling

Bias = Annotated[float, Meta(ge=-100, le=100)]
StopStrings = Annotated[list[str], Meta(max_length=MAX_STOP_STRINGS)]

_Texts = Annotated[list[str], Meta(max_length=MAX_BREAKERS)]
_TextsInText = Annotated[str, Meta(max_length=MAX_BREAKERS * 16)]
"""A JSON list in a string, with or without its brackets, as some front ends send it."""

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
    """Fields that `RequestSampling` describes: OpenAI's and vLLM's in the first block, then Aphrodite's."""

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
_NAMES = tuple(name for name in SamplerFields.__struct_fields__ if name in set(RequestSampling.__struct_fields__))


def stop_strings(*given: str | list[str] | None, name: str) -> tuple[str, ...]:
    """Return the stop strings of some fields. Raises InvalidRequest for an empty one, with the API's name for them."""
    found = tuple(text for texts in given for text in ([texts] if isinstance(texts, str) else texts or ()))
    if "" in found:
        raise InvalidRequest(f"{name}: an empty string cannot end an answer", param=name.strip("`"))
    return found


def sampler_values(asked: SamplerFields) -> dict[str, Any]:
    """Return fields of RequestSampling, None for what was not given. Raises InvalidRequest."""
    values: dict[str, Any] = {}
    for name in _NAMES:
        value = getattr(asked, name)
        values[name] = tuple(value) if isinstance(value, list) else value
    if asked.allowed_token_ids is not None:
        # Each id once: a list with a million repetitions would be copied for every answer.
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
    """Return the client's names for fields of RequestSampling, where it used an alias."""
    return {
        name: alias
        for alias, name in _ALIASES.items()
        if getattr(asked, alias) is not None and getattr(asked, name, None) is None
    }


def sampling_params(
    given: Mapping[str, Any], defaults: Mapping[str, Any], names: Mapping[str, str] | None = None
) -> RequestSampling:
    """Return the client's values over the defaults; None counts as not given.

    The seed -1 means none, as in vLLM; another negative one, which OpenAI allows, stands for the seed 2^63 above it.
    A default `max_tokens` bounds `min_tokens` as the client's own does, as in vLLM. names: as in `Task`.

    Raises:
        InvalidRequest: A value is not allowed.
    """
    known = RequestSampling.__struct_fields__
    values = {name: value for name, value in defaults.items() if name in known and value is not None}
    values.update((name, value) for name, value in given.items() if value is not None)
    try:
        if (seed := values.get("seed")) is not None:
            if not -MAX_SEED - 1 <= seed <= MAX_SEED:
                raise InvalidParameter("seed", "must be a whole number from -2^63 to 2^63-1")
            values["seed"] = None if seed == -1 else seed & MAX_SEED
        params = RequestSampling(**values)
        try:
            params.validate()
        except ValueError as error:
            name, _, problem = str(error).partition(" ")
            raise InvalidParameter(name, problem) from error
        if params.max_tokens is not None and params.min_tokens > params.max_tokens:
            most = (names or {}).get("max_tokens", "max_tokens")
            default = "" if given.get("max_tokens") is not None else " unless the request sets it"
            raise InvalidParameter(
                "min_tokens", f"is {params.min_tokens}; allowed: at most {most}, which is {params.max_tokens}{default}"
            )
    except InvalidRequest as error:
        error.rename(names or {})
        raise
    return params


def _texts(text: str) -> tuple[str, ...]:
    try:
        found = msgspec.json.decode(text if text.lstrip().startswith("[") else f"[{text}]", type=_Texts)
    except msgspec.MsgspecError:
        raise InvalidRequest("dry_sequence_breakers: send a list of texts", param="dry_sequence_breakers") from None
    return tuple(found)
