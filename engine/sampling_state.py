"""What sampling remembers of one sequence between its steps: counts, rules against repetition, and samplers' state.

The rules (n-gram blocking, DRY and unwanted words) look at the text so far, prompt and completion. A step takes time
linear in the length of any text, because how far the end of the text matches each earlier position is kept from step to
step and extended by one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engine.sampling_params import FIRST_SAMPLERS, MAX_MATCH, SamplingParams, sampler_order

Ids = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float32]

_MASK64 = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def mix64(value: int) -> int:
    """Apply splitmix64's output function (Steele, Lea and Flood 2014), a bijection of 64-bit numbers."""
    value &= _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def uniform(key: int, counter: int) -> float:
    """Return element `counter` of splitmix64's sequence for `key`: a number in [0, 1) with 53 bits."""
    return (mix64(key + (counter + 1) * _GOLDEN_GAMMA) >> 11) * 2.0**-53


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


_HIGHEST_PENALTY = 1e30
"""Limit of DRY's penalty, which grows exponentially: more than any logit, less than float32 can hold."""

_NOTHING = np.empty(0, np.int64)


class SuffixMatches:
    """How many tokens before each position of a growing text equal those before its end.

    `_lengths[d]`, for d from 1, is the largest k <= `most` such that the last k tokens of the text also stand
    d positions earlier. A breaker equals nothing, not even itself.
    """

    __slots__ = ("_breakers", "_count", "_lengths", "_most", "_tokens")

    def __init__(self, text: Sequence[int], most: int, breakers: frozenset[int] = frozenset()) -> None:
        assert 1 <= most < 256, "lengths are kept in bytes"
        self._most = most
        self._breakers = breakers
        self._count = count = len(text)
        self._tokens = np.array(text, np.int64)
        self._lengths = np.zeros(count + 1, np.uint8)
        alive = np.ones(max(0, count - 1), bool)
        for back in range(min(most, count - 1)):
            last, before = text[count - 1 - back], count - 1 - back
            if last in breakers:
                break
            alive[before:] = False
            alive[:before] &= self._tokens[:before][::-1] == last
            if not alive.any():
                break
            self._lengths[1:count] += alive

    def append(self, token: int) -> None:
        count = self._count
        if count == len(self._tokens):
            growth = max(64, count)
            self._tokens = np.concatenate((self._tokens, np.zeros(growth, np.int64)))
            self._lengths = np.concatenate((self._lengths, np.zeros(growth, np.uint8)))
        lengths = self._lengths[1 : count + 1]
        if token in self._breakers:
            lengths[:] = 0
        else:
            np.minimum(lengths, self._most - 1, out=lengths)
            lengths += 1
            lengths *= self._tokens[:count][::-1] == token
        self._tokens[count] = token
        self._count = count + 1

    def continuations(self, least: int, within: int) -> tuple[Ids, npt.NDArray[np.int64]]:
        """Return what followed each earlier position that matches the end, and the length of each match.

        Args:
            least: Smallest length of a match, from 1.
            within: Only this many last tokens count, for positions and for matches.

        Returns:
            Token ids, which may repeat, and lengths.
        """
        count = self._count
        reach = min(count, within)
        lengths = self._lengths[1:reach]
        if within < count:
            lengths = np.minimum(lengths, np.arange(reach - 1, 0, -1))
        distances = np.flatnonzero(lengths >= least) + 1
        return self._tokens[count - distances], lengths[distances - 1].astype(np.int64)


