"""Samplers that reshape a distribution, each as published, and the order in which a request applies them.

`scores` is [S, V] float32, the logits of a row minus their maximum: the best token has 0, a removed one -inf.
`own` holds the parameters of the rows by the names of SamplingParams, [S, 1] float64. Each sampler returns
new scores, and treats rows independently. A sampler removes tokens by a threshold, so that tokens of equal
probability are kept or removed together, and never removes the best token (only typical sampling and XTC
may).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from engine.logits import (
    SMALLEST_TEMPERATURE,
    falling,
    keep_typical,
    lowest_kept,
    masses,
    mix64,
    uniform,
)
from engine.sampling_params import FIRST_SAMPLERS, SamplingParams, sampler_order

_OTHER_STREAM = 0xD1B54A32D192ED03
"""Separates XTC's random numbers from those of the draw."""

_OWN = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "top_a", "tfs", "eta_cutoff", "epsilon_cutoff",
    "smoothing_factor", "smoothing_curve", "dynatemp_min", "dynatemp_max", "dynatemp_exponent", "xtc_threshold",
    "xtc_probability", "nsigma", "skew",
)  # fmt: skip
_COLUMN = {name: place for place, name in enumerate((*_OWN, "xtc_number", "mu"))}


class Warping:
    """The samplers of one request; it lives as long as its sequence (see `SamplingState`).

    Attributes:
        order: Names in WARPERS, in the order in which they are applied.
        used: Those of them that have an effect.
        mirostat: Whether Mirostat is used.
        skewed: Whether skew is used.
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
        """Return the parameters for token number `position` of the completion, in the order of `_COLUMN`."""
        if position == self._position + 1:
            self._mu, self._position = self._next_mu, position
        return (*self._own, uniform(self._key, position), self._mu)

    def chose(self, surprise: float) -> None:
        """Update Mirostat with the surprise of the newest token in bits.

        Calling it twice for one token changes nothing.
        """
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
    """Apply each row's samplers.

    Args:
        scores: [S, V] float32, after penalties and masks.
        warpings: The samplers of each row.
        values: [S, columns] float64 on the same device, one row of `Warping.values` for each.

    Returns:
        The mass of each row, as in `engine.logits`. A row with a NaN or +inf, or with nothing but -inf,
            becomes one with a NaN.
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
    """Return the surprise of the drawn tokens [S] in bits, from which Mirostat learns."""
    drawn = mass.gather(-1, tokens.clamp_min(0).unsqueeze(-1)).double()
    return (mass.sum(-1, keepdim=True, dtype=torch.float64).log2() - drawn.log2()).squeeze(-1)


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
        order = [name for name in WARPERS if name != "MIROSTAT"]
    if params.temperature_last:
        order.remove("TEMPERATURE")
        order.insert(order.index("XTC") + 1, "TEMPERATURE")
    return (*order, "MIROSTAT")


class RowParameters(Protocol):
    """Parameters of the rows, by name."""

    def __getitem__(self, name: str) -> Tensor: ...


def temperature(scores: Tensor, own: RowParameters) -> Tensor:
    """Apply temperature, or dynamic temperature (kalomaze) with dynatemp_min or dynatemp_max.

    Dynamic temperature lies between the two bounds, by the entropy as a part of the greatest possible one, to
    the power of dynatemp_exponent.
    """
    low, high = own["dynatemp_min"], own["dynatemp_max"]
    mass = scores.exp()
    possible = (scores > -torch.inf).sum(-1, keepdim=True).double().log()
    part = (_entropy(scores, mass) / possible).nan_to_num(0.0).clamp(0.0, 1.0)
    dynamic = low + (high - low) * part ** own["dynatemp_exponent"]
    temperature = torch.where((low > 0.0) | (high > 0.0), dynamic, own["temperature"])
    return scores / temperature.clamp_min(SMALLEST_TEMPERATURE).float()


def top_nsigma(scores: Tensor, own: RowParameters) -> Tensor:
    """Keep the logits within nsigma standard deviations of the best (Tang et al. 2024, top-nσ)."""
    there = scores > -torch.inf
    count = there.sum(-1, keepdim=True).double()
    wide = torch.where(there, scores, 0.0).double()
    mean = wide.sum(-1, keepdim=True) / count
    squares = torch.where(there, (wide - mean) ** 2, 0.0).sum(-1, keepdim=True)
    sigma = (squares / (count - 1.0).clamp_min(1.0)).sqrt()
    return _cut(scores, scores >= (-own["nsigma"] * sigma).float())


def top_k_top_p(scores: Tensor, own: RowParameters) -> Tensor:
    """Top-k, then nucleus sampling (Holtzman et al. 2020)."""
    mass = scores.exp()
    top_k = own["top_k"].long()
    top_k = torch.where(top_k > 0, top_k, mass.shape[-1]).clamp_max(mass.shape[-1])
    return _cut(scores, mass >= lowest_kept(mass, top_k, own["top_p"]))


def top_a(scores: Tensor, own: RowParameters) -> Tensor:
    """Keep tokens with at least top_a times the square of the best probability (BlinkDL, RWKV-LM)."""
    mass = scores.exp()
    least = own["top_a"] / mass.sum(-1, keepdim=True, dtype=torch.float64)
    return _cut(scores, mass >= least.clamp_max(1.0).float())


def min_p(scores: Tensor, own: RowParameters) -> Tensor:
    """Keep tokens with at least min_p times the best probability (Nguyen et al. 2024)."""
    return _cut(scores, scores.exp() >= own["min_p"].float())


def tail_free(scores: Tensor, own: RowParameters) -> Tensor:
    """Cut off the tail where the curvature of the sorted probabilities is used up (Phénix and Egan 2019)."""
    mass = scores.exp()
    if mass.shape[-1] < 3:
        return scores
    ordered = falling(mass, mass.shape[-1]).double()
    curvature = ordered.diff().diff().abs()
    reached = (curvature / curvature.sum(-1, keepdim=True)).cumsum(-1)
    last = (reached <= own["tfs"]).sum(-1, keepdim=True)
    last = torch.where(reached.isnan().any(-1, keepdim=True), mass.shape[-1] - 1, last)
    return _cut(scores, mass >= ordered.gather(-1, last).float())


def eta(scores: Tensor, own: RowParameters) -> Tensor:
    """Keep probabilities of at least min(eta, sqrt(eta) exp(-entropy)) (Hewitt et al. 2022).

    eta is eta_cutoff * 1e-4.
    """
    cutoff = own["eta_cutoff"] * 1e-4
    mass = scores.exp()
    return _above(scores, mass, torch.minimum(cutoff, cutoff.sqrt() * (-_entropy(scores, mass)).exp()))


def epsilon(scores: Tensor, own: RowParameters) -> Tensor:
    """Keep probabilities of at least epsilon_cutoff * 1e-4 (Hewitt et al. 2022)."""
    return _above(scores, scores.exp(), own["epsilon_cutoff"] * 1e-4)


def typical(scores: Tensor, own: RowParameters) -> Tensor:
    """Locally typical sampling (Meister et al. 2022)."""
    return _rescaled(_cut(scores, keep_typical(scores.exp(), own["typical_p"]) > 0.0))


def quadratic(scores: Tensor, own: RowParameters) -> Tensor:
    """Apply quadratic sampling (kalomaze).

    x, a logit minus the best, becomes -k x² + s x³ with k = factor (3 - curve) / 2 and s = factor (curve - 1)
    / 2.
    """
    factor, curve = own["smoothing_factor"], own["smoothing_curve"]
    k, s = (factor * (3.0 - curve) / 2.0).float(), (factor * (curve - 1.0) / 2.0).float()
    x = scores.clamp_min(-1e4)
    bent = x * x * (s * x - k)
    bent = torch.where(scores.isneginf(), -torch.inf, bent)
    return _rescaled(bent)


