"""What sampling remembers of one sequence between its steps: counts, rules against repetition, and samplers' state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engine.repetition import Ids, Repetition, TokenCounts, Weights
from engine.sampling_params import FIRST_SAMPLERS, SamplingParams, sampler_order

_MASK64 = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def mix64(value: int) -> int:
    """Apply splitmix64's output function (Steele, Lea and Flood 2014), a bijection of 64-bit numbers."""
    value &= _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def uniform(key: int, counter: int) -> float:
    """Return element `counter` of splitmix64's sequence for `key`: a number in [0, 1) with 53 bits."""
    return (mix64(key + (counter + 1) * _GOLDEN_GAMMA) >> 11) * 2.0**-53


DEFAULT_ORDER = (
    "TEMPERATURE", "TOP_NSIGMA", "TOP_P_TOP_K", "TOP_A", "MIN_P", "TFS", "ETA_CUTOFF", "EPSILON_CUTOFF", "TYPICAL_P",
    "QUADRATIC", "XTC",
)  # fmt: skip
"""Samplers in their default order, by their names in `sampler_priority`; Mirostat always comes last."""

_OTHER_STREAM = 0xD1B54A32D192ED03
"""Separates XTC's random numbers from the draw's."""

_OWN = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "top_a", "tfs", "eta_cutoff", "epsilon_cutoff",
    "smoothing_factor", "smoothing_curve", "dynatemp_min", "dynatemp_max", "dynatemp_exponent", "xtc_threshold",
    "xtc_probability", "nsigma", "skew",
)  # fmt: skip
COLUMN = {name: place for place, name in enumerate((*_OWN, "xtc_number", "mu"))}


class Warping:
    """The samplers of one request; it lives as long as its sequence (see `SamplingState`).

    Attributes:
        order: Names of samplers, in the order in which they are applied.
        used: Those of them that have an effect.
        mirostat: Whether Mirostat is used.
        skewed: Whether skew is used.
    """

    __slots__ = (
        "_eta", "_key", "_mu", "_next_mu", "_own", "_position", "_tau", "mirostat", "order", "skewed", "used",
    )  # fmt: skip

    def __init__(self, params: SamplingParams, seed: int) -> None:
        self.order = _order(params)
        self.used = _used(params)
        self.mirostat = "MIROSTAT" in self.used
        self.skewed = params.skew != 0.0
        self._own = tuple(float(getattr(params, name)) for name in _OWN)
        self._key = mix64(seed ^ _OTHER_STREAM)
        self._tau, self._eta = params.mirostat_tau, params.mirostat_eta
        self._position = 0
        self._mu = self._next_mu = 2.0 * params.mirostat_tau

    @classmethod
    def of(cls, params: SamplingParams, seed: int) -> Warping | None:
        """Return the samplers of a request, or None where `Sampler` can do without them.

        That is a greedy request, and one that samples only by temperature, top_k, top_p, min_p and typical_p
        in this order, which the sampler does faster by itself.
        """
        if params.greedy:
            return None
        plain = {"TEMPERATURE", "TOP_P_TOP_K", "MIN_P", "TYPICAL_P"}
        moved = bool(params.sampler_priority) or (params.temperature_last and params.temperature != 1.0)
        dynamic = params.dynatemp_min > 0.0 or params.dynatemp_max > 0.0
        if moved or dynamic or params.skew != 0.0 or _used(params) - plain:
            return cls(params, seed)
        return None

    def values(self, position: int) -> tuple[float, ...]:
        """Return the parameters for token number `position` of the completion, in the order of `COLUMN`."""
        if position == self._position + 1:
            self._mu, self._position = self._next_mu, position
        return (*self._own, uniform(self._key, position), self._mu)

    def chose(self, surprise: float) -> None:
        """Update Mirostat with the surprise of the newest token in bits.

        Calling it twice for one token changes nothing.
        """
        self._next_mu = self._mu - self._eta * (surprise - self._tau)


def _used(params: SamplingParams) -> frozenset[str]:
    """The samplers that have an effect; temperature is always among them."""
    asked = {
        "TEMPERATURE": True,
        "TOP_NSIGMA": params.nsigma > 0.0,
        "TOP_P_TOP_K": params.top_k > 0 or params.top_p < 1.0,
        "TOP_A": params.top_a > 0.0,
        "MIN_P": params.min_p > 0.0,
        "TFS": params.tfs < 1.0,
        "ETA_CUTOFF": params.eta_cutoff > 0.0,
        "EPSILON_CUTOFF": params.epsilon_cutoff > 0.0,
        "TYPICAL_P": params.typical_p < 1.0,
        "QUADRATIC": params.smoothing_factor > 0.0,
        "XTC": params.xtc_probability > 0.0,
        "MIROSTAT": params.mirostat_mode == 2,
    }
    return frozenset(name for name, wanted in asked.items() if wanted)


