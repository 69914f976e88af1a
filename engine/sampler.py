"""Chooses the next token of each request in a step, for all rows at once.

The logits of a row are processed in this order: DRY, repetition penalty, presence and frequency penalties, logit bias,
masks (allowed tokens, repeated n-grams, unwanted words, min_tokens, the grammar). Where temperature is 0, argmax
follows; otherwise temperature, top_k, top_p, min_p, typical_p (the order of transformers' `generate`) and the draw.
Requests with other samplers, or another order, use `engine.warping` instead. The draw depends only on the request's
seed and its number of tokens: not on the batch, on preemption, or on how the prompt was cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.messages import Logprobs
from engine.repetition import Ids, Weights
from engine.sampling_state import SamplingState
from engine.warping import SMALLEST_TEMPERATURE, keep_likeliest, keep_typical, surprises, warp

INVALID = -1
"""Token of a row that has none, because its best score is NaN or infinite."""

_AMOUNTS = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0.0, -np.inf)
_AMOUNTS = _AMOUNTS.astype(np.float32)
"""For each byte of a mask, 0 for the bits that are set and -inf for the others. Bit 0 comes first."""

_BLOCK = 64


class Sampler:
    """Chooses tokens for logits of one vocabulary on one device; it keeps no state between steps."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device

    def sample(self, logits: Tensor, states: Sequence[SamplingState]) -> tuple[list[int], list[Logprobs | None]]:
        """Choose the next token of each row, and compute log probabilities where they are asked for.

        Args:
            logits: [B, V] in float32, bfloat16 or float16; not changed.
            states: One state for each row.

        Returns:
            The tokens and the log probabilities of all rows. A row without a valid token (NaN or +inf among
                its logits, or all of them -inf) gets -1 and no log probabilities, which the engine turns into
                an error of that request; the other rows are not affected.
        """
        assert logits.shape == (len(states), self._vocab_size)
        if all(state.plain for state in states):
            return best(logits).tolist(), [None] * len(states)
        tokens = self._choose(logits, states)
        asking = [row for row, state in enumerate(states) if state.params.logprobs is not None]
        if not asking:
            return tokens.tolist(), [None] * len(states)
        counts = [states[row].params.logprobs or 0 for row in asking]
        rows = self._index(asking)
        packed = _pack_logprobs(_select(logits, rows), tokens[rows], max(counts))
        host = torch.cat((tokens.double(), packed.flatten())).tolist()
        chosen = [int(token) for token in host[: len(states)]]
        logprobs: list[Logprobs | None] = [None] * len(states)
        width = packed.shape[1]
        for place, (row, count) in enumerate(zip(asking, counts, strict=True)):
            start = len(states) + place * width
            if chosen[row] >= 0:
                logprobs[row] = _unpack_logprobs(host[start : start + width], count)
        return chosen, logprobs

    def _choose(self, logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
        """Tokens [B] int64; plain, edited, drawn and warped rows each take only the work they need."""
        groups: tuple[list[int], list[int], list[int], list[int]] = ([], [], [], [])
        for row, state in enumerate(states):
            if state.params.greedy:
                groups[1 if state.edited else 0].append(row)
            else:
                groups[2 if state.warping is None else 3].append(row)
        plain, edited, drawn, warped = groups
        if len(plain) == len(states):
            return best(logits)
        tokens = torch.empty(len(states), dtype=torch.int64, device=self._device)
        if plain:
            rows = self._index(plain)
            tokens[rows] = best(logits[rows])
        if edited:
            rows = self._index(edited)
            tokens[rows] = best(self.edit(_select(logits, rows), [states[r] for r in edited]))
        if drawn:
            rows = self._index(drawn)
            tokens[rows] = self._draw(_select(logits, rows), [states[r] for r in drawn])
        if warped:
            rows = self._index(warped)
            tokens[rows] = self._draw_warped(_select(logits, rows), [states[r] for r in warped])
        return tokens

    def edit(self, logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
        """Float32 scores [S, V] after penalties, bias and masks; `logits` itself if there are none."""
        dry, repetition, penalties, bias, mask, allowed = (LogitsEdits() for _ in range(6))
        grammars: dict[int, npt.NDArray[np.uint32]] = {}
        for row, state in enumerate(states):
            if not state.edited:
                continue
            params = state.params
            if state.repetition is not None:
                penalised = state.repetition.penalties(state.output_token_ids)
                if penalised is not None:
                    dry.add(row, penalised[0], -penalised[1])
            if params.repetition_penalty != 1.0:
                repetition.add(row, state.all_counts.ids, params.repetition_penalty)
            if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
                counts = state.output_counts
                amount = params.presence_penalty + params.frequency_penalty * counts.counts
                penalties.add(row, counts.ids, -amount)
            if state.bias is not None:
                bias.add(row, *state.bias)
            if state.allowed is not None:
                allowed.add(row, state.allowed, 0.0)
            banned = None if state.repetition is None else state.repetition.banned(state.output_token_ids)
            if state.grammar_mask is not None:
                grammars[row] = state.grammar_mask
            elif state.too_short:
                banned = state.ending_ids if banned is None else np.union1d(banned, state.ending_ids)
            if banned is not None:
                mask.add(row, banned, -np.inf)
        if not (dry or repetition or penalties or bias or allowed or mask or grammars):
            return logits
        scores = logits.to(torch.float32, copy=True)
        if dry:
            dry.shift(scores)
        if repetition:
            repetition.penalise_repetition(scores)
        for edits in (penalties, bias, mask):
            if edits:
                edits.shift(scores)
        if allowed:
            allowed.mask_others(scores)
        if grammars:
            keep_only(scores, list(grammars), np.stack(list(grammars.values())))
        return scores

    def _draw(self, logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
        """Tokens [S] int64 drawn from the filtered distribution of each row."""
        host = [(*state.filters, state.uniform) for state in states]
        parameters = self._send(torch.tensor(host, dtype=torch.float64))
        temperature, top_k, top_p, min_p, typical_p, uniform = parameters.unsqueeze(-1).unbind(1)
        top_k = torch.where(top_k > 0, top_k, self._vocab_size).clamp_max(self._vocab_size)
        mass = masses(self.edit(logits, states), temperature)
        cut = [row for row, (_, k, p, least, _, _) in enumerate(host) if k > 0 or p < 1.0 or least > 0.0]
        if cut:
            rows = self._index(cut)
            ordered = any(host[row][1] > 0 or host[row][2] < 1.0 for row in cut)
            kept = keep_likeliest(_select(mass, rows), top_k[rows], top_p[rows], min_p[rows], ordered=ordered)
            mass = _replace(mass, rows, kept)
        typical = [row for row, filters in enumerate(host) if filters[4] < 1.0]
        if typical:
            rows = self._index(typical)
            mass = _replace(mass, rows, keep_typical(_select(mass, rows), typical_p[rows]))
        return pick(mass, uniform)

    def _draw_warped(self, logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
        """Tokens [S] int64 drawn after the samplers of `engine.warping`."""
        warpings = [state.warping for state in states if state.warping is not None]
        host = [(*w.values(len(s.output_token_ids)), s.uniform) for w, s in zip(warpings, states, strict=True)]
        parameters = self._send(torch.tensor(host, dtype=torch.float64))
        mass = warp(self.edit(logits, states), warpings, parameters[:, :-1])
        tokens = pick(mass, parameters[:, -1:])
        if any(warping.mirostat for warping in warpings):
            for warping, surprise in zip(warpings, surprises(mass, tokens).tolist(), strict=True):
                warping.chose(surprise)
        return tokens

    def _index(self, rows: list[int]) -> Tensor:
        return self._send(torch.tensor(rows, dtype=torch.int64))

    def _send(self, host: Tensor) -> Tensor:
        """Copy to the device without waiting: a step waits only once, for its tokens."""
        return host.to(self._device, non_blocking=True)


def prompt_logprobs(logits: Tensor, next_token_ids: Sequence[int], k: int) -> list[Logprobs]:
    """Compute the log probability of each prompt token given those before it.

    An image's placeholder may lie outside the vocabulary; its probability is 0.

    Args:
        logits: [T, V], one row for each position.
        next_token_ids: The T tokens that follow those positions.
        k: Number of best tokens to report beside each token.
    """
    assert len(logits) == len(next_token_ids)
    vocab_size = logits.shape[1]
    chosen = torch.tensor(next_token_ids, dtype=torch.int64, device=logits.device).clamp_max(vocab_size - 1)
    entries = [_unpack_logprobs(row, k) for row in _pack_logprobs(logits, chosen, k).tolist()]
    for token_id, entry in zip(next_token_ids, entries, strict=True):
        if token_id >= vocab_size:
            entry.token_ids[0], entry.logprobs[0], entry.ranks[0] = token_id, -math.inf, vocab_size
    return entries


def _select(table: Tensor, rows: Tensor) -> Tensor:
    """Those rows, in rising order; the table itself where that is all of it."""
    return table if len(rows) == len(table) else table[rows]


def _replace(table: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    return new if len(rows) == len(table) else table.index_copy_(0, rows, new)


def _pack_logprobs(logits: Tensor, chosen: Tensor, k: int) -> Tensor:
    """[A, 3 * (1 + min(k, V))] float64: token ids, logprobs and ranks of the chosen token and the k best.

    Logprobs are log_softmax in float32. Among equals the lowest id comes first; a chosen token that ties with
    the k-th best takes its place.
    """
    logits = logits.float()
    own = chosen.clamp_min(0).unsqueeze(-1)
    own_value = logits.gather(-1, own)
    own_rank = (logits > own_value).sum(-1, keepdim=True) + 1
    values, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
    if values.shape[-1]:
        missing = (values[:, -1:] == own_value) & ~(ids == own).any(-1, keepdim=True)
        ids[:, -1:] = torch.where(missing, own, ids[:, -1:])
        ids, by_id = ids.sort(dim=-1)
        values, by_value = values.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
        ids = ids.gather(-1, by_value)
    ranks = (values.unsqueeze(-2) > values.unsqueeze(-1)).sum(-1) + 1
    normaliser = logits.logsumexp(-1, keepdim=True)
    parts = (own, ids, own_value - normaliser, values - normaliser, own_rank, ranks)
    return torch.cat([part.double() for part in parts], dim=-1)


def _unpack_logprobs(packed: list[float], k: int) -> Logprobs:
    width = len(packed) // 3
    stop = min(1 + k, width)
    return Logprobs(
        [int(token) for token in packed[:stop]],
        packed[width : width + stop],
        [int(rank) for rank in packed[2 * width : 2 * width + stop]],
    )


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
        on_device = [torch.from_numpy(array).to(scores.device, non_blocking=True) for array in (where, values)]
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


def masses(scores: Tensor, temperature: Tensor) -> Tensor:
    """Compute exp(scores / temperature), scaled to a maximum of 1, so that no temperature overflows.

    A row with a NaN or +inf, or with nothing but -inf, becomes one with a NaN.

    Args:
        scores: [S, V].
        temperature: [S, 1].
    """
    shifted = scores.float() - scores.amax(-1, keepdim=True)
    return shifted.div_(temperature.clamp_min(SMALLEST_TEMPERATURE).float()).exp_()


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
