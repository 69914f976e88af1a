"""Our sampling parameters and constraints in vLLM's words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from engine.sampling_params import SamplingParams
from handlers.backends.vllm.failures import refused
from handlers.errors import InvalidRequest

if TYPE_CHECKING:
    from handlers.backends.vllm.compat import Vllm
    from handlers.request import Constraint

_SAME = (
    "max_tokens",
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "logprobs",
    "prompt_logprobs",
)
"""Fields that mean the same in both."""

_TRANSLATED = (
    "min_tokens", "top_k", "stop", "stop_token_ids", "logit_bias", "allowed_token_ids", "bad_words",
)  # fmt: skip

_GREEDY_TOO = ("dry_multiplier", "no_repeat_ngram_size", "bad_words_token_ids")
"""Samplers that vLLM does not have and that change greedy answers as well."""

_SHAPES = (
    "temperature_last", "smoothing_curve", "dynatemp_exponent", "xtc_threshold", "dry_base", "dry_allowed_length",
    "dry_range", "dry_sequence_breakers", "dry_sequence_breaker_ids", "mirostat_tau", "mirostat_eta",
)  # fmt: skip
"""Fields that mean nothing unless another one switches their sampler on."""

_PLAIN = SamplingParams()


def to_vllm(
    vllm: Vllm,
    params: SamplingParams,
    n: int,
    constraint: Constraint | None = None,
    names: Mapping[str, str] | None = None,
) -> Any:
    """vLLM's SamplingParams, in which every output is what is new.

    params: checked already. n: answers that the engine makes. names: the client's names of fields.
    Raises InvalidRequest for a sampler that vLLM does not have.
    """
    unknown = [
        field
        for field in params.__struct_fields__
        if field not in _SAME
        and field not in _TRANSLATED
        and field not in _SHAPES
        and getattr(params, field) != getattr(_PLAIN, field)
        and (field in _GREEDY_TOO or not params.greedy)
    ]
    if unknown:
        raise InvalidRequest(
            f"{(names or {}).get(unknown[0], unknown[0])} is not a sampler of the vLLM backend: leave it out, or "
            "let the operator set option.rolling_batch=rolling",
            param=(names or {}).get(unknown[0], unknown[0]),
        )
    fields: dict[str, Any] = {name: getattr(params, name) for name in _SAME}
    if params.greedy:
        # vLLM counts a seed as state to keep; a greedy answer needs none.
        fields |= {"seed": None, "top_p": 1.0, "min_p": 0.0}
    fields["top_k"] = 0 if params.greedy else max(params.top_k, 0)
    fields["min_tokens"] = (
        params.min_tokens if params.max_tokens is None else min(params.min_tokens, params.max_tokens)
    )
    fields["stop"] = list(params.stop)
    fields["stop_token_ids"] = list(params.stop_token_ids)
    fields["logit_bias"] = params.logit_bias or None
    if params.allowed_token_ids is not None:
        fields["allowed_token_ids"] = list(params.allowed_token_ids)
    if params.bad_words:
        fields["bad_words"] = list(params.bad_words)
    if constraint is not None:
        fields["structured_outputs"] = structured(vllm, constraint)
    try:
        return vllm.SamplingParams(n=n, output_kind=vllm.RequestOutputKind.DELTA, **fields)
    except vllm.refusals as error:
        raise refused(error) from error


def structured(vllm: Vllm, constraint: Constraint) -> Any:
    """vLLM's StructuredOutputsParams for a constraint."""
    value = constraint.value
    match constraint.kind:
        case "json_object":
            fields: dict[str, Any] = {"json_object": True}
        case "json_schema":
            fields = {"json": value}
        case "choice":
            fields = {"choice": json.loads(value or "[]")}
        case kind:
            fields = {kind: value}
    if constraint.whitespace_pattern == "":
        fields["disable_any_whitespace"] = True
    elif constraint.whitespace_pattern is not None:
        fields["whitespace_pattern"] = constraint.whitespace_pattern
    try:
        return vllm.StructuredOutputsParams(**fields)
    except vllm.refusals as error:
        raise refused(error, constraint.param) from error
