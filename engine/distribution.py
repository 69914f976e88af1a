"""From scores to a drawn token: temperature, filters of the distribution, and the draw.

`mass` is [S, V] float32: the probabilities of a row up to a factor, scaled so that the best token has 1. A
filter sets the mass of what it removes to 0. It compares with a threshold, so that tokens of equal
probability are kept or removed together. Apart from such ties (where transformers' top-p drops an arbitrary
token) each filter keeps what the warper of the same name in transformers keeps.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.logits import INVALID

SMALLEST_TEMPERATURE = 1e-30
_PREFIX = 512
_BLOCK = 64
_MASK64 = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def masses(scores: Tensor, temperature: Tensor) -> Tensor:
    """Compute exp(scores / temperature), scaled to a maximum of 1, so that no temperature overflows.

    A row with a NaN or +inf, or with nothing but -inf, becomes one with a NaN.

    Args:
        scores: [S, V].
        temperature: [S, 1].
    """
    shifted = scores.float() - scores.amax(-1, keepdim=True)
    return shifted.div_(temperature.clamp_min(SMALLEST_TEMPERATURE).float()).exp_()


def keep_likeliest(mass: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, *, ordered: bool) -> Tensor:
    """Apply top_k, then top_p (Holtzman et al. 2020), then min_p (Nguyen et al. 2024).

    Args:
        mass: [S, V].
        top_k: [S, 1] float64 from 1 to V; V keeps all.
        top_p: [S, 1] float64; 1 keeps all.
        min_p: [S, 1] float64; 0 keeps all. It compares with the best token, so it shares the cut of the
            others.
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
    everything = torch.where(
        limited, kept.sum(-1, keepdim=True), mass.sum(-1, keepdim=True, dtype=kept.dtype)
    )
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


def pick(mass: Tensor, uniform: Tensor) -> Tensor:
    """Draw the token at which the cumulative distribution, in the order of ids, first exceeds `uniform`.

    Sums run in float64 over blocks of ids and then inside one block. A token without mass is never drawn.

    Args:
        mass: [S, V].
        uniform: [S, 1] float64 in [0, 1).

    Returns:
        Tokens [S]; INVALID where a row has a NaN.
    """
    rows, vocab_size = mass.shape
    if vocab_size % _BLOCK:
        mass = torch.nn.functional.pad(mass, (0, -vocab_size % _BLOCK))
    blocks = mass.view(rows, -1, _BLOCK)
    reached = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    total = reached[:, -1:]
    goal = uniform * total
    block = _first_above(reached, goal)
    before = torch.where(block > 0, reached.gather(-1, (block - 1).clamp_min(0)), 0.0)
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, 1, _BLOCK)).squeeze(1).double().cumsum(-1)
    token = block * _BLOCK + _first_above(inside, goal - before)
    return torch.where(total.isfinite(), token, INVALID).squeeze(-1)


def _first_above(reached: Tensor, goal: Tensor) -> Tensor:
    """The first index [S, 1] where `reached` exceeds `goal`, at most the last one that adds anything."""
    last = (reached < reached[:, -1:]).sum(-1, keepdim=True)
    return torch.minimum((reached <= goal).sum(-1, keepdim=True), last)


def mix64(value: int) -> int:
    """Apply splitmix64's output function (Steele, Lea and Flood 2014), a bijection of 64-bit numbers."""
    value &= _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def uniform(key: int, counter: int) -> float:
    """Return element `counter` of splitmix64's sequence for `key`: a number in [0, 1) with 53 bits."""
    return (mix64(key + (counter + 1) * _GOLDEN_GAMMA) >> 11) * 2.0**-53
