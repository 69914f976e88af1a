"""Chooses the next token of each request in a step, for all rows at once.

The logits of a row are processed in this order: DRY, repetition penalty, presence and frequency penalties,
logit bias, masks (allowed tokens, repeated n-grams, unwanted words, min_tokens, the grammar). Where
temperature is 0, argmax follows; otherwise temperature, top_k, top_p, min_p, typical_p (the order of
transformers' `generate`) and the draw. Requests with other samplers, or another order, use `engine.warping`
instead. The draw depends only on the request's seed and its number of tokens: not on the batch, on
preemption, or on how the prompt was cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.logits import (
    Ids,
    LogitsEdits,
    TokenCounts,
    Weights,
    best,
    keep_likeliest,
    keep_only,
    keep_typical,
    masses,
    mix64,
    pick,
)
from engine.logits import uniform as uniform_of
from engine.messages import Logprobs
from engine.repetition import Repetition
from engine.sampling_params import SamplingParams
from engine.warping import Warping, surprises, warp

_PROMPT_LOGPROBS_ELEMENTS = 1 << 24


class Sampler:
    """Chooses tokens for logits of one vocabulary on one device; it keeps no state between steps."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device

    def sample(
        self, logits: Tensor, states: Sequence[SamplingState]
    ) -> tuple[list[int], list[Logprobs | None]]:
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
            tokens[rows] = best(self._edit(_select(logits, rows), [states[r] for r in edited]))
        if drawn:
            rows = self._index(drawn)
            tokens[rows] = self._draw(_select(logits, rows), [states[r] for r in drawn])
        if warped:
            rows = self._index(warped)
            tokens[rows] = self._draw_warped(_select(logits, rows), [states[r] for r in warped])
        return tokens

    def _edit(self, logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
        """Float32 scores [S, V] after penalties, bias and masks; `logits` itself if there are none."""
        dry, repetition, penalties, bias, mask = (
            LogitsEdits(),
            LogitsEdits(),
            LogitsEdits(),
            LogitsEdits(),
            LogitsEdits(),
        )
        allowed = LogitsEdits()
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
        mass = masses(self._edit(logits, states), temperature)
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
        host = [
            (*w.values(len(s.output_token_ids)), s.uniform) for w, s in zip(warpings, states, strict=True)
        ]
        parameters = self._send(torch.tensor(host, dtype=torch.float64))
        mass = warp(self._edit(logits, states), warpings, parameters[:, :-1])
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

    Args:
        logits: [T, V], one row for each position.
        next_token_ids: The T tokens that follow those positions.
        k: Number of best tokens to report beside each token.
    """
    assert len(logits) == len(next_token_ids)
    chosen = torch.tensor(next_token_ids, dtype=torch.int64, device=logits.device)
    step = max(1, _PROMPT_LOGPROBS_ELEMENTS // logits.shape[-1])
    packed = [
        _pack_logprobs(logits[start : start + step], chosen[start : start + step], k)
        for start in range(0, len(logits), step)
    ]
    return [_unpack_logprobs(row, k) for part in packed for row in part.tolist()]


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


@dataclass(slots=True, eq=False)
class SamplingState:
    """State of sampling for one sequence; it lives as long as the sequence and survives preemption.

    Attributes:
        params: Sampling parameters of the request.
        prompt_token_ids: The prompt; shared with the sequence, not copied.
        output_token_ids: The completion; shared with the engine, which appends to it after each step and
            never removes.
        eos_token_ids: Tokens that end the completion.
        seed: `params.seed` or the engine's own; the completions of one request have different seeds.
        constrained: The completion must match a grammar.
        grammar_mask: Tokens that the grammar allows next, set before each step. It already respects
            min_tokens (see `engine.guidance`).
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
        return uniform_of(self._key, len(self.output_token_ids))

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
