"""Fields that several APIs share: those of the sampler, and those that constrain an answer.

Samplers' fields have vLLM's names, and Aphrodite's beyond them. What an answer must look like is read into one
`Constraint`: `response_format` is OpenAI's, which TGI's chat also takes with a `value`, `structured_outputs` is vLLM's,
`guided_*` are vLLM's and Aphrodite's older fields, and `grammar` is TGI's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
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
from handlers.grammars.json_schema import subschemas
from handlers.protocols.base import MAX_ANSWERS, TokenId, described
from handlers.protocols.body import refuse_unknown, shown_value
from handlers.protocols.body_limits import MAX_DEPTH, depth
from handlers.request import Constraint, RequestSampling

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


def sampler_values(asked: SamplerFields) -> dict[str, Any]:
    """Return fields of RequestSampling, None for what was not given. Raises InvalidRequest."""
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


MAX_BYTES = 2**18
"""The most bytes of a schema, an expression, a grammar, or all choices together."""

MAX_WHITESPACE_PATTERN = 200

GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_json_object")
"""The older fields, of which one may be given; `guided_whitespace_pattern` goes with the first."""

_NAMED_SCHEMA = frozenset({"name", "description", "schema", "strict"})
_FLAGS = frozenset({"disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"})
_WITHOUT_EFFECT = frozenset({"backend", "disable_fallback"})
"""Keys of `structured_outputs` that are ignored: there is one way to constrain answers."""

_OUTPUTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")

MOST_CHOICES = MAX_BYTES // 4
"""The most choices: each takes at least a letter, its quotes and a comma."""

_SPACE = r"[ \t\n\r]"
_WHITESPACE = re.compile(r"(?:[ \t\n\r?*+|()\[\]]|\(\?:|\\[nrts ]|\\x(?:20|0[9aAdD])|\{[0-9]{0,3}(?:,[0-9]{0,3})?\})*")


def read_constraint(
    *,
    response_format: object = None,
    structured_outputs: object = None,
    guided: Mapping[str, Any] | None = None,
    grammar: object = None,
) -> Constraint | None:
    """Return the one constraint that these fields, each as the client sent it, ask for; None for free text.

    guided: may hold other fields as well, which are not read.

    Raises:
        InvalidRequest: A field is malformed, or two of them ask for something; it names the field.
    """
    found = [
        _response_format(response_format),
        _structured_outputs(structured_outputs),
        *_guided(guided or {}),
        _typed(grammar, "grammar") if grammar is not None else None,
    ]
    asked = [constraint for constraint in found if constraint is not None]
    if len(asked) > 1:
        names = " and ".join(constraint.param for constraint in asked)
        raise InvalidRequest(f"{names} exclude each other: send one of them", param=asked[1].param)
    return asked[0] if asked else None


def _response_format(given: object) -> Constraint | None:
    if given is None:
        return None
    param = "response_format"
    fields = _object(given, param)
    kind = fields.get("type")
    if kind == "text":
        refuse_unknown(fields, {"type"}, param)
        return None
    if kind not in ("json_schema", "json_object") or fields.get("value") is not None:
        return _typed(fields, param)
    if kind == "json_schema" and fields.get("schema") is None:
        refuse_unknown(fields, {"type", "json_schema"}, param)
        return _named_schema(fields.get("json_schema"), f"{param}.json_schema", param)
    # llama.cpp and others write the schema itself beside the type.
    refuse_unknown(fields, {"type", *_NAMED_SCHEMA}, param)
    if fields.get("schema") is None:
        return Constraint("json_object", None, param)
    return _of_object(_schema(fields["schema"], f"{param}.schema", param), kind)


def _named_schema(given: object, where: str, param: str) -> Constraint:
    fields = _object(given, where)
    refuse_unknown(fields, _NAMED_SCHEMA, where, param=param)
    return _schema(fields.get("schema"), f"{where}.schema", param)


def _typed(given: object, param: str) -> Constraint:
    """Read TGI's `{"type", "value"}`."""
    fields = _object(given, param)
    kind, value = fields.get("type"), fields.get("value")
    where = f"{param}.value"
    if kind in ("json", "json_object", "json_schema", "regex"):
        refuse_unknown(fields, {"type", "value"}, param)
    if kind in ("json", "json_object"):
        return _of_object(_schema(value, where, param), kind)
    if kind == "json_schema":
        return _named_schema(value, where, param)
    if kind == "regex":
        return _text("regex", value, where, param)
    allowed = "'json', 'json_object', 'json_schema', 'regex'"
    if param == "response_format":
        allowed = f"'text', {allowed}"
    problem = "is missing" if kind is None else f"{shown_value(kind)} is not supported by this server"
    raise InvalidRequest(f"{param}.type {problem}; allowed: {allowed}", param=param)


def _structured_outputs(given: object) -> Constraint | None:
    if given is None:
        return None
    param = "structured_outputs"
    fields = _object(given, param)
    asked = _only(fields, param)
    refuse_unknown(fields, {*_OUTPUTS, *_FLAGS, *_WITHOUT_EFFECT}, param)
    if asked == "structural_tag":
        raise InvalidRequest(
            f"{param}.structural_tag is not supported by this server; use json, regex, choice or grammar",
            param=param,
        )
    constraint = _one(asked, fields[asked], f"{param}.{asked}", param)
    if fields.get("disable_additional_properties") and constraint.kind == "json_schema":
        schema = msgspec.json.decode(constraint.value or "")
        for node in subschemas(schema):
            if isinstance(node.get("properties"), dict) or isinstance(node.get("patternProperties"), dict):
                node.setdefault("additionalProperties", False)
        constraint = replace(constraint, value=msgspec.json.encode(schema).decode())
    if fields.get("disable_any_whitespace"):
        return replace(constraint, whitespace_pattern="")
    return _with_whitespace(constraint, fields.get("whitespace_pattern"), f"{param}.whitespace_pattern")


def _guided(fields: Mapping[str, Any]) -> Iterator[Constraint]:
    for name in GUIDED:
        value = fields.get(name)
        if value is None or value is False:
            continue
        constraint = _one(name.removeprefix("guided_"), value, name, name)
        name = "guided_whitespace_pattern"
        yield _with_whitespace(constraint, fields.get(name), name)


def _one(what: str, value: object, where: str, param: str) -> Constraint:
    """Read vLLM's `json`, `regex`, `choice`, `grammar` or `json_object`."""
    if what == "json":
        return _schema(value, where, param)
    if what == "choice":
        return _choice(value, where, param)
    if what == "json_object":
        if value is not True:
            raise InvalidRequest(f"{where} must be true or left out", param=param)
        return Constraint("json_object", None, param)
    return _text("regex" if what == "regex" else "grammar", value, where, param)


def _schema(given: object, where: str, param: str) -> Constraint:
    """Read a JSON schema, given as an object or as text."""
    if isinstance(given, str):
        _check_size(given, where, param)
        try:
            given = msgspec.json.decode(given)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise InvalidRequest(f"{where} is a text that is not valid JSON", param=param) from None
    if not isinstance(given, dict):
        raise InvalidRequest(f"{where} must be a JSON schema: an object", param=param)
    if depth(given) > MAX_DEPTH:
        raise InvalidRequest(f"{where} is nested too deeply; allowed: {MAX_DEPTH} levels", param=param)
    text = msgspec.json.encode(given).decode()
    _check_size(text, where, param)
    return Constraint("json_schema", text, param)


def _of_object(constraint: Constraint, kind: str) -> Constraint:
    """Return the constraint of an object for an empty schema, which would allow any value."""
    if kind == "json_object" and constraint.value == "{}":
        return Constraint("json_object", None, constraint.param)
    return constraint


def _choice(given: object, where: str, param: str) -> Constraint:
    if not isinstance(given, list) or not given or not all(isinstance(choice, str) and choice for choice in given):
        raise InvalidRequest(f"{where} must be a list of texts, none of them empty", param=param)
    if len(given) > MOST_CHOICES:
        raise InvalidRequest(f"{where} has {len(given)} entries; allowed: at most {MOST_CHOICES}", param=param)
    text = msgspec.json.encode(list(dict.fromkeys(given))).decode()
    _check_size(text, where, param)
    return Constraint("choice", text, param)


def _text(kind: Any, given: object, where: str, param: str) -> Constraint:
    if not isinstance(given, str) or not given:
        raise InvalidRequest(f"{where} must be a text that is not empty", param=param)
    _check_size(given, where, param)
    return Constraint(kind, given, param)


def _with_whitespace(constraint: Constraint, pattern: object, where: str) -> Constraint:
    """Add the expression for white space inside JSON. It may match nothing else, so that the answer remains JSON."""
    if pattern is None:
        return constraint
    if constraint.kind not in ("json_schema", "json_object"):
        raise InvalidRequest(f"{where} goes with a JSON schema only", param=constraint.param)
    if not isinstance(pattern, str) or len(pattern) > MAX_WHITESPACE_PATTERN or not _WHITESPACE.fullmatch(pattern):
        raise InvalidRequest(
            f"{where} must be a regular expression of white space alone, such as '[ \\n]?', of at most "
            f"{MAX_WHITESPACE_PATTERN} characters",
            param=constraint.param,
        )
    return replace(constraint, whitespace_pattern=pattern.replace(r"\s", _SPACE))


def _only(fields: dict[str, Any], param: str) -> str:
    asked = [name for name in _OUTPUTS if fields.get(name) is not None and fields[name] is not False]
    if not asked:
        raise InvalidRequest(f"{param} asks for nothing; allowed: {', '.join(_OUTPUTS[:-1])}", param=param)
    if len(asked) > 1:
        listed = " and ".join(f"{param}.{name}" for name in asked)
        raise InvalidRequest(f"{listed} exclude each other: send one of them", param=param)
    return asked[0]


def _object(given: object, where: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise InvalidRequest(f"{where} must be an object", param=where.partition(".")[0])
    return given


def _check_size(text: str, where: str, param: str) -> None:
    if (size := len(text.encode())) > MAX_BYTES:
        raise InvalidRequest(f"{where} has {size} bytes; allowed: at most {MAX_BYTES}", param=param)
