"""Our sampling parameters and constraints in vLLM's words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from engine.sampling_params import MAX_SEED
from handlers.backends.vllm.failures import refused
from handlers.backends.vllm.samplers.extra_args import (
    HAS_ALL,
    HOTTEST,
    NEUTRAL,
    Samplers,
    extra_args,
    some_seed,
    wanted,
)
from handlers.errors import InvalidParameter
from handlers.request import RequestSampling

if TYPE_CHECKING:
    from handlers.backends.vllm.compat import Vllm
    from handlers.request import Constraint

SAME = (
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

TRANSLATED = (
    "min_tokens", "top_k", "stop", "stop_token_ids", "logit_bias", "allowed_token_ids", "bad_words",
)  # fmt: skip

MOST_PROMPT_LOGPROBS = 2**18
"""That of the chosen token included, those of all answers together."""

SLOWER_WITH_STOPS = 20
"""Times as long vLLM takes for each where there are stop strings: it then makes text of each, too."""

_LONGEST = 2**30
"""More tokens than any context has."""

_PLAIN = RequestSampling()


def to_vllm(
    vllm: Vllm,
    params: RequestSampling,
    n: int,
    constraint: Constraint | None = None,
    samplers: Samplers = HAS_ALL,
) -> Any:
    """vLLM's SamplingParams, in which every output is what is new.

    params: checked already, DRY's breakers spelled. n: choices that the engine makes. samplers: what the engine has of
    those that vLLM does not have.
    Raises InvalidRequest for a sampler that the engine does not have.
    """
    ours = wanted(params)
    if ours:
        _check(params, samplers)
    fields: dict[str, Any] = {name: getattr(params, name) for name in SAME}
    if params.greedy:
        # vLLM counts a seed as state to keep; a greedy answer needs none.
        fields |= {"seed": None, "top_p": 1.0, "min_p": 0.0}
    fields["top_k"] = 0 if params.greedy else max(params.top_k, 0)
    fields["logit_bias"] = params.logit_bias or None
    if ours:
        fields |= NEUTRAL | {"extra_args": extra_args(params)}
        if not params.greedy:
            fields |= {"temperature": 1.0, "seed": some_seed() if params.seed is None else params.seed}
    if fields["seed"] is not None:
        # Answer i is drawn with seed + i, and vLLM's newer model runner ends at one of more than 63 bits.
        fields["seed"] = min(fields["seed"], MAX_SEED + 1 - n)
    # It also ends where prompt and min_tokens together have more than 31 bits.
    fields["min_tokens"] = min(params.min_tokens, params.max_tokens or _LONGEST)
    fields["stop"] = list(params.stop)
    fields["detokenize"] = bool(params.stop)  # only to find them: the answer's text is made here
    fields["stop_token_ids"] = list(params.stop_token_ids)
    if params.allowed_token_ids is not None:
        fields["allowed_token_ids"] = list(dict.fromkeys(params.allowed_token_ids))
    if params.bad_words:
        fields["bad_words"] = list(params.bad_words)
    if constraint is not None:
        fields["structured_outputs"] = structured(vllm, constraint)
        fields["ignore_eos"] = False  # else vLLM goes on after the grammar's end, without the grammar
    try:
        return vllm.SamplingParams(n=n, output_kind=vllm.RequestOutputKind.DELTA, **fields)
    except vllm.refusals as error:
        raise refused(error) from error


def usual_sampling(defaults: Mapping[str, float | int], samplers: Samplers) -> dict[str, float | int]:
    """The model's defaults without those for which every request would be refused."""
    if samplers.lacking is None:
        return dict(defaults)
    return {name: value for name, value in defaults.items() if name in (*SAME, *TRANSLATED)}


def _check(params: RequestSampling, samplers: Samplers) -> None:
    """Raise InvalidRequest unless the engine has the samplers that these parameters ask for."""
    if samplers.lacking is None and not (samplers.reports_choice and params.logprobs is not None):
        return
    temperature = min(params.temperature, HOTTEST)
    asked = (
        name
        for name in params.__struct_fields__
        if name not in (*SAME, *TRANSLATED)
        and wanted(replace(_PLAIN, temperature=temperature, **{name: getattr(params, name)}))
    )
    name = next(asked, "temperature")
    value = f"{params.temperature:g}, above {HOTTEST:g}, " if name == "temperature" else ""
    if samplers.lacking is not None:
        raise InvalidParameter(
            name,
            f"{value}is not a sampler of vLLM {samplers.lacking}: leave it out, or let the operator set "
            "option.rolling_batch=rolling",
        )
    raise InvalidParameter(
        name,
        f"{value}and log probabilities do not go together with option.logprobs_mode=processed_...: leave one out, or "
        "let the operator choose raw_logprobs",
    )


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


def check_prompt_logprobs(params: RequestSampling, prompt_tokens: int, answers: int) -> None:
    """Raise InvalidRequest for more probabilities than vLLM should put together.

    It does so on the event loop, for each of the answers that it makes: about 0.7 us for each probability.
    """
    count = params.prompt_logprobs
    if count is None:
        return
    most = MOST_PROMPT_LOGPROBS // (SLOWER_WITH_STOPS if params.stop else 1)
    if (count + 1) * prompt_tokens * answers > most:
        raise InvalidParameter(
            "prompt_logprobs",
            f"is {count}, for a prompt of {prompt_tokens} tokens"
            f"{f' and {answers} answers' if answers > 1 else ''}; allowed: {most} probabilities in all"
            f"{' where there are stop strings' if params.stop else ''}",
        )
