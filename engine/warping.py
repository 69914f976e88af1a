"""Which of `engine.warpers` a request asks for, in which order, and what Mirostat remembers of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.distribution import masses, mix64, uniform
from engine.sampling_params import FIRST_SAMPLERS, SamplingParams, sampler_order
from engine.warpers import WARPERS, skewed

_OTHER_STREAM = 0xD1B54A32D192ED03
"""Sets XTC's random numbers apart from those of the draw."""

_OWN = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "top_a", "tfs", "eta_cutoff", "epsilon_cutoff",
    "smoothing_factor", "smoothing_curve", "dynatemp_min", "dynatemp_max", "dynatemp_exponent", "xtc_threshold",
    "xtc_probability", "nsigma", "skew",
)  # fmt: skip
_COLUMN = {name: place for place, name in enumerate((*_OWN, "xtc_number", "mu"))}


class Warping:
    """One request's samplers; lives with its sequence, see `SamplingState`.

    order: names in WARPERS, as they are applied; those in `used` do something.
    """

    __slots__ = (
        "_eta",
        "_key",
        "_mu",
        "_next_mu",
        "_own",
        "_position",
        "_tau",
        "mirostat",
        "order",
        "skewed",
        "used",
    )

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
        """None for a request that samples only by temperature, top_k, top_p, min_p and typical_p in this order,
        which the sampler does faster by itself, and for a greedy one."""
        if params.greedy:
            return None
        plain = {"TEMPERATURE", "TOP_P_TOP_K", "MIN_P", "TYPICAL_P"}
        moved = bool(params.sampler_priority) or (params.temperature_last and params.temperature != 1.0)
        dynamic = params.dynatemp_min > 0.0 or params.dynatemp_max > 0.0
        if moved or dynamic or params.skew != 0.0 or _used(params) - plain:
            return cls(params, seed)
        return None

    def values(self, position: int) -> tuple[float, ...]:
        """The parameters for token number `position` of the answer, in the order of `_COLUMN`."""
        if position == self._position + 1:
            self._mu, self._position = self._next_mu, position
        return (*self._own, uniform(self._key, position), self._mu)

    def chose(self, surprise: float) -> None:
        """Mirostat learns how many bits the newest token surprised by; once more for one token changes nothing."""
        self._next_mu = self._mu - self._eta * (surprise - self._tau)


class _Columns:
    def __init__(self, table: Tensor) -> None:
        self._table = table

    def __getitem__(self, name: str) -> Tensor:
        place = _COLUMN[name]
        return self._table[:, place : place + 1]

    def rows(self, rows: Tensor) -> _Columns:
        return _Columns(self._table[rows])


def warp(scores: Tensor, warpings: Sequence[Warping], values: Tensor) -> Tensor:
    """Each row's mass, as `engine.distribution` has it, after its samplers.

    scores: [S, V] float32, after penalties and masks. values: [S, columns] float64 on the same device, a row of
    `Warping.values` each. A row with a NaN or +inf, or of -inf alone, becomes one with a NaN.
    """
    own = _Columns(values)
    best = scores.amax(-1, keepdim=True)
    scores = scores.float() - best
    orders: dict[tuple[str, ...], list[int]] = {}
    for row, warping in enumerate(warpings):
        orders.setdefault(warping.order, []).append(row)
    for order, members in orders.items():
        for name in order:
            asking = [row for row in members if name in warpings[row].used]
            if len(asking) == len(scores):
                scores = WARPERS[name](scores, own)
            elif asking:
                rows = torch.tensor(asking, dtype=torch.int64).to(scores.device, non_blocking=True)
                scores.index_copy_(0, rows, WARPERS[name](scores[rows], own.rows(rows)))
    mass = masses(scores, torch.ones_like(best))
    bent = [row for row, warping in enumerate(warpings) if warping.skewed]
    if bent:
        rows = torch.tensor(bent, dtype=torch.int64).to(scores.device, non_blocking=True)
        mass.index_copy_(0, rows, skewed(mass[rows], own.rows(rows)["skew"]))
    return mass


def surprises(mass: Tensor, tokens: Tensor) -> Tensor:
    """Of the drawn tokens [S], in bits: what Mirostat learns from."""
    drawn = mass.gather(-1, tokens.clamp_min(0).unsqueeze(-1)).double()
    return (mass.sum(-1, keepdim=True, dtype=torch.float64).log2() - drawn.log2()).squeeze(-1)


def _used(params: SamplingParams) -> frozenset[str]:
    """The warpers that do something, the temperature among them."""
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
        order = [name for name in WARPERS if name != "MIROSTAT"]
    if params.temperature_last:
        order.remove("TEMPERATURE")
        order.insert(order.index("XTC") + 1, "TEMPERATURE")
    return (*order, "MIROSTAT")