def xtc(scores: Tensor, own: RowParameters) -> Tensor:
    """Apply XTC (p-e-w, text-generation-webui pull request 6335).

    With xtc_probability, of the tokens that reach xtc_threshold all but the least probable are removed.
    `xtc_number` is the random number of the position, in [0, 1).
    """
    mass = scores.exp()
    least = own["xtc_threshold"] * mass.sum(-1, keepdim=True, dtype=torch.float64)
    choices = (mass >= least.float()) & (scores > -torch.inf)
    lowest = torch.where(choices, mass, torch.inf).amin(-1, keepdim=True)
    happens = own["xtc_number"] < own["xtc_probability"]
    return _rescaled(_cut(scores, ~happens | ~choices | (mass <= lowest)))


def mirostat(scores: Tensor, own: RowParameters) -> Tensor:
    """Keep tokens with a surprise of at most mu bits (Mirostat 2, Basu et al. 2021)."""
    mass = scores.exp()
    total = mass.sum(-1, keepdim=True, dtype=torch.float64)
    return _cut(scores, (mass >= (total * torch.exp2(-own["mu"])).clamp_max(1.0)))


def skewed(mass: Tensor, skew: Tensor) -> Tensor:
    """Skew a distribution (turboderp, exllamav2).

    Args:
        mass: [S, V].
        skew: [S, 1] float64. Above 0 it favours unlikely tokens; 0 changes nothing.

    Returns:
        The mass whose cumulative distribution, the likeliest token first, is the old one to the power of
            exp(skew).
    """
    if mass.device.type == "cpu":  # numpy's sort is tens of times faster than torch's
        order = torch.from_numpy((-mass.detach().numpy()).argsort(-1))
    else:
        order = mass.argsort(dim=-1, descending=True)
    reached = mass.gather(-1, order).double().cumsum(-1)
    reached = (reached / reached[:, -1:]) ** skew.exp()
    bent = reached.diff(prepend=torch.zeros_like(reached[:, :1])).float()
    return torch.where(skew == 0.0, mass, torch.zeros_like(mass).scatter_(-1, order, bent))


WARPERS: Mapping[str, Callable[[Tensor, RowParameters], Tensor]] = {
    "TEMPERATURE": temperature,
    "TOP_NSIGMA": top_nsigma,
    "TOP_P_TOP_K": top_k_top_p,
    "TOP_A": top_a,
    "MIN_P": min_p,
    "TFS": tail_free,
    "ETA_CUTOFF": eta,
    "EPSILON_CUTOFF": epsilon,
    "TYPICAL_P": typical,
    "QUADRATIC": quadratic,
    "XTC": xtc,
    "MIROSTAT": mirostat,
}
"""Samplers by their names in `sampler_priority`, in their default order; Mirostat always comes last."""


def _cut(scores: Tensor, kept: Tensor) -> Tensor:
    return scores.masked_fill(~kept, -torch.inf)


def _rescaled(scores: Tensor) -> Tensor:
    """Shift the scores so that the best remaining token has 0."""
    return scores - scores.amax(-1, keepdim=True)


def _above(scores: Tensor, mass: Tensor, least: Tensor) -> Tensor:
    """Keep the best token and probabilities of at least `least` [S, 1]."""
    total = mass.sum(-1, keepdim=True, dtype=torch.float64)
    return _cut(scores, mass >= (least * total).clamp_max(1.0).float())


def _entropy(scores: Tensor, mass: Tensor) -> Tensor:
    """The entropy of each row in nats, [S, 1] float64: log Z minus the mean score."""
    total = mass.sum(-1, keepdim=True, dtype=torch.float64)
    weighed = torch.where(mass > 0.0, mass * scores, 0.0).sum(-1, keepdim=True, dtype=torch.float64)
    return total.log() - weighed / total
