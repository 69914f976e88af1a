"""From a row of logits to a token: edits of single logits, filters of the distribution, and the draw.

All functions are vectorised over rows. `scores` are float32 logits [S, V]; a masked token is -inf. A filter
is a threshold on the score of a token, so tokens of equal score stay or go together (transformers' top-p
drops an arbitrary one of them; the others agree with transformers exactly).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

INVALID = -1
"""Stands for the token of a row that has none: its best score is NaN or infinite."""

_BLOCK = 256
_SMALLEST_TEMPERATURE = 1e-30
_MASK64 = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15

Ids = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float32]


class TokenCounts:
    """How often each token id occurred, as two parallel arrays that grow by what is new."""

    __slots__ = ("_counts", "_ids", "_slots")

    def __init__(self, token_ids: Iterable[int] = ()) -> None:
        tokens = np.fromiter(token_ids, np.int64)
        self._ids, counts = np.unique(tokens, return_counts=True)
        self._counts = counts.astype(np.float32)
        self._slots = {token: slot for slot, token in enumerate(self._ids.tolist())}

    @property
    def ids(self) -> Ids:
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> Weights:
        return self._counts[: len(self._slots)]

    def add(self, token_id: int) -> None:
        slot = self._slots.setdefault(token_id, len(self._slots))
        if slot == len(self._ids):
            room = max(64, slot)
            self._ids = np.concatenate((self._ids, np.zeros(room, np.int64)))
            self._counts = np.concatenate((self._counts, np.zeros(room, np.float32)))
        self._ids[slot] = token_id
        self._counts[slot] += 1.0


class Edits:
    """Changes to single logits, gathered row by row on the host and applied with one indexed write."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._where: list[Ids] = []
        self._what: list[Weights] = []

    def add(self, row: int, token_ids: Ids, values: Weights | float) -> None:
        """Ids outside the vocabulary are left out (picture placeholders may lie there)."""
        known = (token_ids >= 0) & (token_ids < self._vocab_size)
        weights = np.broadcast_to(np.asarray(values, np.float32), token_ids.shape)
        if not known.all():
            token_ids, weights = token_ids[known], weights[known]
        self._where.append(token_ids + row * self._vocab_size)
        self._what.append(weights)

    def __bool__(self) -> bool:
        return bool(self._where)

    def penalise_repetition(self, scores: Tensor) -> None:
        """Divide positive logits and multiply the others (Keskar et al. 2019, CTRL, section 4.1)."""
        flat, where, penalty = self._on(scores)
        old = flat[where]
        flat[where] = torch.where(old < 0, old * penalty, old / penalty)

    def shift(self, scores: Tensor) -> None:
        flat, where, amount = self._on(scores)
        flat[where] += amount

    def mask(self, scores: Tensor) -> None:
        flat, where, _ = self._on(scores)
        flat[where] = -torch.inf

    def _on(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        where = torch.from_numpy(np.concatenate(self._where))
        what = torch.from_numpy(np.concatenate(self._what))
        return scores.view(-1), where.to(scores.device), what.to(scores.device)


def best(scores: Tensor) -> Tensor:
    """The lowest id among the highest scores of each row, [S] int64; INVALID where that is not finite."""
    values, ids = scores.max(dim=-1)
    return torch.where(values.isfinite(), ids, INVALID)


def temper(scores: Tensor, temperature: Tensor) -> Tensor:
    """Scores over temperature [S, 1], shifted so that each row's best is 0: none overflows."""
    return (scores - scores.amax(-1, keepdim=True)) / temperature.clamp_min(_SMALLEST_TEMPERATURE)


def threshold(scores: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The lowest score [S, 1] that survives top-k and then top-p (Holtzman et al. 2020).

    top_k: [S, 1] int64 from 1 to V, V is all. top_p: [S, 1] float64, 1 is all. `scores` as from `temper`.
    """
    ordered = scores.sort(dim=-1, descending=True).values
    kth = ordered.gather(-1, top_k - 1)
    mass = ordered.exp().masked_fill_(ordered < kth, 0.0).double()
    above = mass.cumsum(-1) - mass
    kept = (above < top_p * mass.sum(-1, keepdim=True)).sum(-1, keepdim=True).clamp_min(1)
    return torch.where(top_p < 1.0, torch.maximum(ordered.gather(-1, kept - 1), kth), kth)


def keep_typical(scores: Tensor, typical_p: Tensor) -> Tensor:
    """Mask all but the tokens whose surprise is nearest the row's entropy (Meister et al. 2022).

    typical_p: [S, 1] float64, the mass to keep; 1 is all.
    """
    logprobs = scores.log_softmax(-1)
    entropy = -(logprobs * logprobs.exp()).nansum(-1, keepdim=True)
    distance = (-logprobs - entropy).abs()
    ordered, order = distance.sort(dim=-1)
    reached = logprobs.exp().gather(-1, order).double().cumsum(-1)
    last = (reached < typical_p).sum(-1, keepdim=True).clamp_max(scores.shape[-1] - 1)
    return scores.masked_fill((distance > ordered.gather(-1, last)) & (typical_p < 1.0), -torch.inf)


def pick(scores: Tensor, uniform: Tensor) -> Tensor:
    """The token [S] at which the cumulative distribution in id order first exceeds `uniform` [S, 1] float64.

    Sums run in float64 over blocks of ids and then inside one block. A token of no mass is never picked;
    INVALID where a row has a NaN or no mass at all.
    """
    rows, vocab_size = scores.shape
    mass = (scores - scores.amax(-1, keepdim=True)).exp()
    mass = torch.nn.functional.pad(mass, (0, -vocab_size % _BLOCK)).view(rows, -1, _BLOCK)
    reached = mass.sum(-1, dtype=torch.float64).cumsum(-1)
    total = reached[:, -1:]
    goal = uniform * total
    block = _first_above(reached, goal)
    before = torch.where(block > 0, reached.gather(-1, (block - 1).clamp_min(0)), 0.0)
    inside = mass.gather(1, block.unsqueeze(-1).expand(-1, 1, _BLOCK)).squeeze(1).double().cumsum(-1)
    token = (block * _BLOCK + _first_above(inside, goal - before)).squeeze(-1)
    return torch.where(total.squeeze(-1).isfinite(), token, INVALID)


def _first_above(reached: Tensor, goal: Tensor) -> Tensor:
    """The first index [S, 1] where `reached` exceeds `goal`, at most the last one that adds anything."""
    last = (reached < reached[:, -1:]).sum(-1, keepdim=True)
    return torch.minimum((reached <= goal).sum(-1, keepdim=True), last).clamp_max(reached.shape[-1] - 1)


def mix64(value: int) -> int:
    """splitmix64's output function (Steele, Lea and Flood 2014): a bijection of 64-bit numbers."""
    value &= _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def uniform(key: int, counter: int) -> float:
    """The number in [0, 1), of 53 bits, that belongs to (key, counter); `key` is a mixed seed."""
    return (mix64(key + (counter + 1) * _GOLDEN_GAMMA) >> 11) * 2.0**-53
