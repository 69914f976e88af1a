"""`parameters` of the LMI body: names, defaults and bounds, from JSON to what the engine is asked.

Names and defaults are those of the LMI input and output schema (djl-serving's documentation).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from msgspec import Meta

from engine.sampling_params import MAX_STOP_STRINGS, SamplingParams, shown
from handlers.errors import InvalidRequest
from handlers.protocols.base import TokenCount, TokenId, sampling_params
from handlers.protocols.body import convert
from handlers.protocols.constraints import GUIDED, read_constraint
from handlers.protocols.misspelt import KnownNames
from handlers.protocols.openai.fields import MAX_ANSWERS
from handlers.protocols.sampler_fields import SamplerFields, sampler_values
from handlers.request import Constraint

log = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS = 30

_StopStrings = Annotated[list[str], Meta(max_length=MAX_STOP_STRINGS)]
_Bias = Annotated[float, Meta(ge=-100, le=100)]
_Candidates = Annotated[int, Meta(ge=0, le=20)]


class Parameters(SamplerFields, kw_only=True):
    """What LMI documents, and how its runtimes call the same things (`stop`, `max_tokens`, `logprobs`)."""

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    do_sample: bool | None = None
    stop_sequences: str | _StopStrings | None = None
    stop: str | _StopStrings | None = None
    ignore_eos_token: bool | None = None
    logit_bias: dict[TokenId, _Bias] | None = None
    return_full_text: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    top_n_tokens: _Candidates | None = None
    logprobs: _Candidates | bool | None = None
    truncate: TokenCount | None = None
    n: int | None = None
    best_of: int | None = None

    @property
    def top_tokens(self) -> int:
        """Candidates to show at each position."""
        return self.top_n_tokens or int(self.logprobs or 0)

    @property
    def prefill(self) -> bool:
        """Whether the prompt's own tokens are shown."""
        return bool(
            self.details and (self.decoder_input_details or self.prompt_logprobs not in (None, False))
        )

    @property
    def answers(self) -> int:
        """How many to generate: as many as are returned, or more to choose the best from."""
        return max(self.n or 1, self.best_of or 1)

    @property
    def returned(self) -> int:
        """How many to return; `best_of` alone returns all, the best first."""
        return self.answers if self.n is None else self.n


_SHOWN = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "logprobs": "top_n_tokens"}
NAMES: Mapping[str, str] = {
    name: f"parameters.{_SHOWN.get(name, name)}" for name in SamplingParams.__struct_fields__
} | {"stop": "parameters.stop_sequences"}
"""A field of SamplingParams -> what the client calls it."""

_WITHOUT_EFFECT = frozenset(
    {"watermark", "length_penalty", "early_stopping", "num_beams", "spaces_between_special_tokens"}
)
_CONSTRAINTS = frozenset(
    {*GUIDED, "guided_whitespace_pattern", "grammar", "response_format", "structured_outputs"}
)
_KNOWN = _CONSTRAINTS | {*Parameters.__struct_fields__, *_WITHOUT_EFFECT}
PARAMETER_NAMES = KnownNames(_CONSTRAINTS | {*Parameters.__struct_fields__}, _WITHOUT_EFFECT)
READ = {name: f"parameters.{name}" for name in (*Parameters.__struct_fields__, *_CONSTRAINTS)}
"""A parameter -> its path in a body."""


def read_parameters(given: dict[str, Any]) -> Parameters:
    """Raises InvalidRequest naming the parameter."""
    if given.get("num_beams") not in (None, 1):
        raise InvalidRequest(
            "parameters.num_beams: there is no beam search; best_of chooses the best of several answers",
            param="parameters.num_beams",
        )
    parameters = convert(given, Parameters, under="parameters")
    for name in ("n", "best_of"):
        count = getattr(parameters, name)
        if count is not None and not 1 <= count <= MAX_ANSWERS:
            raise InvalidRequest(
                f"parameters.{name} is {shown(count)}; allowed: from 1 to {MAX_ANSWERS}",
                param=f"parameters.{name}",
            )
    if parameters.n is not None and parameters.best_of is not None and parameters.n > parameters.best_of:
        raise InvalidRequest(
            f"parameters.n is {parameters.n}, more than parameters.best_of ({parameters.best_of})",
            param="parameters.n",
        )
    for name in given.keys() - _KNOWN:
        log.debug("unknown parameter ignored: %.80s", name)
    return parameters


def read_sampling(
    parameters: Parameters, defaults: Mapping[str, Any], *, shows_tokens: bool, shows_prompt: bool
) -> SamplingParams:
    """Greedy unless asked otherwise, and 30 tokens, whatever the model's own defaults say. Engine names work, too.

    shows_tokens, shows_prompt: whether the reply holds the answer's and the prompt's tokens with their
    probabilities. Raises InvalidRequest.
    """
    stop = [*_strings(parameters.stop_sequences), *_strings(parameters.stop)]
    if "" in stop:
        raise InvalidRequest(
            "parameters.stop_sequences: an empty string cannot end an answer",
            param="parameters.stop_sequences",
        )
    asked = sampler_values(parameters) | {
        "temperature": parameters.temperature if _samples(parameters) else 0.0,
        "stop": tuple(stop) if stop else None,
        "logit_bias": parameters.logit_bias,
        "ignore_eos": parameters.ignore_eos_token or parameters.ignore_eos,
        "logprobs": parameters.top_tokens if shows_tokens else 0 if parameters.answers > 1 else None,
        "prompt_logprobs": 0 if shows_prompt else None,
    }
    if parameters.max_new_tokens is not None:
        asked["max_tokens"] = parameters.max_new_tokens
    if parameters.min_new_tokens is not None:
        asked["min_tokens"] = parameters.min_new_tokens
    return sampling_params(asked, {**defaults, "max_tokens": DEFAULT_NEW_TOKENS}, NAMES)


def constraint_of(given: dict[str, Any]) -> Constraint | None:
    """What the answer must look like, in any of the words that LMI's backends take. Raises InvalidRequest."""
    if not _CONSTRAINTS & given.keys():
        return None
    try:
        constraint = read_constraint(
            response_format=given.get("response_format"),
            structured_outputs=given.get("structured_outputs"),
            guided=given,
            grammar=given.get("grammar"),
        )
    except InvalidRequest as error:
        param = None if error.param is None else f"parameters.{error.param}"
        raise InvalidRequest(f"parameters.{error.message}", param=param) from error
    return constraint and replace(constraint, param=f"parameters.{constraint.param}")


def _samples(parameters: Parameters) -> bool:
    """LMI is greedy unless `do_sample` says otherwise or, without it, a temperature is given."""
    return parameters.temperature is not None if parameters.do_sample is None else parameters.do_sample


def _strings(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []
