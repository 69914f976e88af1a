"""What sampling knows of one sequence, from its first token to its last."""

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
    """What sampling knows of one sequence; lives as long as the sequence and survives preemption.

    prompt_token_ids: shared with the sequence, not copied.
    output_token_ids: shared; the engine appends to it after each step and never removes.
    seed: params.seed or the engine's own; differs between the answers of one request.
    plain: needs nothing beyond the argmax of its logits, at any step.
    penalised: has penalties, a bias or masks of its own.
    filters: temperature, top_k, top_p, min_p, typical_p.
    enders: the tokens that would end the answer, masked while it is shorter than min_tokens.
    allowed: the only tokens that can be chosen; None for all.
    constrained: the answer must match a grammar; grammar_mask: the tokens with which it may go on, set anew for each
    step, min_tokens already seen to (see `engine.guidance`).
    repetition, warping: what rarer samplers keep; None where the request uses none of them.
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
    enders: Ids = field(init=False, repr=False)
    allowed: Ids | None = field(init=False, repr=False, default=None)
    repetition: Repetition | None = field(init=False, repr=False)
    warping: Warping | None = field(init=False, repr=False)
    _key: int = field(init=False, repr=False)
    _seen: TokenCounts | None = field(init=False, repr=False, default=None)
    _written: TokenCounts | None = field(init=False, repr=False, default=None)

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
        enders = set(params.stop_token_ids) | (set() if params.ignore_eos else set(self.eos_token_ids))
        self.enders = np.array(sorted(enders), np.int64)
        self._key = mix64(self.seed)

    @property
    def too_short(self) -> bool:
        """The answer may not end yet."""
        return len(self.output_token_ids) < self.params.min_tokens

    @property
    def edited(self) -> bool:
        """This step's logits want penalties, a bias or a mask."""
        return self.penalised or self.too_short or self.constrained

    @property
    def uniform(self) -> float:
        """This position's number in [0, 1)."""
        return uniform_of(self._key, len(self.output_token_ids))

    @property
    def seen(self) -> TokenCounts:
        """The tokens of prompt and answer."""
        if self._seen is None:
            self._seen = TokenCounts(self.prompt_token_ids)
        self._seen.follow(self.output_token_ids)
        return self._seen

    @property
    def written(self) -> TokenCounts:
        """The tokens of the answer."""
        if self._written is None:
            self._written = TokenCounts()
        self._written.follow(self.output_token_ids)
        return self._written
