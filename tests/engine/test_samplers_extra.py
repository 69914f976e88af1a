"""The rarer samplers, each against its published formula written again here, row by row, in numpy's float64."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import NoRepeatNGramLogitsProcessor

from engine.messages import Add
from engine.repetition import Repetition
from engine.sampler import Sampler
from engine.sampling_params import RANGES, SAMPLERS
from engine.sampling_state import _OTHER_STREAM, SamplingState, mix64, uniform
from engine.warping import warp
from handlers.backends.vllm.sampling import KEY, NEUTRAL, PROCESSOR, Carried, Samplers, offer, to_vllm
from handlers.errors import InvalidRequest
from handlers.request import RequestSampling
from handlers.request_checks import DRY_BREAKERS, tokenise_words
from tests.support.engine_driver import EOS as MODELS_EOS
from tests.support.engine_driver import load_engine, run_all
from tests.support.models import make_llava, make_tokenizer
from tests.support.pace import too_long
from tests.support.sampling import EOS, KINDS, random_logits

CPU = torch.device("cpu")
Row = npt.NDArray[np.float64]


def state(
    prompt: list[int] | None = None, output: list[int] | None = None, seed: int = 0, **params: Any
) -> SamplingState:
    given = RequestSampling(**params)
    given.validate()
    return SamplingState(given, prompt or [], output if output is not None else [], (EOS,), seed)


def sample(logits: torch.Tensor, states: list[SamplingState]) -> list[int]:
    return Sampler(logits.shape[-1], CPU).sample(logits, states)[0]


def distribution(logits: torch.Tensor, states: list[SamplingState]) -> Row:
    """The probabilities that the sampler draws from."""
    scores = Sampler(logits.shape[-1], CPU).edit(logits, states)
    warpings = [state.warping for state in states]
    assert all(warpings)
    values = torch.tensor(
        [w.values(len(s.output_token_ids)) for w, s in zip(warpings, states, strict=True)], dtype=torch.float64
    )
    mass = warp(scores, warpings, values).double().numpy()
    return mass / mass.sum(-1, keepdims=True)


def warped(logits: torch.Tensor, **params: Any) -> Row:
    return distribution(logits, [state(**params) for _ in logits])


def softmax(row: Row) -> Row:
    weights = np.exp(row - row.max())
    return weights / weights.sum()


def only(p: Row, kept: npt.NDArray[np.bool_]) -> Row:
    return np.where(kept, p, 0.0) / p[kept].sum()


def assert_same(ours: Row, logits: torch.Tensor, formula: Callable[[Row], Row]) -> None:
    """formula: of one row's logits, its probabilities."""
    for mine, row in zip(ours, logits.double().numpy(), strict=True):
        theirs = formula(row)
        assert np.array_equal(mine > 0, theirs > 0)
        np.testing.assert_allclose(mine, theirs, rtol=2e-4, atol=1e-9)


@pytest.fixture(params=[0.3, 1.5, 4.0])
def logits(request: pytest.FixtureRequest) -> torch.Tensor:
    return random_logits(4, spread=request.param)


