"""Samplers that reshape a distribution, each as published; a request's samplers are in its `Warping`.

`mass` is [S, V] float32: the probabilities of a row up to a factor, scaled so that the best token has 1. A filter sets
the mass of what it removes to 0. Apart from ties (where transformers' top-p drops an arbitrary token) each filter keeps
what the warper of the same name in transformers keeps.

`scores` is [S, V] float32, the logits of a row minus their maximum: the best token has 0, a removed one -inf. `own`
holds the parameters of the rows by the names of SamplingParams, [S, 1] float64. Each sampler returns new scores, and
treats rows independently. A sampler removes tokens by a threshold, so that tokens of equal probability are kept or
removed together, and never removes the best token (only typical sampling and XTC may).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.sampling_state import COLUMN, Warping

SMALLEST_TEMPERATURE = 1e-30
_PREFIX = 512


class _Columns:
    def __init__(self, table: Tensor) -> None:
        self._table = table

    def __getitem__(self, name: str) -> Tensor:
        place = COLUMN[name]
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
        The mass of each row, scaled to a maximum of 1. A row with a NaN or +inf, or with nothing but -inf,
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
    mass = _rescaled(scores).exp()
    bent = [row for row, warping in enumerate(warpings) if warping.skewed]
    if bent:
        rows = torch.tensor(bent, dtype=torch.int64).to(scores.device, non_blocking=True)
        mass.index_copy_(0, rows, skewed(mass[rows], own.rows(rows)["skew"]))
    return mass


def surprises(mass: Tensor, tokens: Tensor) -> Tensor:
    """Return the surprise of the drawn tokens [S] in bits, from which Mirostat learns."""
    drawn = mass.gather(-1, tokens.clamp_min(0).unsqueeze(-1)).double()
    return (mass.sum(-1, keepdim=True, dtype=torch.float64).log2() - drawn.log2()).squeeze(-1)


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

    x, a logit minus the best, becomes -k x² + s x³ with k = factor (3 - curve) / 2 and s = factor (curve - 1) / 2.
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
        The mass whose cumulative distribution, the likeliest token first, is the old one to the power of exp(skew).
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
"""Samplers by their names."""


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


def keep_likeliest(mass: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, *, ordered: bool) -> Tensor:
    """Apply top_k, then top_p (Holtzman et al. 2020), then min_p (Nguyen et al. 2024).

    Args:
        mass: [S, V].
        top_k: [S, 1] float64 from 1 to V; V keeps all.
        top_p: [S, 1] float64; 1 keeps all.
        min_p: [S, 1] float64; 0 keeps all. It compares with the best token, so it shares the cut of the others.
        ordered: False if no row asks for top_k or top_p, which saves the sort.
    """
    lowest = min_p.float()
    if ordered:
        lowest = torch.maximum(lowest, lowest_kept(mass, top_k.long(), top_p))
    return mass * (mass >= lowest)


def lowest_kept(mass: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Return the smallest mass [S, 1] float32 that survives top-k and top-p.

    Args:
        mass: [S, V].
        top_k: [S, 1] int64 from 1 to V.
        top_p: [S, 1] float64.
    """
    return _lowest_kept(mass, top_k, top_p, _PREFIX if mass.device.type == "cpu" else mass.shape[-1])


def _lowest_kept(mass: Tensor, top_k: Tensor, top_p: Tensor, width: int) -> Tensor:
    """Look at the `width` likeliest tokens only, and at more of them for the rows whose cut lies deeper.

    Asking whether there are such rows costs nothing on a CPU; on other devices `width` must be V.
    """
    vocab_size = mass.shape[-1]
    width = width if 2 * width < vocab_size else vocab_size
    likeliest = falling(mass, width)
    limited = top_k < vocab_size
    kth = torch.where(limited, likeliest.gather(-1, (top_k - 1).clamp_max(width - 1)), 0.0)
    kept = torch.where(likeliest >= kth, likeliest, 0.0).double()
    everything = torch.where(limited, kept.sum(-1, keepdim=True), mass.sum(-1, keepdim=True, dtype=kept.dtype))
    before = kept.cumsum(-1) - kept
    count = (before < top_p * everything).sum(-1, keepdim=True)
    lowest = torch.where(top_p < 1.0, likeliest.gather(-1, (count - 1).clamp_min(0)), 0.0)
    lowest = torch.maximum(lowest, kth)
    if width < vocab_size:
        deeper_k = (kth > 0.0) & (likeliest[:, -1:] >= kth)
        deeper_p = ~limited & (top_p < 1.0) & (count == width)
        rows = (deeper_k | deeper_p).squeeze(-1).nonzero().squeeze(-1)
        if len(rows):
            lowest[rows] = _lowest_kept(mass[rows], top_k[rows], top_p[rows], 16 * width)
    return lowest


def falling(mass: Tensor, width: int) -> Tensor:
    """Return the `width` greatest values of each row in falling order."""
    if mass.device.type != "cpu":
        return mass.sort(-1, descending=True).values[:, :width]
    array = mass.detach().numpy()  # numpy's partition and sort are tens of times faster than torch's
    if width < array.shape[-1]:
        array = np.partition(array, -width, axis=-1)[:, -width:]
    return torch.from_numpy(np.sort(array, axis=-1)[:, ::-1].copy())


def keep_typical(mass: Tensor, typical_p: Tensor) -> Tensor:
    """Keep the tokens whose surprise is nearest to the row's entropy (Meister et al. 2022).

    Args:
        mass: [S, V].
        typical_p: [S, 1] float64 below 1, the probability to keep.
    """
    probs = mass / mass.sum(-1, keepdim=True)
    logprobs = probs.log()
    entropy = -(probs * logprobs).nansum(-1, keepdim=True)
    distance = (logprobs + entropy).abs()
    if mass.device.type == "cpu":
        order = torch.from_numpy(distance.detach().numpy().argsort(-1))
    else:
        order = distance.argsort(-1)
    reached = probs.gather(-1, order).double().cumsum(-1)
    last = (reached < typical_p).sum(-1, keepdim=True).clamp_max(mass.shape[-1] - 1)
    return mass * (distance <= distance.gather(-1, order.gather(-1, last)))
