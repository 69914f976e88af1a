"""`SamplingParams` for scripts: vLLM's names and defaults, and any sampler of the engine by its own name."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from handlers.errors import InvalidRequest
from handlers.protocols.body import convert
from handlers.protocols.constraints import read_constraint
from handlers.protocols.sampler_fields import sampling_params
from handlers.request import Constraint
from handlers.request import RequestSampling as EngineParams

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "early_stopping": (False,),
    "length_penalty": (1.0,),
    "logits_processors": (None, []),
    "repetition_detection": (None,),
    "thinking_token_budget": (None,),
    "use_beam_search": (False,),
}
"""Fields of vLLM's that would change answers, and the values with which they do not, which are accepted."""

_IGNORED = {
    "detokenize", "extra_args", "flat_logprobs", "output_kind", "skip_clone", "skip_reading_prefix_cache",
    "spaces_between_special_tokens", "stream_interval", "watermarking",
}  # fmt: skip
"""Fields of vLLM's that do not change answers."""

MAX_ANSWERS = 16384
"""Answers to one prompt; vLLM's limit."""

_ENGINE = frozenset(EngineParams.__struct_fields__)


@dataclass(slots=True)
class StructuredOutputsParams:
    """Form of each answer: one of json (a schema), regex, choice, grammar or json_object."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    backend: str | None = None


GuidedDecodingParams = StructuredOutputsParams
"""Name of the class in vLLM before 0.11. `backend` has no effect here."""


class SamplingParams:
    """How answers are sampled: names, defaults and meanings are those of vLLM's `SamplingParams`.

    best_of: how many answers to generate; the n with the most likely tokens are kept. structured_outputs,
    guided_decoding: a `StructuredOutputsParams` or a dict of its fields. samplers: fields of the engine's sampling
    parameters. Attributes may be set later; they are checked again when a prompt is generated.

    Raises TypeError for an unknown name and ValueError for a bad value.
    """

    def __init__(
        self,
        n: int = 1,
        *,
        best_of: int | None = None,
        max_tokens: int | None = 16,
        min_tokens: int = 0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool = False,
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        logit_bias: Mapping[int, float] | None = None,
        truncate_prompt_tokens: int | None = None,
        structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None,
        guided_decoding: StructuredOutputsParams | Mapping[str, Any] | None = None,
        **samplers: Any,
    ) -> None:
        given = dict(locals())
        del given["self"], given["samplers"]
        for name, value in samplers.items():
            _check_name(name, value, [*given, *_ENGINE])
        self.__dict__.update(given)
        self.__dict__.update((name, value) for name, value in samplers.items() if name in _ENGINE)
        try:
            self.engine_params()
            self.answers()
            self.truncation()
            self.constraint()
        except InvalidRequest as error:
            raise ValueError(error.message) from None

    def engine_params(self) -> EngineParams:
        """Return the parameters for the engine. Raises InvalidRequest, naming the field."""
        values = {name: value for name, value in self.__dict__.items() if name in _ENGINE}
        stop = values.get("stop")
        values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop or ())
        values["stop_token_ids"] = tuple(values.get("stop_token_ids") or ())
        values["logit_bias"] = dict(values["logit_bias"]) if values.get("logit_bias") else None
        if self.__dict__["best_of"] is not None and values.get("logprobs") is None:
            values["logprobs"] = 0
        values = {name: value for name, value in values.items() if value is not None}
        asked = convert(values, EngineParams)
        return sampling_params({name: getattr(asked, name) for name in values}, {})

    def answers(self) -> tuple[int, int | None]:
        """Return how many answers to generate and how many to keep (None for all). Raises InvalidRequest."""
        n, best_of = self.__dict__["n"], self.__dict__["best_of"]
        for name, value in (("n", n), ("best_of", n if best_of is None else best_of)):
            if not isinstance(value, int) or not 1 <= value <= MAX_ANSWERS:
                raise InvalidRequest(f"{name} is {value!r}; allowed: from 1 to {MAX_ANSWERS}", param=name)
        if best_of is None:
            return n, None
        if best_of < n:
            raise InvalidRequest(f"best_of is {best_of}, fewer than n, which is {n}", param="best_of")
        return best_of, n

    def truncation(self) -> int | None:
        """Return how many of the prompt's last tokens to keep: None for all, -1 for as many as fit."""
        kept: int | None = self.__dict__["truncate_prompt_tokens"]
        if kept is not None and (not isinstance(kept, int) or (kept < 1 and kept != -1)):
            raise InvalidRequest(
                f"truncate_prompt_tokens is {kept!r}; allowed: from 1, or -1 for what fits",
                param="truncate_prompt_tokens",
            )
        return kept

    def constraint(self) -> Constraint | None:
        """Return what structured_outputs or guided_decoding require. Raises InvalidRequest."""
        asked = [
            asdict(given) if isinstance(given, StructuredOutputsParams) else dict(given)
            for given in (self.__dict__["structured_outputs"], self.__dict__["guided_decoding"])
            if given is not None
        ]
        if len(asked) > 1:
            raise InvalidRequest("structured_outputs and guided_decoding exclude each other: give one")
        return read_constraint(structured_outputs=asked[0]) if asked else None

    def clone(self) -> SamplingParams:
        return copy.deepcopy(self)

    def __getattr__(self, name: str) -> Any:
        """Return the engine's default of a sampler that was not given."""
        if name in _ENGINE:
            return getattr(EngineParams(), name)
        raise AttributeError(f"SamplingParams has no {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__dict__:
            _check_name(name, value, [*self.__dict__, *_ENGINE])
        self.__dict__[name] = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SamplingParams) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.__dict__.items() if value is not None)
        return f"SamplingParams({shown})"


def _check_name(name: str, value: Any, known: Sequence[str]) -> None:
    if name in _ENGINE or name in _IGNORED:
        return
    if name in _NEUTRAL:
        if value not in _NEUTRAL[name]:
            raise ValueError(f"{name} is not supported: leave it out")
        return
    found = difflib.get_close_matches(name, [*known, *_NEUTRAL, *_IGNORED], n=1)
    meant = f"; did you mean {found[0]}?" if found else ""
    raise TypeError(f"SamplingParams got an unexpected keyword argument {name!r}{meant}")