class TestTruncation:
    @pytest.mark.parametrize("top_a", [0.05, 0.7, 30.0])
    def test_top_a(self, logits: torch.Tensor, top_a: float) -> None:
        """BlinkDL, RWKV-LM: p >= top_a * max(p)^2."""

        def formula(row: Row) -> Row:
            p = softmax(row)
            return only(p, p >= min(top_a * p.max() ** 2, p.max()))

        assert_same(warped(logits, top_a=top_a), logits, formula)

    @pytest.mark.parametrize("z", [0.1, 0.5, 0.95, 0.999])
    def test_tail_free(self, logits: torch.Tensor, z: float) -> None:
        """Phénix and Egan 2019: second derivative of the sorted probabilities, normalised, summed up to z."""

        def formula(row: Row) -> Row:
            p = softmax(row)
            order = np.argsort(-p)
            curvature = [
                abs((p[order[i]] - p[order[i + 1]]) - (p[order[i + 1]] - p[order[i + 2]])) for i in range(len(p) - 2)
            ]
            reached, kept = 0.0, np.zeros(len(p), bool)
            kept[order[0]] = True
            for place, weight in enumerate(curvature, start=1):
                reached += weight / sum(curvature)
                if reached > z:
                    break
                kept[order[place]] = True
            return only(p, kept)

        assert_same(warped(logits, tfs=z), logits, formula)

    @pytest.mark.parametrize("cutoff", [1.0, 20.0, 900.0, 1e6])
    def test_eta(self, logits: torch.Tensor, cutoff: float) -> None:
        """Hewitt et al. 2022, equation 5: p >= min(epsilon, sqrt(epsilon) * exp(-entropy))."""

        def formula(row: Row) -> Row:
            p, eps = softmax(row), cutoff * 1e-4
            least = min(eps, eps**0.5 * np.exp((p * np.log(p)).sum()))
            return only(p, (p >= least) | (p == p.max()))

        assert_same(warped(logits, eta_cutoff=cutoff), logits, formula)

    @pytest.mark.parametrize("cutoff", [0.5, 9.0, 1000.0])
    def test_epsilon(self, logits: torch.Tensor, cutoff: float) -> None:
        """Hewitt et al. 2022, section 3: p >= epsilon."""

        def formula(row: Row) -> Row:
            p = softmax(row)
            return only(p, (p >= cutoff * 1e-4) | (p == p.max()))

        assert_same(warped(logits, epsilon_cutoff=cutoff), logits, formula)

    @pytest.mark.parametrize("n", [0.3, 1.0, 3.0])
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    def test_top_n_sigma(self, logits: torch.Tensor, n: float, temperature: float) -> None:
        """Tang et al. 2024, algorithm 1: logits within n standard deviations of the best, at any temperature."""

        def formula(row: Row) -> Row:
            scaled = row / temperature
            return only(softmax(scaled), scaled >= scaled.max() - n * scaled.std(ddof=1))

        assert_same(warped(logits, nsigma=n, temperature=temperature), logits, formula)

    def test_top_n_sigma_measures_what_is_not_masked(self) -> None:
        logits = random_logits(1)
        allowed = (3, 5, 8, 13, 21, 34)
        row = logits[0, list(allowed)].double().numpy()
        got = distribution(logits, [state(nsigma=1.0, allowed_token_ids=allowed)])[0]
        assert sorted(np.flatnonzero(got)) == [
            token for token, value in zip(allowed, row, strict=True) if value >= row.max() - row.std(ddof=1)
        ]

    def test_xtc(self, logits: torch.Tensor) -> None:
        """p-e-w: of the tokens that reach the threshold, all but the least probable go."""

        def formula(row: Row) -> Row:
            p = softmax(row)
            choices = np.flatnonzero(p >= 0.02)
            kept = np.ones(len(p), bool)
            if len(choices) > 1:
                kept[choices] = False
                kept[choices[np.argmin(p[choices])]] = True
            return only(p, kept)

        assert_same(warped(logits, xtc_probability=1.0, xtc_threshold=0.02), logits, formula)

    def test_xtc_happens_as_often_as_it_should_whatever_is_drawn(self) -> None:
        """Its random numbers are uniform and have nothing to do with those of the draw."""
        logits = torch.tensor([[2.0, 1.9, 0.0, -1.0]])
        states = [state(seed=seed, xtc_probability=0.3, xtc_threshold=0.2) for seed in range(8000)]
        chosen = np.array(sample(logits.expand(8000, -1), states))
        p = softmax(logits[0].double().numpy())
        without = only(p, np.arange(4) != 0)
        expected = 0.7 * p + 0.3 * without
        counts = np.bincount(chosen, minlength=4)
        assert ((counts - 8000 * expected) ** 2 / (8000 * expected)).sum() < 3 + 4 * np.sqrt(6)
        numbers = np.array([uniform(mix64(seed ^ _OTHER_STREAM), 0) for seed in range(8000)])
        draws = np.array([one.uniform for one in states])
        assert abs(np.corrcoef(numbers, draws)[0, 1]) < 0.04

    @pytest.mark.parametrize(
        "params",
        [
            {"top_a": 0.7}, {"tfs": 0.3}, {"tfs": 0.9}, {"eta_cutoff": 900.0}, {"epsilon_cutoff": 700.0},
            {"nsigma": 1.0}, *({"typical_p": p, "temperature": 1.1, "temperature_last": True} for p in (0.3, 0.8)),
        ],
    )  # fmt: skip
    def test_equals_stay_or_go_together(self, params: dict[str, Any]) -> None:
        levels = torch.tensor([3.0, 2.4, 2.4, 2.4, 1.0, 1.0, 0.2, 0.2, 0.2, 0.2, -1.0])
        (got,) = warped(levels[None], **params)
        for level in set(levels.tolist()):
            assert len({round(float(p), 12) for p in got[levels.numpy() == level]}) == 1, level
        assert 0 < np.count_nonzero(got) < len(levels)

    def test_with_two_tokens_or_one(self) -> None:
        for vocab_size in (1, 2):
            for params in KINDS:
                assert 0 <= sample(random_logits(1, vocab_size), [state(**params)])[0] < vocab_size


class TestReshaping:
    @pytest.mark.parametrize(("factor", "curve"), [(0.3, 1.0), (1.5, 1.0), (0.3, 2.5), (0.2, 4.0)])
    def test_quadratic_and_cubic(self, logits: torch.Tensor, factor: float, curve: float) -> None:
        """kalomaze: with x = logit - best, -k x² + s x³, k = factor (3 - curve)/2, s = factor (curve - 1)/2."""

        def formula(row: Row) -> Row:
            x = row - row.max()
            k, s = factor * (3 - curve) / 2, factor * (curve - 1) / 2
            return softmax(-(k * x**2) + s * x**3)

        ours = warped(logits, smoothing_factor=factor, smoothing_curve=curve)
        for mine, row in zip(ours, logits.double().numpy(), strict=True):
            np.testing.assert_allclose(mine, formula(row), rtol=2e-3, atol=1e-9)

    @pytest.mark.parametrize(("low", "high", "exponent"), [(0.2, 2.0, 1.0), (0.0, 1.5, 2.0), (1.0, 0.5, 0.5)])
    def test_dynamic_temperature(self, logits: torch.Tensor, low: float, high: float, exponent: float) -> None:
        """kalomaze: low + (high - low) * (entropy / log V)^exponent, from the entropy at temperature 1."""

        def formula(row: Row) -> Row:
            p = softmax(row)
            entropy = -(p * np.log(p)).sum() / np.log(len(p))
            return softmax(row / (low + (high - low) * entropy**exponent))

        ours = warped(logits, dynatemp_min=low, dynatemp_max=high, dynatemp_exponent=exponent, temperature=9)
        for mine, row in zip(ours, logits.double().numpy(), strict=True):
            np.testing.assert_allclose(mine, formula(row), rtol=2e-3, atol=1e-9)

    @pytest.mark.parametrize("skew", [-2.0, -0.3, 0.4, 3.0])
    def test_skew(self, logits: torch.Tensor, skew: float) -> None:
        """turboderp: the cumulative distribution, likeliest first, to the power of exp(skew)."""

        def formula(row: Row) -> Row:
            p = softmax(row)
            order = np.argsort(-p, kind="stable")
            reached = p[order].cumsum() ** np.exp(skew)
            bent = np.empty(len(p))
            bent[order] = np.diff(reached, prepend=0.0)
            return bent / bent.sum()

        ours = warped(logits, skew=skew)
        for mine, row in zip(ours, logits.double().numpy(), strict=True):
            np.testing.assert_allclose(mine, formula(row), rtol=5e-3, atol=1e-6)


