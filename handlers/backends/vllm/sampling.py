"""Sampling parameters and constraints, as vLLM takes them.

For samplers that vLLM does not have, `processor.py` chooses the tokens in the engine's process with the embedded
engine's sampler, so that a seed draws the same tokens on both backends. It masks all other tokens, and the request's
remaining parameters leave vLLM to take the one that is left.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from engine.repetition import Repetition
from engine.sampling_params import MAX_SEED, SamplingParams
from engine.sampling_state import Warping
from handlers.backends.vllm.outputs import refused
from handlers.errors import InvalidParameter
from handlers.request import Constraint, RequestSampling
from properties.model import read_object

if TYPE_CHECKING:
    from engine.config import Vocabulary
    from handlers.backends.model_text import ModelText
    from handlers.backends.vllm.compat import RunnerLimits, Vllm

logger = logging.getLogger(__name__)

SAME = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "logprobs",
    "prompt_logprobs",
)  # fmt: skip
"""Fields with the same meaning in vLLM's parameters."""

TRANSLATED = ("min_tokens", "stop", "stop_token_ids", "logit_bias", "allowed_token_ids", "bad_words")

PROCESSOR = "handlers.backends.vllm.processor:SamplerProcessor"
"""As vLLM's `logits_processors` names a class."""

KEY = "lmi_samplers"
"""The key of a request's samplers in vLLM's `extra_args`."""

NEUTRAL: dict[str, Any] = {
    "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "logit_bias": None,
}  # fmt: skip
"""Parameters of vLLM's that must not change a token that is already chosen."""

_LEFT_TO_VLLM = (
    "max_tokens", "min_tokens", "seed", "stop_token_ids", "ignore_eos", "logprobs", "prompt_logprobs",
    "allowed_token_ids",
)  # fmt: skip
"""vLLM applies its masks before the processor runs, and has a seed for each choice."""

HOTTEST = 2.0
"""The highest temperature that vLLM accepts."""

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


class Carried(msgspec.Struct, frozen=True):
    """What `extra_args` holds. request: a number of its own, the same for all its choices."""

    params: SamplingParams
    request: int


@dataclass(frozen=True)
class Samplers:
    """Whether an engine has our samplers.

    Attributes:
        lacking: Why not, to follow "vLLM"; None if it has them.
        reports_choice: Whether vLLM reports the log probabilities of the token that is left (`logprobs_mode`).
    """

    lacking: str | None = None
    reports_choice: bool = False


HAS_ALL = Samplers()


def offer(arguments: MutableMapping[str, Any]) -> Samplers:
    """Add the processor to the arguments for `AsyncEngineArgs`, unless that would cost a feature of vLLM's."""
    try:
        config = read_object(Path(arguments["model"]) / "config.json")
    except (OSError, ValueError):
        config = {}
    given = list(arguments.get("logits_processors") or ())
    lacking = None
    # With `speculators_config`, vLLM turns speculative decoding on without being asked.
    if arguments.get("speculative_config") or config.get("speculators_config"):
        lacking = "with speculative decoding"
    elif arguments.get("return_sampling_mask"):
        lacking = "with option.return_sampling_mask"
    elif PROCESSOR not in given:
        arguments["logits_processors"] = [*given, PROCESSOR]
    mode = str(arguments.get("logprobs_mode") or "raw_logprobs")
    return Samplers(lacking, mode.startswith("processed"))


def wanted(params: SamplingParams) -> bool:
    """Whether samplers that vLLM does not have change the completion."""
    if Repetition.of(params, ()) is not None:
        return True
    return not params.greedy and (
        params.typical_p < 1.0 or params.temperature > HOTTEST or Warping.of(params, 0) is not None
    )


def to_vllm(
    vllm: Vllm, params: RequestSampling, n: int, constraint: Constraint | None = None, samplers: Samplers = HAS_ALL
) -> Any:
    """Return vLLM's SamplingParams, with which each output holds only what is new.

    params are checked, and a constraint is as `constraint_for_vllm` returns it. Raises InvalidRequest if the engine
    does not have a sampler, or if vLLM refuses a value.
    """
    fields: dict[str, Any] = {name: getattr(params, name) for name in SAME} | {
        "logit_bias": params.logit_bias or None,
        # A prompt that has more than 31 bits together with min_tokens ends the newer model runner.
        "min_tokens": min(params.min_tokens, params.max_tokens or _LONGEST),
        "stop": list(params.stop),
        "detokenize": bool(params.stop),  # only to find them: the reply's text is made by the pipeline
        "stop_token_ids": list(params.stop_token_ids),
        "bad_words": list(params.bad_words) or None,
    }
    if params.allowed_token_ids is not None:
        fields["allowed_token_ids"] = list(dict.fromkeys(params.allowed_token_ids))
    if wanted(params):
        _check_samplers(params, samplers)
        fields |= NEUTRAL | {"extra_args": extra_args(params)}
        if not params.greedy:
            # Without a seed, the ranks of an engine would draw differently.
            seed = secrets.randbits(62) if params.seed is None else params.seed
            fields |= {"temperature": 1.0, "seed": seed}
    if fields["seed"] is not None:
        # Choice i is drawn with seed + i, and a seed of more than 63 bits ends the newer model runner.
        fields["seed"] = min(fields["seed"], MAX_SEED + 1 - n)
    try:
        if constraint is not None:
            fields["structured_outputs"] = _structured(vllm, constraint)
            # Otherwise vLLM continues after the grammar's end, without the grammar.
            fields["ignore_eos"] = False
        return vllm.SamplingParams(n=n, output_kind=vllm.RequestOutputKind.DELTA, **fields)
    except vllm.refusals as error:
        raise refused(error) from error


