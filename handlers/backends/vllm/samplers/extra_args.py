"""Samplers that vLLM does not have: which requests need them, and how they reach the engine's process.

There `processor.py` chooses the tokens of such requests with the embedded engine's own sampler, whole chain and draw,
so that a seed gives the same draw on both backends. vLLM is told to sample these requests by nothing but their logits,
in which one token is left.
"""

from __future__ import annotations

import secrets
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from engine.repetition import Repetition
from engine.sampling_params import SamplingParams
from engine.warping import Warping
from handlers.model_json import read_object
from handlers.request import RequestSampling

PROCESSOR = "handlers.backends.vllm.samplers.processor:SamplerProcessor"
"""As vLLM's `logits_processors` names a class."""

KEY = "lmi_samplers"
"""Where in vLLM's `extra_args` a request's samplers are."""

NEUTRAL: dict[str, Any] = {
    "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "logit_bias": None,
}  # fmt: skip
"""Of vLLM's parameters, for a request whose token is chosen before they are looked at."""

_LEFT_TO_VLLM = (
    "max_tokens", "min_tokens", "seed", "stop_token_ids", "ignore_eos", "logprobs", "prompt_logprobs",
    "allowed_token_ids",
)  # fmt: skip
"""Masks among them are on the logits already when the processor sees them; vLLM has a seed for each completion."""

HOTTEST = 2.0
"""The highest temperature that vLLM takes itself."""

_PLAIN = SamplingParams()


class Carried(msgspec.Struct, frozen=True):
    """What travels in `extra_args`. request: a number of its own, the same for all its completions."""

    params: SamplingParams
    request: int


@dataclass(frozen=True)
class Samplers:
    """Whether this engine has them.

    lacking: why not, as words after "vLLM"; None where it has them.
    reports_choice: the log probabilities that vLLM tells are those of the token left (`logprobs_mode`).
    """

    lacking: str | None = None
    reports_choice: bool = False


HAS_ALL = Samplers()


def wanted(params: SamplingParams) -> bool:
    """Whether the samplers that vLLM does not have change the completion."""
    if Repetition.of(params, ()) is not None:
        return True
    return not params.greedy and (
        params.typical_p < 1.0 or params.temperature > HOTTEST or Warping.of(params, 0) is not None
    )


def extra_args(params: RequestSampling) -> dict[str, bytes]:
    """vLLM's `extra_args` for such a request. params: words spelled."""
    kept = msgspec.structs.replace(
        params.for_engine(), **{name: getattr(_PLAIN, name) for name in _LEFT_TO_VLLM}
    )
    return {KEY: msgspec.msgpack.encode(Carried(kept, secrets.randbits(63)))}


def some_seed() -> int:
    """For a request without one: all ranks of an engine must draw alike. Its other completions count on from it."""
    return secrets.randbits(62)


def offer(arguments: MutableMapping[str, Any]) -> Samplers:
    """Name the processor to vLLM, beside the operator's own, where nothing of vLLM's is lost by it.

    arguments: for `AsyncEngineArgs`.
    """
    given = list(arguments.get("logits_processors") or ())
    lacking = None
    if arguments.get("speculative_config") or _drafts_by_itself(Path(arguments["model"])):
        lacking = "with speculative decoding"
    elif arguments.get("return_sampling_mask"):
        lacking = "with option.return_sampling_mask"
    elif PROCESSOR not in given:
        arguments["logits_processors"] = [*given, PROCESSOR]
    mode = str(arguments.get("logprobs_mode") or "raw_logprobs")
    return Samplers(lacking, mode.startswith("processed"))


def _drafts_by_itself(model: Path) -> bool:
    """The model names its own speculative decoding, which vLLM then switches on."""
    try:
        return bool(read_object(model / "config.json").get("speculators_config"))
    except (OSError, ValueError):
        return False