class TestMirostat:
    def test_follows_algorithm_2(self) -> None:
        """Basu et al. 2021, Mirostat 2.0: truncate above mu bits, draw, mu -= eta * (surprise - tau)."""
        tau, eta = 3.0, 0.2
        one = state(mirostat_mode=2, mirostat_tau=tau, mirostat_eta=eta, seed=5)
        mu = 2 * tau
        for step in range(60):
            row = random_logits(1, 400, seed=step)
            p = softmax(row[0].double().numpy())
            kept = (-np.log2(p) <= mu) | (p == p.max())
            np.testing.assert_allclose(distribution(row, [one])[0], only(p, kept), rtol=2e-4, atol=1e-9)
            (token,) = sample(row, [one])
            mu -= eta * (-np.log2(only(p, kept)[token]) - tau)
            one.output_token_ids.append(token)

    @pytest.mark.parametrize("tau", [1.5, 3.0, 5.0])
    def test_keeps_the_surprise_at_its_target(self, tau: float) -> None:
        one = state(mirostat_mode=2, mirostat_tau=tau, mirostat_eta=0.1, seed=1)
        seen = []
        for step in range(400):
            row = random_logits(1, 1000, seed=step, spread=1.5)
            p = distribution(row, [one])[0]
            (token,) = sample(row, [one])
            seen.append(-np.log2(p[token]))
            one.output_token_ids.append(token)
        assert np.mean(seen[50:]) == pytest.approx(tau, abs=0.15)

    def test_sampling_one_token_again_changes_nothing(self) -> None:
        """The engine samples a row alone when the batch failed; what Mirostat learns counts once."""
        first, second = (state(mirostat_mode=2, mirostat_tau=2.0, mirostat_eta=1.0, seed=3) for _ in range(2))
        for step in range(30):
            row = random_logits(1, seed=step)
            (token,) = sample(row, [first])
            assert sample(row, [second]) == sample(row, [second]) == [token]
            first.output_token_ids.append(token)
            second.output_token_ids.append(token)


def dry_penalties(
    text: list[int], multiplier: float, base: float, allowed: int, breakers: set[int], within: int
) -> dict[int, float]:
    """As p-e-w's pull request describes it: every earlier occurrence of the last token, followed backwards."""
    text = text[-within:] if within > 0 else text
    if not text or text[-1] in breakers:
        return {}
    longest: dict[int, int] = {}
    for place in range(len(text) - 1):
        if text[place] != text[-1] or text[place + 1] in breakers:
            continue
        length = 1
        while (
            place - length >= 0 and text[place - length] == text[-1 - length] and text[place - length] not in breakers
        ):
            length += 1
        longest[text[place + 1]] = max(longest.get(text[place + 1], 0), length)
    return {t: multiplier * base ** (n - allowed) for t, n in longest.items() if n >= allowed}


def blocked(text: list[int], size: int) -> set[int]:
    """Paulus et al. 2017, section 2.5, for any n: what would make an n-gram that is already there."""
    end = text[len(text) - size + 1 :]
    starts = range(len(text) - size + 1) if len(text) >= size else ()
    return {text[i + size - 1] for i in starts if text[i : i + size - 1] == end}


tokens = st.integers(0, 3)


