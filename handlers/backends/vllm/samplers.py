"""Samplers that vLLM does not have: which requests need them, and how they reach the engine's process.

There `processor.py` chooses the tokens of such requests with the embedded engine's sampler, so that a seed draws the
same tokens on both backends. It masks all other tokens, and the request's remaining parameters leave vLLM to take the
one that is left.
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

_PLAIN = SamplingParams()


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


def wanted(params: SamplingParams) -> bool:
    """Whether samplers that vLLM does not have change the completion."""
    if Repetition.of(params, ()) is not None:
        return True
    return not params.greedy and (
        params.typical_p < 1.0 or params.temperature > HOTTEST or Warping.of(params, 0) is not None
    )


def extra_args(params: RequestSampling) -> dict[str, bytes]:
    """Return vLLM's `extra_args` for a request that wants our samplers."""
    kept = msgspec.structs.replace(
        params.for_engine(), **{name: getattr(_PLAIN, name) for name in _LEFT_TO_VLLM}
    )
    return {KEY: msgspec.msgpack.encode(Carried(kept, secrets.randbits(63)))}


def offer(arguments: MutableMapping[str, Any]) -> Samplers:
    """Add the processor to the arguments for `AsyncEngineArgs`, unless that would cost a feature of vLLM's."""
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
    """Whether the model's config.json has vLLM switch speculative decoding on."""
    try:
        return bool(read_object(model / "config.json").get("speculators_config"))
    except (OSError, ValueError):
        return False