class Repetition:
    """One request's rules against repetition; it lives as long as its sequence (see `SamplingState`)."""

    __slots__ = (
        "_breakers", "_dry", "_followed", "_ngrams", "_params", "_prompt", "_seen", "_single_words", "_word_lengths",
        "_words",
    )  # fmt: skip

    def __init__(self, params: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        self._params = params
        self._prompt = prompt_token_ids
        self._followed = -1
        self._breakers = frozenset(params.dry_sequence_breaker_ids)
        self._dry: SuffixMatches | None = None
        self._ngrams: SuffixMatches | None = None
        self._seen: TokenCounts | None = None
        runs = params.bad_words_token_ids
        self._single_words = np.array(sorted({run[0] for run in runs if len(run) == 1}), np.int64)
        words: dict[tuple[int, ...], set[int]] = {}
        for run in runs:
            if len(run) > 1:
                words.setdefault(run[:-1], set()).add(run[-1])
        self._words = {before: np.array(sorted(last), np.int64) for before, last in words.items()}
        self._word_lengths = sorted({len(before) for before in words})

    @classmethod
    def of(cls, params: SamplingParams, prompt_token_ids: Sequence[int]) -> Repetition | None:
        """Return the rules of a request, or None where it has none."""
        if params.dry_multiplier > 0.0 or params.no_repeat_ngram_size > 0 or params.bad_words_token_ids:
            return cls(params, prompt_token_ids)
        return None

    def penalties(self, output: list[int]) -> tuple[Ids, Weights] | None:
        """Compute DRY (p-e-w, text-generation-webui pull request 5677).

        A token that would extend a repetition of n tokens costs multiplier * base^(n - allowed_length), from
        n = allowed_length on; of several such repetitions the longest counts.

        Returns:
            Token ids and what to subtract from their logits; None where nothing is to be subtracted.
        """
        params = self._params
        if params.dry_multiplier <= 0.0:
            return None
        self._follow(output)
        assert self._dry is not None
        within = params.dry_range if params.dry_range > 0 else len(self._prompt) + len(output)
        token_ids, lengths = self._dry.continuations(max(1, params.dry_allowed_length), within)
        if not len(token_ids):
            return None
        longest = np.sort(token_ids * 256 + lengths)
        longest = longest[np.append(longest[1:] >> 8 != longest[:-1] >> 8, True)]
        token_ids, lengths = longest >> 8, longest & 255
        if self._breakers:
            kept = ~np.isin(token_ids, list(self._breakers))
            token_ids, lengths = token_ids[kept], lengths[kept]
        with np.errstate(over="ignore"):
            exponents = (lengths - params.dry_allowed_length).astype(np.float64)
            amounts = params.dry_multiplier * params.dry_base**exponents
        return token_ids, np.minimum(amounts, _HIGHEST_PENALTY).astype(np.float32)

    def banned(self, output: list[int]) -> Ids:
        """Return the tokens that would repeat an n-gram or complete an unwanted word, each once.

        For n-gram blocking see Paulus et al. 2017.
        """
        found = [self._single_words, self._blocked(output)]
        for length in self._word_lengths:
            if length > len(output):
                break
            if (last := self._words.get(tuple(output[-length:]))) is not None:
                found.append(last)
        return np.unique(np.concatenate(found))

    def _blocked(self, output: list[int]) -> Ids:
        size, count = self._params.no_repeat_ngram_size, len(self._prompt) + len(output)
        if size == 0 or count < size:
            return _NOTHING
        if size == 1:
            if self._seen is None:
                self._seen = TokenCounts(self._prompt)
            self._seen.follow(output)
            return self._seen.ids
        self._follow(output)
        assert self._ngrams is not None
        return self._ngrams.continuations(size - 1, count)[0]

    def _follow(self, output: list[int]) -> None:
        """Process the tokens appended to the completion since the last call."""
        if self._followed < 0:
            text = [*self._prompt, *output]
            if self._params.dry_multiplier > 0.0:
                self._dry = SuffixMatches(text, MAX_MATCH, self._breakers)
            if self._params.no_repeat_ngram_size > 1:
                self._ngrams = SuffixMatches(text, self._params.no_repeat_ngram_size - 1)
        else:
            for token in output[self._followed :]:
                for matches in (self._dry, self._ngrams):
                    if matches is not None:
                        matches.append(token)
        self._followed = len(output)


DEFAULT_ORDER = (
    "TEMPERATURE", "TOP_NSIGMA", "TOP_P_TOP_K", "TOP_A", "MIN_P", "TFS", "ETA_CUTOFF", "EPSILON_CUTOFF", "TYPICAL_P",
    "QUADRATIC", "XTC",
)  # fmt: skip
"""Samplers in their default order, by their names in `sampler_priority`; Mirostat always comes last."""

_OTHER_STREAM = 0xD1B54A32D192ED03
"""Separates XTC's random numbers from the draw's."""

_OWN = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "top_a", "tfs", "eta_cutoff", "epsilon_cutoff",
    "smoothing_factor", "smoothing_curve", "dynatemp_min", "dynatemp_max", "dynatemp_exponent", "xtc_threshold",
    "xtc_probability", "nsigma", "skew",
)  # fmt: skip
COLUMN = {name: place for place, name in enumerate((*_OWN, "xtc_number", "mu"))}


class Warping:
    """The samplers of one request; it lives as long as its sequence (see `SamplingState`).

    Attributes:
        order: Names of samplers, in the order in which they are applied.
        used: Those of them that have an effect.
        mirostat: Whether Mirostat is used.
        skewed: Whether skew is used.
    """

    __slots__ = (
        "_eta", "_key", "_mu", "_next_mu", "_own", "_position", "_tau", "mirostat", "order", "skewed", "used",
    )  # fmt: skip

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
        """Return the parameters for token number `position` of the completion, in the order of `COLUMN`."""
        if position == self._position + 1:
            self._mu, self._position = self._next_mu, position
        return (*self._own, uniform(self._key, position), self._mu)

    def chose(self, surprise: float) -> None:
        """Update Mirostat with the surprise of the newest token in bits.

        Calling it twice for one token changes nothing.
        """
        self._next_mu = self._mu - self._eta * (surprise - self._tau)


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
        order = list(DEFAULT_ORDER)
    if params.temperature_last:
        order.remove("TEMPERATURE")
        order.insert(order.index("XTC") + 1, "TEMPERATURE")
    return (*order, "MIROSTAT")


@dataclass(slots=True, eq=False)
class SamplingState:
    """State of sampling for one sequence; it lives as long as the sequence and survives preemption.

    Attributes:
        params: Sampling parameters of the request.
        prompt_token_ids: The prompt; shared with the sequence, not copied.
        output_token_ids: The completion; shared with the engine, which appends to it after each step and never removes.
        eos_token_ids: Tokens that end the completion.
        seed: `params.seed` or the engine's own; the completions of one request have different seeds.
        constrained: The completion must match a grammar.
        grammar_mask: Tokens that the grammar allows next, set before each step. It already respects min_tokens (see
            `engine.guidance`).
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
        return uniform(self._key, len(self.output_token_ids))

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