class TestRepetition:
    @given(
        st.lists(tokens, max_size=40), st.lists(tokens, max_size=40), st.sampled_from([1.0, 1.75, 3.0]),
        st.integers(0, 5), st.sets(tokens, max_size=2), st.sampled_from([0, 1, 2, 7, 30]),
    )  # fmt: skip
    @settings(max_examples=300, deadline=None)
    def test_dry_at_every_token_of_an_answer(
        self, prompt: list[int], answer: list[int], base: float, allowed: int, breakers: set[int], within: int
    ) -> None:
        params = RequestSampling(
            dry_multiplier=0.8, dry_base=base, dry_allowed_length=allowed,
            dry_sequence_breaker_ids=tuple(breakers), dry_range=within,
        )  # fmt: skip
        rules = Repetition.of(params, prompt)
        assert rules is not None
        output: list[int] = []
        for token in [*answer, None]:
            got = rules.penalties(output)
            expected = dry_penalties(prompt + output, 0.8, base, allowed, breakers, within)
            found = {} if got is None else dict(zip(got[0].tolist(), got[1].tolist(), strict=True))
            assert found == pytest.approx(expected, rel=1e-5)
            if token is not None:
                output.append(token)

    def test_a_match_of_more_than_254_tokens_counts_as_254(self) -> None:
        for count in (250, 300):
            run = list(range(1000, 1000 + count))
            rules = Repetition.of(
                RequestSampling(dry_multiplier=1.0, dry_base=1.02, dry_allowed_length=2), [*run, 5, *run]
            )
            assert rules is not None
            found = rules.penalties([])
            assert found is not None
            penalties = dict(zip(found[0].tolist(), found[1].tolist(), strict=True))
            assert penalties[5] == pytest.approx(1.02 ** (min(count, 254) - 2), rel=1e-4)

    @given(st.lists(tokens, max_size=40), st.lists(tokens, max_size=40), st.integers(1, 6))
    @settings(max_examples=200, deadline=None)
    def test_ngrams_at_every_token_of_an_answer(self, prompt: list[int], answer: list[int], size: int) -> None:
        rules = Repetition.of(RequestSampling(no_repeat_ngram_size=size), prompt)
        assert rules is not None
        output: list[int] = []
        for token in [*answer, None]:
            assert set(rules.banned(output).tolist()) == blocked(prompt + output, size)
            if token is not None:
                output.append(token)

    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_ngrams_are_transformers(self, size: int) -> None:
        logits = random_logits(1, 10)
        prompt, output = [1, 2, 3, 1, 2, 4, 1, 2], [3, 1, 2]
        ours = Sampler(10, CPU).edit(logits, [state(prompt, output, no_repeat_ngram_size=size)])
        theirs = NoRepeatNGramLogitsProcessor(size)(torch.tensor([prompt + output]), logits.clone())
        assert torch.equal(ours, theirs)

    def test_penalties_reach_the_logits_before_the_others(self) -> None:
        logits = torch.zeros(1, 6)
        text = [4, 5, 3, 4, 5]
        one = state(text, [], dry_multiplier=2.0, dry_base=3.0, dry_allowed_length=1, repetition_penalty=2.0)
        got = Sampler(6, CPU).edit(logits, [one])[0].tolist()
        assert got[3] == pytest.approx(-2.0 * 3.0 * 2.0)
        assert got[:3] == [0.0, 0.0, 0.0]

    def test_greedy_answers_obey_too(self) -> None:
        logits = torch.tensor([[5.0, 4.0, 3.0]])
        blocked_row = state([0, 0], [], temperature=0.0, no_repeat_ngram_size=2)
        dry_row = state([0, 0, 0], [], temperature=0.0, dry_multiplier=1.5)
        assert sample(logits.expand(2, -1), [blocked_row, dry_row]) == [1, 1]

    def test_a_huge_penalty_still_leaves_a_token(self) -> None:
        rules = {"dry_multiplier": 1e6, "dry_base": 1000.0}
        logits = random_logits(2, 1)
        states = [state([0] * 300, **rules), state([0] * 300, temperature=0.0, **rules)]
        assert sample(logits, states) == [0, 0]

    def test_a_step_costs_linear_time_on_hostile_text(self) -> None:
        """30,000 equal tokens, where every place matches: 300 steps of a quadratic search would take minutes."""
        prompt = [7] * 30_000
        rules = Repetition.of(RequestSampling(dry_multiplier=1.0, no_repeat_ngram_size=254), prompt)
        assert rules is not None
        output: list[int] = []
        began = time.process_time()
        for _ in range(300):
            rules.penalties(output)
            rules.banned(output)
            output.append(7)
        assert not too_long(time.process_time() - began, 5.0)

    def test_unwanted_words_are_cut_off_at_their_last_token(self) -> None:
        logits = torch.zeros(1, 10)
        words = ((4,), (5, 6), (1, 2, 3))

        def masked(output: list[int]) -> list[int]:
            row = Sampler(10, CPU).edit(logits, [state([1, 2, 5], output, bad_words_token_ids=words)])[0]
            return np.flatnonzero(np.isneginf(row.numpy())).tolist()

        assert masked([]) == [4]
        assert masked([5]) == [4, 6]
        assert masked([9, 1, 2]) == [3, 4]
        assert masked([2]) == [4]
        assert masked([6, 5, 9]) == [4]

    def test_masks_add_up(self) -> None:
        got = Sampler(10, CPU).edit(
            torch.zeros(2, 10),
            [
                state([], [7], allowed_token_ids=(EOS, 3, 7, 99), min_tokens=2, no_repeat_ngram_size=1),
                state(logit_bias={0: 1.0}),
            ],
        )
        assert np.flatnonzero(np.isfinite(got[0].numpy())).tolist() == [3]
        assert got[1].tolist() == [1.0] + [0.0] * 9


class TestBatch:
    def test_answers_do_not_depend_on_who_shares_the_step(self) -> None:
        def states() -> list[SamplingState]:
            return [state([row, 3, 9, row], seed=row + 1, **KINDS[row % len(KINDS)]) for row in range(3 * len(KINDS))]

        together, alone, shuffled = states(), states(), states()
        order = np.random.default_rng(0).permutation(len(together)).tolist()
        for step in range(12):
            logits = random_logits(len(together), seed=step)
            tokens = sample(logits, together)
            assert [sample(logits[row : row + 1], [one])[0] for row, one in enumerate(alone)] == tokens
            mixed = sample(logits[order], [shuffled[row] for row in order])
            assert mixed == [tokens[row] for row in order]
            for group in (together, alone, shuffled):
                for one, token in zip(group, tokens, strict=True):
                    one.output_token_ids.append(token)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("params", KINDS)
    def test_a_bad_row_fails_alone(self, bad: float, params: dict[str, Any]) -> None:
        logits = random_logits(3)
        states = [state([1], [4], seed=row, **params) for row in range(3)]
        healthy = sample(logits, states)
        logits[1, 7] = bad
        assert sample(logits, [state([1], [4], seed=row, **params) for row in range(3)]) == [
            healthy[0], -1, healthy[2],
        ]  # fmt: skip
        logits[1] = -torch.inf
        assert sample(logits, states)[1] == -1

    def test_plain_requests_do_not_take_the_longer_way(self) -> None:
        for params in (
            {},
            {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "typical_p": 0.8},
            {"temperature": 0.0, "mirostat_mode": 2, "top_a": 0.5, "xtc_probability": 1.0},
            {"temperature_last": True, "top_p": 0.5},
        ):
            assert state(**params).warping is None
            assert state(**params).repetition is None
        assert state(temperature=0.0, top_a=0.5).plain

    def test_the_longer_way_draws_the_same_as_the_short_one(self) -> None:
        logits = random_logits(40)
        common = {"temperature": 1.3, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "typical_p": 0.95}
        priority = (*FIRST, "TEMPERATURE", "TOP_NSIGMA", "TOP_P_TOP_K", "TOP_A", "MIN_P", *LAST)
        short = [state(seed=row, **common) for row in range(40)]
        long = [state(seed=row, sampler_priority=priority, **common) for row in range(40)]
        assert long[0].warping is not None
        assert sample(logits, long) == sample(logits, short)


