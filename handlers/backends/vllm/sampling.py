"""Sampling parameters and constraints, as vLLM takes them."""

from __future__ import annotations

import json
import logging
import re
import secrets
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from engine.sampling_params import MAX_SEED
from handlers.backends.vllm.compat import runner_limits
from handlers.backends.vllm.failures import refused
from handlers.backends.vllm.samplers import HAS_ALL, HOTTEST, NEUTRAL, Samplers, extra_args, wanted
from handlers.errors import InvalidParameter
from handlers.prompts.tokenizer import vocabulary_of
from handlers.request import Constraint, RequestSampling

if TYPE_CHECKING:
    from engine.config import Vocabulary
    from handlers.backends.vllm.compat import RunnerLimits, Vllm
    from handlers.backends.vllm.prompts import VllmPrompts

logger = logging.getLogger(__name__)

SAME = (
    "max_tokens", "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "seed", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "logprobs", "prompt_logprobs",
)  # fmt: skip
"""Fields with the same meaning in vLLM's parameters."""

TRANSLATED = (
    "min_tokens", "top_k", "stop", "stop_token_ids", "logit_bias", "allowed_token_ids", "bad_words",
)  # fmt: skip

MOST_PROMPT_LOGPROBS = 2**18
"""In one request, of all choices together, those of the prompt's own tokens included."""

SLOWER_WITH_STOPS = 20
"""With stop strings vLLM takes so many times as long for each, because it also makes its text."""

LIBRARY = "guidance"
"""vLLM's name for llguidance, which the embedded engine uses too."""

_LONGEST = 2**30
"""More tokens than any context has."""

_PLAIN = RequestSampling()
_LARK_HEADER = re.compile(r"^\s*%llguidance\b", re.MULTILINE)


def to_vllm(
    vllm: Vllm,
    params: RequestSampling,
    n: int,
    constraint: Constraint | None = None,
    samplers: Samplers = HAS_ALL,
) -> Any:
    """Return vLLM's SamplingParams, with which each output holds only what is new.

    Args:
        vllm: The imported names.
        params: Checked, with DRY's breakers as token ids.
        n: The number of choices.
        constraint: As vLLM reads it (see `constraint_for_vllm`).
        samplers: Which of ours the engine has.

    Raises:
        InvalidRequest: The engine does not have a sampler, or vLLM refuses a value.
    """
    ours = wanted(params)
    if ours:
        _check_samplers(params, samplers)
    fields: dict[str, Any] = {name: getattr(params, name) for name in SAME}
    if params.greedy:
        # For a seed vLLM would keep state, which a greedy choice does not need.
        fields |= {"seed": None, "top_p": 1.0, "min_p": 0.0}
    fields["top_k"] = 0 if params.greedy else max(params.top_k, 0)
    fields["logit_bias"] = params.logit_bias or None
    if ours:
        fields |= NEUTRAL | {"extra_args": extra_args(params)}
        if not params.greedy:
            # Without a seed, the ranks of an engine would draw differently.
            fields |= {
                "temperature": 1.0,
                "seed": secrets.randbits(62) if params.seed is None else params.seed,
            }
    if fields["seed"] is not None:
        # Choice i is drawn with seed + i, and a seed of more than 63 bits ends the newer model runner.
        fields["seed"] = min(fields["seed"], MAX_SEED + 1 - n)
    # So does a prompt that has more than 31 bits together with min_tokens.
    fields["min_tokens"] = min(params.min_tokens, params.max_tokens or _LONGEST)
    fields["stop"] = list(params.stop)
    fields["detokenize"] = bool(params.stop)  # only to find them: the reply's text is made by the pipeline
    fields["stop_token_ids"] = list(params.stop_token_ids)
    if params.allowed_token_ids is not None:
        fields["allowed_token_ids"] = list(dict.fromkeys(params.allowed_token_ids))
    if params.bad_words:
        fields["bad_words"] = list(params.bad_words)
    if constraint is not None:
        fields["structured_outputs"] = _structured(vllm, constraint)
        fields["ignore_eos"] = False  # otherwise vLLM continues after the grammar's end, without the grammar
    try:
        return vllm.SamplingParams(n=n, output_kind=vllm.RequestOutputKind.DELTA, **fields)
    except vllm.refusals as error:
        raise refused(error) from error


def usual_sampling(defaults: Mapping[str, float | int], samplers: Samplers) -> dict[str, float | int]:
    """Return the model's defaults without those for which every request would be refused."""
    if samplers.lacking is None:
        return dict(defaults)
    return {name: value for name, value in defaults.items() if name in (*SAME, *TRANSLATED)}