def extra_args(params: RequestSampling) -> dict[str, bytes]:
    """Return vLLM's `extra_args` for a request that wants our samplers."""
    kept = replace(params.for_engine(), **{name: getattr(_PLAIN, name) for name in _LEFT_TO_VLLM})
    return {KEY: msgspec.msgpack.encode(Carried(kept, secrets.randbits(63)))}


def usual_sampling(defaults: Mapping[str, float | int], samplers: Samplers) -> dict[str, float | int]:
    """Return the model's defaults without those for which every request would be refused."""
    if samplers.lacking is None:
        return dict(defaults)
    return {name: value for name, value in defaults.items() if name in (*SAME, *TRANSLATED)}


def _check_samplers(params: RequestSampling, samplers: Samplers) -> None:
    """Raise InvalidParameter, naming a sampler that the engine does not have."""
    if samplers.lacking is not None:
        problem = (
            f"is not a sampler of vLLM {samplers.lacking}: leave it out, or let the operator set "
            "option.rolling_batch=rolling"
        )
    elif samplers.reports_choice and params.logprobs is not None:
        problem = (
            "and log probabilities do not go together with option.logprobs_mode=processed_...: leave one out, or let "
            "the operator choose raw_logprobs"
        )
    else:
        return
    plain = replace(_PLAIN, temperature=min(params.temperature, HOTTEST))
    for name in params.__struct_fields__:
        if name not in (*SAME, *TRANSLATED) and wanted(replace(plain, **{name: getattr(params, name)})):
            raise InvalidParameter(name, problem)
    raise InvalidParameter("temperature", f"{params.temperature:g}, above {HOTTEST:g}, {problem}")


def check_prompt_logprobs(params: RequestSampling, prompt_tokens: int, choices: int) -> None:
    """Raise InvalidParameter for more log probabilities of the prompt than vLLM should put together.

    It does so on the event loop, for each choice again: about 0.7 us for each.
    """
    count = params.prompt_logprobs
    most = MOST_PROMPT_LOGPROBS // (SLOWER_WITH_STOPS if params.stop else 1)
    if count is not None and (count + 1) * prompt_tokens * choices > most:
        raise InvalidParameter(
            "prompt_logprobs",
            f"is {count}, for a prompt of {prompt_tokens} tokens"
            f"{f' and {choices} answers' if choices > 1 else ''}; allowed: {most} probabilities in all"
            f"{' where there are stop strings' if params.stop else ''}",
        )


def check_runner_limits(
    vllm: Vllm, limits: RunnerLimits, theirs: Any, eos_token_ids: Collection[int], tokenizer: Any
) -> None:
    """Raise InvalidParameter for more than vLLM's newer model runner has slots for, which would end the engine.

    theirs are vLLM's SamplingParams. With bad words this is slow, since they become tokens.
    """
    for name, most in (("allowed_token_ids", limits.allowed_token_ids), ("logit_bias", limits.logit_bias)):
        count = len(getattr(theirs, name) or ())
        if count > most:
            raise InvalidParameter(name, f"names {count} tokens; allowed: {most}")
    count, most = len({*theirs.stop_token_ids, *eos_token_ids}), limits.stop_token_ids
    if theirs.min_tokens and count > most:
        text = f"and the model's own ends are {count} tokens; allowed: {most} with min_tokens"
        raise InvalidParameter("stop_token_ids", text)
    if not theirs.bad_words:
        return
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


def constraint_vocabulary(config: Any, text: ModelText) -> Vocabulary | None:
    """Return what our own compiler needs, which compiles every constraint before vLLM sees it. Slow.

    vLLM compiles constraints on the front end's event loop, where a hostile one would hold up every request and the
    health check for minutes. None if the operator has chosen another of vLLM's libraries in `config`, its
    StructuredOutputsConfig; that library gets what the client wrote.
    """
    if config.backend == LIBRARY:
        return text.vocabulary()
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
    """Return vLLM's StructuredOutputsParams. Raises InvalidRequest."""
    kind, value = constraint.kind, constraint.value
    fields: dict[str, Any] = {"json" if kind == "json_schema" else kind: value}
    if kind == "json_object":
        fields = {kind: True}
    elif kind == "choice":
        fields = {kind: json.loads(value or "[]")}
    if constraint.whitespace_pattern == "":
        fields["disable_any_whitespace"] = True
    elif constraint.whitespace_pattern is not None:
        fields["whitespace_pattern"] = constraint.whitespace_pattern
    try:
        return vllm.StructuredOutputsParams(**fields)
    except vllm.refusals as error:
        raise refused(error, constraint.param) from error