FIRST = ("DRY", "PENALTIES", "NO_REPEAT_NGRAM")
LAST = ("TFS", "ETA_CUTOFF", "EPSILON_CUTOFF", "TYPICAL_P", "QUADRATIC", "XTC")


class TestOrder:
    def test_temperature_last_filters_first(self, logits: torch.Tensor) -> None:
        def formula(row: Row) -> Row:
            p = softmax(row)
            with np.errstate(divide="ignore"):
                return softmax(np.log(only(p, p >= 0.1 * p.max())) / 3.0)

        ours = warped(logits, temperature=3.0, min_p=0.1, temperature_last=True)
        assert_same(ours, logits, formula)

    def test_priority_decides_who_sees_what(self, logits: torch.Tensor) -> None:
        def formula(row: Row) -> Row:
            p = softmax(row)
            p = only(p, p >= np.sort(p)[-5])
            return only(p, p >= min(1.5 * p.max() ** 2, p.max()))

        rest = [name for name in SAMPLERS if name not in (*FIRST, "TOP_P_TOP_K", "TOP_A")]
        ours = warped(logits, top_k=5, top_a=1.5, sampler_priority=(*FIRST, "TOP_P_TOP_K", "top_a", *rest))
        assert_same(ours, logits, formula)

        def other_way(row: Row) -> Row:
            p = softmax(row)
            p = only(p, p >= min(1.5 * p.max() ** 2, p.max()))
            return only(p, p >= (np.sort(p)[-5] or 1e-300))

        ours = warped(logits, top_k=5, top_a=1.5, sampler_priority=(*FIRST, "TOP_A", "TOP_P_TOP_K", *rest))
        assert_same(ours, logits, other_way)

    def test_top_n_sigma_measures_what_another_sampler_left(self, logits: torch.Tensor) -> None:
        def formula(row: Row) -> Row:
            left = np.sort(row)[-20:]
            return only(softmax(row), (row >= left[0]) & (row >= left[-1] - 0.8 * left.std(ddof=1)))

        rest = [name for name in SAMPLERS if name not in (*FIRST, "TOP_P_TOP_K", "TOP_NSIGMA")]
        priority = (*FIRST, "TOP_P_TOP_K", "TOP_NSIGMA", *rest)
        assert_same(warped(logits, top_k=20, nsigma=0.8, sampler_priority=priority), logits, formula)

    def test_numbers_are_those_of_koboldcpp(self) -> None:
        named = tuple(SAMPLERS[number] for number in (6, 7, 8, 0, 1, 3, 4, 2, 5, 9, 10, 11, 12, 13))
        by_number = state(sampler_priority=(6, 7, 8, 0, 1, 3, 4, 2, 5, 9, 10, 11, 12, 13)).warping
        by_name = state(sampler_priority=named).warping
        assert by_number is not None
        assert by_name is not None
        assert by_number.order == by_name.order == (*named[3:], "MIROSTAT")


def in_order(row: Row, params: dict[str, Any]) -> Row:
    """Probabilities after the formulas of all samplers, one after another in the documented order."""

    def cut(kept: npt.NDArray[np.bool_]) -> None:
        nonlocal row
        row = np.where(kept, row, -np.inf)

    row = row / params["temperature"]
    there = row > -np.inf
    cut(row >= row.max() - params["nsigma"] * row[there].std(ddof=1))
    cut(row >= np.sort(row)[-params["top_k"]])
    p = softmax(row)
    order = np.argsort(-p, kind="stable")
    cut(p >= p[order[np.searchsorted(p[order].cumsum(), params["top_p"])]])
    p = softmax(row)
    cut(p >= params["top_a"] * p.max() ** 2)
    p = softmax(row)
    cut(p >= params["min_p"] * p.max())
    p = softmax(row)
    ordered = np.sort(p)[::-1]
    curvature = np.abs(np.diff(np.diff(ordered)))
    cut(p >= ordered[(curvature.cumsum() / curvature.sum() <= params["tfs"]).sum()])
    p = softmax(row)
    eta = params["eta_cutoff"] * 1e-4
    entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
    cut(p >= min(eta, eta**0.5 * np.exp(-entropy)))
    p = softmax(row)
    cut(p >= params["epsilon_cutoff"] * 1e-4)
    p = softmax(row)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
        surprise = np.abs(-np.log(p) - entropy)
        order = np.argsort(surprise)
        cut(surprise <= surprise[order[np.searchsorted(p[order].cumsum(), params["typical_p"])]])
        factor, curve = params["smoothing_factor"], params["smoothing_curve"]
        x = row - row.max()
        row = np.where(x > -np.inf, -factor * (3 - curve) / 2 * x**2 + factor * (curve - 1) / 2 * x**3, x)
    p = softmax(row)
    choices = np.flatnonzero(p >= params["xtc_threshold"])
    if len(choices) > 1:
        row[np.setdiff1d(choices, choices[np.argmin(p[choices])])] = -np.inf
    return softmax(row)