def _check_samplers(params: RequestSampling, samplers: Samplers) -> None:
    """Raise InvalidParameter, naming a sampler that the engine does not have."""
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


def check_prompt_logprobs(params: RequestSampling, prompt_tokens: int, choices: int) -> None:
    """Raise InvalidParameter for more log probabilities of the prompt than vLLM should put together.

    It does so on the event loop, for each choice again: about 0.7 us for each.
    """
    count = params.prompt_logprobs
    if count is None:
        return
    most = MOST_PROMPT_LOGPROBS // (SLOWER_WITH_STOPS if params.stop else 1)
    if (count + 1) * prompt_tokens * choices > most:
        raise InvalidParameter(
            "prompt_logprobs",
            f"is {count}, for a prompt of {prompt_tokens} tokens"
            f"{f' and {choices} answers' if choices > 1 else ''}; allowed: {most} probabilities in all"
            f"{' where there are stop strings' if params.stop else ''}",
        )


def check_runner_limits(vllm: Vllm, engine: Any, theirs: Any, eos_token_ids: Collection[int]) -> None:
    """Raise InvalidParameter for lists that are too long for vLLM's newer model runner: there they end the engine.

    Args:
        vllm: The imported names.
        engine: The `AsyncLLM`.
        theirs: vLLM's SamplingParams. With bad words this is slow, since they become tokens.
        eos_token_ids: The model's own.
    """
    if not (theirs.allowed_token_ids or theirs.logit_bias or theirs.min_tokens or theirs.bad_words):
        return
    limits = runner_limits(engine.vllm_config)
    if limits is None:
        return
    check_ids(limits, theirs, eos_token_ids)
    if theirs.bad_words:
        check_bad_words(vllm, limits, theirs, engine.get_tokenizer())


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


def constraint_vocabulary(config: Any, prompts: VllmPrompts) -> Vocabulary | None:
    """Return what our own compiler needs, which compiles every constraint before vLLM sees it. Slow.

    vLLM compiles constraints on the front end's event loop, where a hostile one would hold up every request and the
    health check for minutes.

    Args:
        config: vLLM's StructuredOutputsConfig.
        prompts: Those of the model.

    Returns:
        None if the operator has chosen another of vLLM's libraries, which gets what the client wrote.
    """
    if config.backend == LIBRARY:
        return vocabulary_of(prompts.tokenizer, prompts.vocab_size, tuple(prompts.eos_token_ids))
    logger.warning(
        "structured answers: vLLM's library %s looks at clients' schemas and grammars on the event loop, so a "
        "hostile one can hold up the server; option.structured_outputs_config without a backend, or with "
        "%s, avoids that",
        config.backend,
        LIBRARY,
    )
    return None


def choose_library(arguments: Any, tokenizer: Any) -> None:
    """Set the library for constraints in vLLM's engine arguments, unless the operator has named one.

    Otherwise vLLM would choose one for the first request and use it for all later ones.
    """
    config = arguments.structured_outputs_config
    fast = hasattr(tokenizer, "backend_tokenizer") and arguments.tokenizer_mode in ("auto", "hf")
    if config.backend == "auto" and fast:
        config.backend = LIBRARY


def constraint_for_vllm(constraint: Constraint, grammar: str) -> Constraint:
    """Return a constraint by which vLLM enforces the same grammar as the embedded engine.

    grammar: llguidance's, as `handlers.grammars.source` writes it: Lark, or JSON around one schema or Lark text.
    """
    if grammar.startswith("{"):
        (inner,) = msgspec.json.decode(grammar)["grammars"]
        schema = inner.get("json_schema")
        if schema is not None:
            return Constraint("json_schema", msgspec.json.encode(schema).decode(), constraint.param)
        grammar = inner["lark_grammar"]
    if not _LARK_HEADER.search(grammar):
        grammar = f"%llguidance {{}}\n\n{grammar}"  # without it vLLM guesses the language
    return Constraint("grammar", grammar, constraint.param)


def _structured(vllm: Vllm, constraint: Constraint) -> Any:
    """Return vLLM's StructuredOutputsParams."""
    kind, value = constraint.kind, constraint.value
    match kind:
        case "json_object":
            fields: dict[str, Any] = {"json_object": True}
        case "json_schema":
            fields = {"json": value}
        case "choice":
            fields = {"choice": json.loads(value or "[]")}
        case _:
            fields = {kind: value}
    if constraint.whitespace_pattern == "":
        fields["disable_any_whitespace"] = True
    elif constraint.whitespace_pattern is not None:
        fields["whitespace_pattern"] = constraint.whitespace_pattern
    try:
        return vllm.StructuredOutputsParams(**fields)
    except vllm.refusals as error:
        raise refused(error, constraint.param) from error