def _order(params: SamplingParams) -> tuple[str, ...]:
    if params.sampler_priority:
        order = [name for name in sampler_order(params.sampler_priority) if name not in FIRST_SAMPLERS]
    else:
        order = list(DEFAULT_ORDER)
    if params.temperature_last:
        order.remove("TEMPERATURE")
        order.insert(order.index("XTC") + 1, "TEMPERATURE")
    return (*order, "MIROSTAT")


@dataclass(slots=True, eq=False)
class SamplingState:
    """State of sampling for one sequence; it lives as long as the sequence and survives preemption.

    Attributes:
        params: Sampling parameters of the request.
        prompt_token_ids: The prompt; shared with the sequence, not copied.
        output_token_ids: The completion; shared with the engine, which appends to it after each step and never removes.
        eos_token_ids: Tokens that end the completion.
        seed: `params.seed` or the engine's own; the completions of one request have different seeds.
        constrained: The completion must match a grammar.
        grammar_mask: Tokens that the grammar allows next, set before each step. It already respects min_tokens (see
            `engine.guidance`).
        plain: Only the argmax of the logits is needed, at every step.
        penalised: The request has penalties, a bias or masks of its own.
        filters: temperature, top_k, top_p, min_p and typical_p.
        bias: Token ids and the values to add to their logits; None without a bias.
        ending_ids: Tokens that would end the completion; they are masked while it is shorter than min_tokens.
        allowed: The only tokens that can be chosen; None means all.
        repetition: State of the rules against repetition; None where the request has none.
        warping: State of the rarer samplers; None where the request uses none.
    """

    params: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: list[int]
    eos_token_ids: tuple[int, ...]
    seed: int
    constrained: bool = False
    grammar_mask: npt.NDArray[np.uint32] | None = field(init=False, repr=False, default=None)
    plain: bool = field(init=False, repr=False)
    penalised: bool = field(init=False, repr=False)
    filters: tuple[float, int, float, float, float] = field(init=False, repr=False)
    bias: tuple[Ids, Weights] | None = field(init=False, repr=False, default=None)
    ending_ids: Ids = field(init=False, repr=False)
    allowed: Ids | None = field(init=False, repr=False, default=None)
    repetition: Repetition | None = field(init=False, repr=False)
    warping: Warping | None = field(init=False, repr=False)
    _key: int = field(init=False, repr=False)
    _all_counts: TokenCounts | None = field(init=False, repr=False, default=None)
    _output_counts: TokenCounts | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        params = self.params
        if params.logit_bias:
            biases = sorted(params.logit_bias.items())
            self.bias = (
                np.array([token for token, _ in biases], np.int64),
                np.array([amount for _, amount in biases], np.float32),
            )
        if params.allowed_token_ids is not None:
            self.allowed = np.array(sorted(set(params.allowed_token_ids)), np.int64)
        self.repetition = Repetition.of(params, self.prompt_token_ids)
        self.warping = Warping.of(params, self.seed)
        self.penalised = (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
            or self.bias is not None
            or self.allowed is not None
            or self.repetition is not None
        )
        self.plain = (
            params.greedy
            and not self.penalised
            and not self.constrained
            and params.min_tokens == 0
            and params.logprobs is None
        )
        self.filters = (params.temperature, params.top_k, params.top_p, params.min_p, params.typical_p)
        ending_ids = set(params.stop_token_ids) | (set() if params.ignore_eos else set(self.eos_token_ids))
        self.ending_ids = np.array(sorted(ending_ids), np.int64)
        self._key = mix64(self.seed)

    @property
    def too_short(self) -> bool:
        """Whether the completion may not end yet."""
        return len(self.output_token_ids) < self.params.min_tokens

    @property
    def edited(self) -> bool:
        """Whether the logits of this step need penalties, a bias or a mask."""
        return self.penalised or self.too_short or self.constrained

    @property
    def uniform(self) -> float:
        """The random number in [0, 1) of this position."""
        return uniform(self._key, len(self.output_token_ids))

    @property
    def all_counts(self) -> TokenCounts:
        """Counts of the tokens of prompt and completion."""
        if self._all_counts is None:
            self._all_counts = TokenCounts(self.prompt_token_ids)
        self._all_counts.follow(self.output_token_ids)
        return self._all_counts

    @property
    def output_counts(self) -> TokenCounts:
        """Counts of the tokens of the completion."""
        if self._output_counts is None:
            self._output_counts = TokenCounts()
        self._output_counts.follow(self.output_token_ids)
        return self._output_counts