class TestTogether:
    @pytest.mark.parametrize("seed", range(20))
    def test_all_in_their_order(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        params: dict[str, Any] = {
            "temperature": random.uniform(0.7, 2.0), "nsigma": random.uniform(1.5, 4.0),
            "top_k": int(random.integers(20, 300)), "top_p": random.uniform(0.7, 1.0),
            "top_a": random.uniform(0.0, 0.3), "min_p": random.uniform(0.0, 0.05), "tfs": random.uniform(0.9, 1.0),
            "eta_cutoff": random.uniform(0.1, 20.0), "epsilon_cutoff": random.uniform(0.1, 20.0),
            "typical_p": random.uniform(0.4, 0.95), "smoothing_factor": random.uniform(0.1, 2.0),
            "smoothing_curve": random.uniform(1.0, 3.0), "xtc_threshold": random.uniform(0.0, 0.2),
        }  # fmt: skip
        logits = random_logits(3, seed=seed, spread=2.5)
        ours = warped(logits, xtc_probability=1.0, **params)
        for mine, row in zip(ours, logits.double().numpy(), strict=True):
            np.testing.assert_allclose(mine, in_order(row, params), rtol=2e-3, atol=1e-7)

    def test_no_combination_loses_a_row_or_chooses_what_is_masked(self) -> None:
        """Every field at its ends and between, on logits of any size, with equals and with masks."""
        random = np.random.default_rng(2)

        def value(name: str) -> float:
            least, most, _ = RANGES[name]
            found = random.choice([least, most, random.uniform(least, most), random.uniform(least, least + 2)])
            whole = name in ("dry_allowed_length", "dry_range", "no_repeat_ngram_size")
            return int(found) if whole else float(min(found, most))

        def one_of(*values: Any) -> Any:
            return values[random.integers(len(values))]

        names = sorted(RANGES.keys() - {"no_repeat_ngram_size"})
        for _ in range(1500):
            params = {str(name): value(name) for name in random.choice(names, random.integers(1, 7), replace=False)}
            params |= one_of({}, {"tfs": one_of(1e-9, 0.5, 0.999)}, {"mirostat_mode": 2}, {"top_k": 1000})
            params |= one_of({}, {"top_p": 1e-9}, {"min_p": 1.0}, {"typical_p": one_of(1e-9, 0.5)})
            params |= {"temperature": one_of(0.0, 1e-30, 0.01, 1.0, 100.0), "temperature_last": one_of(True, False)}
            logits = random_logits(2, 200, int(random.integers(1000))) * one_of(1e-6, 1.0, 30.0, 1e4, 1e30)
            if one_of(True, False):
                logits[torch.from_numpy(random.random((2, 200)) < one_of(0.5, 0.99))] = -torch.inf
                logits[:, 0] = one_of(0.0, 1e30)
            states = [state([1, 2, 1, 2, 1], seed=row, **params) for row in range(2)]
            for _ in range(2):
                for row, token in enumerate(sample(logits, states)):
                    assert token >= 0, params
                    assert logits[row, token] > -torch.inf, params
                    states[row].output_token_ids.append(token)


class TestBounds:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("top_a", -0.1), ("tfs", 0.0), ("tfs", 1.1), ("eta_cutoff", -1.0), ("epsilon_cutoff", 1000.5),
            ("smoothing_factor", -0.1), ("smoothing_curve", 0.5), ("dynatemp_min", -1.0), ("dynatemp_max", 101.0),
            ("dynatemp_exponent", -1.0), ("xtc_threshold", 1.5), ("xtc_probability", -0.1), ("nsigma", -1.0),
            ("dry_multiplier", -1.0), ("dry_base", 0.5), ("dry_allowed_length", -1), ("dry_range", -2),
            ("mirostat_mode", 1), ("mirostat_tau", -1.0), ("mirostat_eta", -1.0), ("no_repeat_ngram_size", -1),
            ("no_repeat_ngram_size", 255), ("skew", 11.0), ("allowed_token_ids", ()), ("allowed_token_ids", (-1,)),
            ("bad_words", ("",)), ("bad_words", ("x" * 1001,)), ("bad_words", ("x",) * 1025),
            ("bad_words_token_ids", ((),)), ("bad_words_token_ids", ((2**40,),)), ("dry_sequence_breakers", ("",)),
            ("dry_sequence_breaker_ids", (-5,)), ("sampler_priority", (5,)), ("sampler_priority", ("X",)),
            ("sampler_priority", (99,)), ("sampler_priority", (-1,)), ("sampler_priority", tuple(range(14))),
            ("sampler_priority", (6, 7, 8, *range(6), *range(9, 14), 13)),
            *((name, number) for name in ("top_a", "tfs", "xtc_threshold", "nsigma", "skew", "dry_base")
              for number in (float("nan"), float("inf"))),
        ],
    )  # fmt: skip
    def test_what_is_out_of_range_is_named(self, name: str, value: Any) -> None:
        with pytest.raises(ValueError, match=rf"^{name} "):
            RequestSampling(**{name: value}).validate()

    def test_the_edges_are_allowed(self) -> None:
        logits = random_logits(1, 50)
        for params in (
            {"top_a": 100.0}, {"tfs": 1e-9}, {"eta_cutoff": 1e9}, {"epsilon_cutoff": 1000.0},
            {"smoothing_factor": 1000.0, "smoothing_curve": 100.0}, {"smoothing_factor": 1e-9},
            {"dynatemp_min": 100.0, "dynatemp_max": 100.0}, {"dynatemp_max": 1e-30, "dynatemp_exponent": 100.0},
            {"xtc_threshold": 0.0, "xtc_probability": 1.0}, {"xtc_threshold": 1.0, "xtc_probability": 1.0},
            {"nsigma": 1e6}, {"nsigma": 1e-9}, {"mirostat_mode": 2}, {"skew": 10.0}, {"skew": -10.0},
            {"mirostat_mode": 2, "mirostat_tau": 1000.0, "mirostat_eta": 1000.0},
            {"dry_multiplier": 1e6, "dry_base": 1000.0, "dry_allowed_length": 0, "dry_range": -1},
            {"no_repeat_ngram_size": 254}, {"allowed_token_ids": (49,)},
        ):  # fmt: skip
            one = state([1, 2, 3] * 200, seed=1, **params)
            for _ in range(5):
                (token,) = sample(logits, [one])
                assert token >= 0, params
                one.output_token_ids.append(token)


class TestEngine:
    def test_what_samplers_remember_survives_preemption_and_company(self, tmp_path: Path) -> None:
        """All kinds in a crowd that keeps losing its cache, prompts cut anywhere: each answers as it does alone."""
        path = make_llava(tmp_path / "model")
        kinds = [kind for kind in KINDS if "allowed_token_ids" not in kind]
        adds = [
            Add(
                0, [row, 3, row, 3, *range(row % 5), row], RequestSampling(max_tokens=60, ignore_eos=True, **kind),
                [row], MODELS_EOS,
            )
            for row, kind in enumerate(kinds)
        ]  # fmt: skip
        crowd = load_engine(
            path, max_model_len=90, kv_cache_bytes=512 * 128, max_num_batched_tokens=20, max_num_seqs=20
        )
        together = run_all(crowd, adds)
        assert crowd.stats().preemptions > 0
        alone = load_engine(path, max_model_len=90)
        for row, add in enumerate(adds):
            assert run_all(alone, [add])[0].token_ids == together[row].token_ids, kinds[row]

    def test_rules_that_leave_no_token_are_the_requests_own_fault(self, tmp_path: Path) -> None:
        engine = load_engine(make_llava(tmp_path / "model"))
        hopeless: list[dict[str, Any]] = [
            {"allowed_token_ids": MODELS_EOS, "min_tokens": 2},
            {"allowed_token_ids": (7,), "no_repeat_ngram_size": 1, "temperature": 0.0},
            {"allowed_token_ids": (9,), "bad_words_token_ids": ((9,),), "xtc_probability": 1.0},
        ]
        adds = [
            Add(0, [1, 2, 7], RequestSampling(max_tokens=8, ignore_eos=row == 3, **kind), [0], MODELS_EOS)
            for row, kind in enumerate([*hopeless, {}])
        ]
        results = run_all(engine, adds)
        for row in range(3):
            output = results[row].outputs[-1]
            assert (output.finish, output.invalid) == ("error", True)
            assert "leave no token to choose" in (output.error or "")
        assert results[3].finish == "length"
        assert engine.pool.num_used == 0


class TestWords:
    def test_unwanted_words_are_spelled_at_the_beginning_and_after_a_space(self) -> None:
        tokenizer = make_tokenizer()

        def ids(text: str) -> tuple[int, ...]:
            return tuple(tokenizer(text).input_ids)

        params = tokenise_words(RequestSampling(bad_words=("no", " né"), bad_words_token_ids=((5,),)), tokenizer)
        assert params.bad_words == ()
        assert set(params.bad_words_token_ids) == {(5,), ids("no"), ids(" no"), ids("né"), ids(" né")}

    def test_words_of_too_many_tokens_are_refused(self) -> None:
        words = tuple(f"{number:04}" * 200 for number in range(20))
        with pytest.raises(InvalidRequest, match=r"bad_words are 32020 tokens") as caught:
            tokenise_words(RequestSampling(bad_words=words), make_tokenizer())
        assert caught.value.param == "bad_words"
        runs = tuple((number, *range(1000)) for number in range(20))
        with pytest.raises(ValueError, match=r"^bad_words_token_ids holds 20020 ids in all"):
            RequestSampling(bad_words_token_ids=runs).validate()

    def test_drys_breakers_are_its_authors_unless_others_are_given(self) -> None:
        tokenizer = make_tokenizer()

        def last(*texts: str) -> tuple[int, ...]:
            return tuple(sorted(tokenizer(text).input_ids[-1] for text in texts))

        dry = {"dry_multiplier": 0.8}
        assert tokenise_words(RequestSampling(**dry), tokenizer).dry_sequence_breaker_ids == last(*DRY_BREAKERS)
        named = tokenise_words(
            RequestSampling(dry_sequence_breakers=("!?",), dry_sequence_breaker_ids=(9,), **dry), tokenizer
        )
        assert named.dry_sequence_breaker_ids == tuple(sorted((9, *last("?"))))
        none = tokenise_words(RequestSampling(dry_sequence_breakers=(), **dry), tokenizer)
        assert none.dry_sequence_breaker_ids == ()
        only_ids = tokenise_words(RequestSampling(dry_sequence_breaker_ids=(9,), **dry), tokenizer)
        assert only_ids.dry_sequence_breaker_ids == (9,)
        off = RequestSampling(dry_sequence_breakers=("x",))
        assert tokenise_words(off, tokenizer) is off


class TestVllm:
    """The words are vLLM's; a namespace stands for it, which keeps what it is given."""

    vllm: Any = SimpleNamespace(
        SamplingParams=dict, RequestOutputKind=SimpleNamespace(DELTA="delta"), refusals=(ValueError,)
    )

    def test_has_masks_of_its_own(self) -> None:
        asked = to_vllm(self.vllm, RequestSampling(allowed_token_ids=(3, 4), bad_words=("no",)), 1)
        assert (asked["allowed_token_ids"], asked["bad_words"]) == ([3, 4], ["no"])
        assert "extra_args" not in asked

    @pytest.mark.parametrize("params", KINDS)
    def test_what_it_lacks_is_carried_to_our_sampler_where_it_would_change_the_answer(
        self, params: dict[str, Any]
    ) -> None:
        given = RequestSampling(**params, repetition_penalty=1.3, stop=("x",), min_tokens=2, logprobs=1, seed=5)
        asked = to_vllm(self.vllm, given, 1)
        own = set(params) <= {"temperature", "allowed_token_ids"}
        assert ("extra_args" in asked) is not own
        if own:
            assert asked["repetition_penalty"] == 1.3
            return
        assert {name: asked[name] for name in NEUTRAL} == NEUTRAL
        assert asked["temperature"] == (0.0 if given.greedy else 1.0)
        assert (asked["stop"], asked["min_tokens"], asked["logprobs"]) == (["x"], 2, 1)
        sent = msgspec.msgpack.decode(asked["extra_args"][KEY], type=Carried).params
        assert sent == msgspec.structs.replace(
            given.for_engine(), min_tokens=0, logprobs=None, seed=None, allowed_token_ids=None
        )

    def test_what_a_greedy_answer_does_not_look_at_is_left_out(self) -> None:
        given = RequestSampling(
            temperature=0.0, top_a=0.5, typical_p=0.3, mirostat_mode=2, sampler_priority=tuple(range(14))
        )
        assert "extra_args" not in to_vllm(self.vllm, given, 1)

    def test_an_answer_without_a_seed_is_given_one(self) -> None:
        """All processes of one engine must draw the same."""
        seeds = {to_vllm(self.vllm, RequestSampling(top_a=0.5), 3)["seed"] for _ in range(5)}
        assert len(seeds) == 5
        assert to_vllm(self.vllm, RequestSampling(temperature=0.5), 3)["seed"] is None

    @pytest.mark.parametrize(
        "params",
        [
            {"typical_p": 0.5}, {"dry_multiplier": 1.0, "temperature": 0.0, "typical_p": 0.5},
            {"no_repeat_ngram_size": 2}, {"bad_words_token_ids": ((3,),)},
            {"temperature_last": True, "temperature": 0.5, "top_p": 0.5},
        ],
    )  # fmt: skip
    def test_where_the_engine_lacks_them_too_they_are_refused(self, params: dict[str, Any]) -> None:
        name = next(iter(params))
        with pytest.raises(InvalidRequest, match=rf"^{name} is not a sampler of vLLM with it:") as caught:
            to_vllm(self.vllm, RequestSampling(**params), 1, None, Samplers("with it"))
        assert caught.value.param == name
        plain = RequestSampling(temperature=0.7, top_p=0.5, xtc_threshold=0.3, dry_base=2.0)
        assert "extra_args" not in to_vllm(self.vllm, plain, 1, None, Samplers("with it"))

    def test_probabilities_that_would_be_those_of_the_choice_are_refused(self) -> None:
        asked = RequestSampling(top_a=0.5, logprobs=1)
        with pytest.raises(InvalidRequest, match="logprobs_mode"):
            to_vllm(self.vllm, asked, 1, samplers=Samplers(reports_choice=True))
        assert to_vllm(self.vllm, asked, 1)["logprobs"] == 1

    def test_breakers_are_spelled_and_unwanted_words_left_to_it(self) -> None:
        tokenizer = make_tokenizer()
        given = RequestSampling(dry_multiplier=1.0, bad_words=("blue",))
        params = tokenise_words(given, tokenizer, words=False)
        assert params.dry_sequence_breaker_ids == tokenise_words(given, tokenizer).dry_sequence_breaker_ids
        assert (params.bad_words, params.bad_words_token_ids) == (("blue",), ())

    def test_the_operators_own_processors_stay(self, tmp_path: Path) -> None:
        arguments: dict[str, Any] = {"model": str(tmp_path), "logits_processors": ["their.module:Theirs"]}
        assert offer(arguments) == Samplers()
        assert arguments["logits_processors"] == ["their.module:Theirs", PROCESSOR]
        assert offer(arguments) == Samplers()
        assert arguments["logits_processors"] == ["their.module:Theirs", PROCESSOR]

    @pytest.mark.parametrize("by_model", [True, False])
    def test_none_where_the_engine_drafts(self, tmp_path: Path, by_model: bool) -> None:
        arguments: dict[str, Any] = {"model": str(tmp_path)}
        if by_model:
            (tmp_path / "config.json").write_text('{"speculators_config": {"algorithm": "eagle3"}, "limit": Infinity}')
        else:
            arguments["speculative_config"] = {"method": "ngram"}
        assert offer(arguments).lacking == "with speculative decoding"
        assert "logits_processors" not in arguments


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_accelerator_gives_the_same_tokens() -> None:
    device = torch.device("cuda")
    here, there = ([state([1, 2, 1], seed=row, **KINDS[row]) for row in range(len(KINDS))] for _ in range(2))
    for step in range(8):
        logits = random_logits(len(KINDS), seed=step)
        tokens = sample(logits, here)
        assert Sampler(300, device).sample(logits.to(device), there)[0] == tokens
        for group in (here, there):
            for one, token in zip(group, tokens, strict=True):
                one.output_token_ids.append(token)
