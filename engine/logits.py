"""Rows of logits: changes to single logits, and the best token of each row."""

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
"""For each byte of a mask, 0 for the bits that are set and -inf for the others. Bit 0 comes first."""
_AMOUNTS = _AMOUNTS.astype(np.float32)
"""Of each byte of a mask: 0 for the bits that are set, -inf for the others. Bit 0 comes first."""

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
