"""Rows of logits and the distributions made of them: edits, filters, and the draw.

`mass` is [S, V] float32: the probabilities of a row up to a factor, scaled so that the best token has 1. A
filter sets the mass of what it removes to 0. It compares with a threshold, so that tokens of equal
probability are kept or removed together. Apart from such ties (where transformers' top-p drops an arbitrary
token) each filter keeps what the warper of the same name in transformers keeps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

INVALID = -1
"""Token of a row that has none, because its best score is NaN or infinite."""

_AMOUNTS = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0.0, -np.inf
)
_AMOUNTS = _AMOUNTS.astype(np.float32)
"""For each byte of a mask, 0 for the bits that are set and -inf for the others. Bit 0 comes first."""

Ids = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float32]


class TokenCounts:
    """Counts of token ids: two parallel arrays, updated with new tokens only."""

    __slots__ = ("_counts", "_followed", "_ids", "_slots")

    def __init__(self, token_ids: Sequence[int] = ()) -> None:
        self._ids, counts = np.unique(np.array(token_ids, np.int64), return_counts=True)
        self._counts = counts.astype(np.float32)
        self._slots = {token: slot for slot, token in enumerate(self._ids.tolist())}
        self._followed = 0

    @property
    def ids(self) -> Ids:
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> Weights:
        return self._counts[: len(self._slots)]

    def follow(self, growing: list[int]) -> None:
        """Count the tokens appended to this list since the last call."""
        for token_id in growing[self._followed :]:
            slot = self._slots.setdefault(token_id, len(self._slots))
            if slot == len(self._ids):
                growth = max(64, slot)
                self._ids = np.concatenate((self._ids, np.zeros(growth, np.int64)))
                self._counts = np.concatenate((self._counts, np.zeros(growth, np.float32)))
            self._ids[slot] = token_id
            self._counts[slot] += 1.0
        self._followed = len(growing)


class LogitsEdits:
    """Changes of one kind to single logits, collected row by row on the host and applied in one indexed write.

    An id may occur only once in a row. Ids outside the vocabulary, as image placeholders may be, are ignored.
    """

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._ids: list[Ids] = []
        self._values: list[Weights | float] = []

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, row: int, token_ids: Ids, values: Weights | float) -> None:
        self._rows.append(row)
        self._ids.append(token_ids)
        self._values.append(values)

    def penalise_repetition(self, scores: Tensor) -> None:
        """Divide positive logits [S, V] and multiply the others (Keskar et al. 2019, CTRL, section 4.1)."""
        flat, where, penalty = self._on(scores)
        old = flat.index_select(0, where)
        flat.scatter_(0, where, torch.where(old < 0, old * penalty, old / penalty))

    def shift(self, scores: Tensor) -> None:
        """Add the values; -inf masks. NaN and +inf become NaN, so that the row is recognised as invalid."""
        flat, where, amount = self._on(scores)
        flat.scatter_(0, where, flat.index_select(0, where) + amount)

    def mask_others(self, scores: Tensor) -> None:
        """In the rows that were added, mask all tokens but those that were added, as `shift` would."""
        flat, where, _ = self._on(scores)
        rows = torch.tensor(self._rows, dtype=torch.int64).to(scores.device, non_blocking=True)
        best = scores.index_select(0, rows).amax(-1)
        bad = torch.zeros_like(scores[:, 0]).index_copy_(0, rows, best - best)  # 0 for a sound row, else NaN
        kept = flat.index_select(0, where) + bad[where // scores.shape[-1]]
        scores.index_fill_(0, rows, -torch.inf)
        flat.scatter_(0, where, kept)

    def _on(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        vocab_size = scores.shape[-1]
        ids = np.concatenate(self._ids)
        where = ids + np.repeat(np.array(self._rows) * vocab_size, [len(ids) for ids in self._ids])
        values = np.concatenate(
            [
                value if isinstance(value, np.ndarray) else np.full(len(ids), value, np.float32)
                for ids, value in zip(self._ids, self._values, strict=True)
            ]
        )
        known = (ids >= 0) & (ids < vocab_size)
        if not known.all():
            where, values = where[known], values[known]
        on_device = [
            torch.from_numpy(array).to(scores.device, non_blocking=True) for array in (where, values)
        ]
        return scores.view(-1), on_device[0], on_device[1]


def keep_only(scores: Tensor, rows: Sequence[int], masks: npt.NDArray[np.uint32]) -> None:
    """Mask all but a set of tokens in some rows, as `LogitsEdits.shift` would.

    Args:
        scores: [S, V], changed in place.
        rows: Rows to mask.
        masks: [len(rows), words]; bit t % 32 of word t // 32 keeps token t.
    """
    vocab_size = scores.shape[-1]
    if scores.device.type == "cpu":  # several times faster than anything in torch
        array = scores.numpy()
        with np.errstate(invalid="ignore"):  # +inf becomes NaN
            for row, mask in zip(rows, masks, strict=True):
                array[row] += np.take(_AMOUNTS, mask.view(np.uint8), axis=0).reshape(-1)[:vocab_size]
        return
    words = torch.from_numpy(masks.view(np.int32)).to(scores.device, non_blocking=True)
    where = torch.tensor(rows, dtype=torch.int64).to(scores.device, non_blocking=True)
    some = scores[where]
    scores[where] = torch.where(unpacked(words, vocab_size), some, some - torch.inf)


def unpacked(words: Tensor, size: int) -> Tensor:
    """Unpack the bits of 32-bit words [S, W] to booleans [S, size], on the words' own device."""
    places = torch.arange(32, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> places) & 1).flatten(1)[:, :size].bool()


def best(scores: Tensor) -> Tensor:
    """Return the lowest id of the highest score of each row, [S] int64; INVALID where that score is not finite."""
    if scores.device.type == "cpu":  # numpy's is several times faster than torch's
        ids = torch.from_numpy(scores.detach().float().numpy().argmax(-1))
        values = scores.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    else:
        values, ids = scores.max(dim=-1)
    return torch.where(values.isfinite(), ids, INVALID)


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
