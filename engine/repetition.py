"""Counts of tokens, and the rules against repetition: n-gram blocking, DRY and unwanted words.

The rules look at the text so far, prompt and completion. A step takes time linear in the length of any text, because
how far the end of the text matches each earlier position is kept from step to step and extended by one token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine.sampling_params import MAX_MATCH, SamplingParams

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
