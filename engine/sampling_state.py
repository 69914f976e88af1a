"""State of sampling for one sequence, from its first token to its last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engine.distribution import mix64
from engine.distribution import uniform as uniform_of
from engine.logits import Ids, TokenCounts, Weights
from engine.repetition import Repetition
from engine.sampling_params import SamplingParams
from engine.warping import Warping


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
