"""The next token of each row: against transformers' processors, against exact probabilities, and alone."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from engine.messages import Logprobs
from engine.repetition import TokenCounts
from engine.sampler import Sampler, masses, pick, prompt_logprobs
from engine.sampling_params import SamplingParams
from engine.sampling_state import SamplingState, mix64, uniform
from engine.warping import keep_likeliest, keep_typical

CPU = torch.device("cpu")
EOS = 2


def state(prompt: list[int] | None = None, output: list[int] | None = None, **params: Any) -> SamplingState:
    return SamplingState(
        params=SamplingParams(**params),
        prompt_token_ids=prompt or [],
        output_token_ids=output if output is not None else [],
        eos_token_ids=(EOS,),
        seed=params.get("seed") or 0,
    )


def random_logits(rows: int, vocab_size: int = 1000, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def sample(logits: torch.Tensor, states: list[SamplingState]) -> list[int]:
    return Sampler(logits.shape[-1], CPU).sample(logits, states)[0]


def answered(logits: torch.Tensor, states: list[SamplingState]) -> list[Logprobs | None]:
    return Sampler(logits.shape[-1], CPU).sample(logits, states)[1]


def edited(logits: torch.Tensor, states: list[SamplingState]) -> torch.Tensor:
    return Sampler(logits.shape[-1], CPU).edit(logits, states)


def column(value: float, rows: int) -> torch.Tensor:
    return torch.full((rows, 1), value, dtype=torch.float64)


def filtered(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    typical_p: float = 1.0,
) -> torch.Tensor:
    """Probabilities after the filters, as the sampler applies them."""
    rows, vocab_size = logits.shape
    mass = masses(logits, column(temperature, rows))
    k = min(top_k or vocab_size, vocab_size)
    ordered = k < vocab_size or top_p < 1.0
    mass = keep_likeliest(mass, column(k, rows), column(top_p, rows), column(min_p, rows), ordered=ordered)
    if typical_p < 1.0:
        mass = keep_typical(mass, column(typical_p, rows))
    return mass / mass.sum(-1, keepdim=True)


def warped(logits: torch.Tensor, *warpers: Any) -> torch.Tensor:
    return LogitsProcessorList(warpers)(torch.zeros(len(logits), 1, dtype=torch.long), logits).softmax(-1)


def assert_same_distribution(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert torch.equal(ours > 0, theirs > 0)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-9)


class TestGreedy:
    def test_takes_the_best_and_the_lowest_of_equals(self) -> None:
        logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 1.0, 5.0, 5.0]])
        assert sample(logits, [state(temperature=0.0)] * 2) == [1, 0]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_is_argmax_in_every_precision(self, dtype: torch.dtype) -> None:
        logits = random_logits(64, seed=1).to(dtype)
        assert sample(logits, [state(temperature=0.0)] * 64) == logits.argmax(-1).tolist()

    def test_ignores_filters_and_seed(self) -> None:
        logits = random_logits(1)
        greedy = state(temperature=0.0, top_k=3, top_p=0.1, min_p=0.5, typical_p=0.2, seed=9)
        assert sample(logits, [greedy]) == logits.argmax(-1).tolist()


class TestEditsOfLogits:
    @pytest.mark.parametrize("penalty", [0.5, 1.3, 100.0])
    def test_repetition_penalty_is_transformers(self, penalty: float) -> None:
        logits = random_logits(3)
        prompt, output = [1, 5, 5, 999, 0], [7, 5, 12]
        ours = edited(logits, [state(prompt, output, repetition_penalty=penalty)] * 3)
        theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output] * 3), logits)
        assert torch.equal(ours, theirs)

    def test_presence_and_frequency_penalties_count_the_answer_alone(self) -> None:
        logits = random_logits(1, 10)
        ours = edited(logits, [state([3, 4], [5, 5, 6], presence_penalty=0.5, frequency_penalty=0.25)])
        expected = logits.clone()
        expected[0, 5] -= 0.5 + 2 * 0.25
        expected[0, 6] -= 0.5 + 0.25
        torch.testing.assert_close(ours, expected)

    def test_penalties_follow_an_answer_that_grows(self) -> None:
        logits = random_logits(1, 300)
        output: list[int] = []
        growing = state([1, 2], output, repetition_penalty=1.2, frequency_penalty=0.3)
        for step in range(200):
            fresh = state([1, 2], list(output), repetition_penalty=1.2, frequency_penalty=0.3)
            assert torch.equal(edited(logits, [growing]), edited(logits, [fresh]))
            output.append(step * step % 97)

    def test_bias_is_added_and_unknown_ids_are_ignored(self) -> None:
        logits = random_logits(2, 10)
        ours = edited(logits, [state([-1, 10], logit_bias={3: 2.5, 10: 9.0, -1: 9.0}, repetition_penalty=2), state()])
        expected = logits.clone()
        expected[0, 3] += 2.5
        torch.testing.assert_close(ours, expected)

    @pytest.mark.parametrize("length", [0, 1, 2, 3])
    def test_min_tokens_is_transformers(self, length: int) -> None:
        logits = random_logits(1, 10)
        ours = edited(logits, [state([1], [4] * length, min_tokens=2)])
        processor = MinNewTokensLengthLogitsProcessor(1, 2, [EOS], device="cpu")
        theirs = processor(torch.tensor([[1] + [4] * length]), logits)
        assert torch.equal(ours, theirs)
        beside_a_bias = edited(logits, [state([1], [4] * length, min_tokens=2, logit_bias={9: 0.0})])
        assert torch.equal(beside_a_bias, theirs)

    def test_min_tokens_masks_stop_ids_too_but_no_ignored_end(self) -> None:
        logits = torch.zeros(2, 6)
        ours = edited(
            logits,
            [state(min_tokens=1, stop_token_ids=(4,)), state(min_tokens=1, stop_token_ids=(4,), ignore_eos=True)],
        )
        assert ours.isneginf().nonzero().tolist() == [[0, EOS], [0, 4], [1, 4]]

    def test_order_is_repetition_then_penalties_then_bias(self) -> None:
        logits = torch.tensor([[4.0, 0.0, 0.0]])
        ours = edited(logits, [state([], [0], repetition_penalty=2.0, presence_penalty=1.0, logit_bias={0: 10.0})])
        assert ours.tolist() == [[4.0 / 2.0 - 1.0 + 10.0, 0.0, 0.0]]

    def test_leaves_the_logits_and_the_other_rows_as_they_were(self) -> None:
        logits = random_logits(3, 50)
        before = logits.clone()
        states = [
            state(temperature=0.0),
            state([1], [2], temperature=0.0, repetition_penalty=1.5, min_tokens=9),
            state([1], [2], logit_bias={1: 100.0}, top_k=1),
        ]
        chosen = sample(logits, states)
        assert torch.equal(logits, before)
        assert chosen[0] == before[0].argmax()
        assert chosen[2] == 1

    @given(st.lists(st.integers(0, 8)), st.lists(st.lists(st.integers(0, 8))))
    @settings(max_examples=50, deadline=None)
    def test_counts_are_those_of_the_whole_list(self, start: list[int], parts: list[list[int]]) -> None:
        counts, growing = TokenCounts(start), list[int]()
        for part in parts:
            growing += part
            counts.follow(growing)
        everything = start + growing
        got = dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True))
        assert got == {token: everything.count(token) for token in everything}


class TestFilters:
    """Each filter keeps what the warper of its name keeps; 5,000 entries make the cut's search go deeper."""

    @pytest.fixture(params=[40, 1000, 5000])
    def logits(self, request: pytest.FixtureRequest) -> torch.Tensor:
        return torch.cat([random_logits(4, request.param, spread=spread) for spread in (0.1, 1.0, 5.0)])

    @pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
    def test_temperature(self, logits: torch.Tensor, temperature: float) -> None:
        theirs = warped(logits, TemperatureLogitsWarper(temperature))
        assert_same_distribution(filtered(logits, temperature), theirs)

    @pytest.mark.parametrize("top_k", [1, 2, 39, 512, 4999, 100_000])
    def test_top_k(self, logits: torch.Tensor, top_k: int) -> None:
        assert_same_distribution(filtered(logits, top_k=top_k), warped(logits, TopKLogitsWarper(top_k)))

    @pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.99])
    def test_top_p(self, logits: torch.Tensor, top_p: float) -> None:
        assert_same_distribution(filtered(logits, top_p=top_p), warped(logits, TopPLogitsWarper(top_p)))

    @pytest.mark.parametrize("min_p", [0.01, 0.2, 1.0])
    def test_min_p(self, logits: torch.Tensor, min_p: float) -> None:
        assert_same_distribution(filtered(logits, min_p=min_p), warped(logits, MinPLogitsWarper(min_p)))

    @pytest.mark.parametrize("typical_p", [0.05, 0.5, 0.95])
    def test_typical_p(self, logits: torch.Tensor, typical_p: float) -> None:
        theirs = warped(logits, TypicalLogitsWarper(typical_p))
        assert_same_distribution(filtered(logits, typical_p=typical_p), theirs)

    def test_all_together_in_the_order_of_generate(self, logits: torch.Tensor) -> None:
        theirs = warped(
            logits,
            TemperatureLogitsWarper(1.7),
            TopKLogitsWarper(30),
            TopPLogitsWarper(0.8),
            MinPLogitsWarper(0.05),
            TypicalLogitsWarper(0.7),
        )
        assert_same_distribution(filtered(logits, 1.7, 30, 0.8, 0.05, 0.7), theirs)

    def test_equals_at_the_cut_stay_together(self) -> None:
        logits = torch.tensor([[1.0, 2.0, 1.0, 1.0, -4.0]])
        assert (filtered(logits, top_k=2) > 0).tolist() == [[True, True, True, True, False]]
        assert (filtered(logits, top_p=0.5) > 0).tolist() == [[True, True, True, True, False]]

    def test_rows_have_their_own_parameters(self) -> None:
        logits = random_logits(5, 3000, spread=1.0)
        top_k, top_p, min_p = ([3000, 7, 3000, 2000, 3000], [1.0, 0.9, 0.95, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.3])
        columns = [torch.tensor(values, dtype=torch.float64).unsqueeze(1) for values in (top_k, top_p, min_p)]
        together = keep_likeliest(masses(logits, column(1.0, 5)), *columns, ordered=True)
        for row in range(5):
            alone = filtered(logits[row : row + 1], 1.0, top_k[row], top_p[row], min_p[row])
            torch.testing.assert_close(together[row : row + 1] / together[row].sum(), alone)

    @pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e-6])
    def test_tiny_temperature_is_greedy(self, temperature: float) -> None:
        logits = random_logits(8)
        assert sample(logits, [state(temperature=temperature)] * 8) == logits.argmax(-1).tolist()

    def test_huge_temperature_is_uniform(self) -> None:
        torch.testing.assert_close(filtered(random_logits(1, 10), 1e30), torch.full((1, 10), 0.1))


class TestDraw:
    @pytest.mark.parametrize(
        "params", [{}, {"top_p": 0.9}, {"top_k": 5, "temperature": 0.5}, {"min_p": 0.1}, {"typical_p": 0.8}]
    )
    def test_frequencies_are_the_exact_probabilities(self, params: dict[str, Any]) -> None:
        """Pearson's chi-square below its mean + 4 standard deviations; seeds 0..n-1, so it never flickers."""
        logits, draws = random_logits(1, 30, seed=4, spread=1.5), 20_000
        exact = filtered(logits, **params)[0].double().numpy()
        states = [state(seed=seed, **params) for seed in range(draws)]
        counts = np.bincount(sample(logits.expand(draws, -1), states), minlength=30)
        assert not counts[exact == 0].any()
        exact, counts = exact[exact > 0], counts[exact > 0]
        freedom = len(exact) - 1
        chi_square = ((counts - draws * exact) ** 2 / (draws * exact)).sum()
        assert chi_square < freedom + 4 * np.sqrt(2 * freedom)

    def test_successive_draws_of_one_seed_are_independent(self) -> None:
        numbers = np.array([uniform(mix64(3), n) for n in range(20_000)])
        assert abs(numbers.mean() - 0.5) < 0.01
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03
        neighbours = np.array([[uniform(mix64(seed), n) for n in range(100)] for seed in (0, 1, -1, 2**64)])
        assert abs(np.corrcoef(neighbours[0], neighbours[1])[0, 1]) < 0.4
        assert np.array_equal(neighbours[0], neighbours[3])

    def test_first_numbers_of_a_seed_never_change(self) -> None:
        """Splitmix64's published sequence for state 1234567, so that a seed means the same in each release."""
        first = [mix64(1234567 + (n + 1) * 0x9E3779B97F4A7C15) for n in range(2)]
        assert first == [6457827717110365317, 3203168211198807973]
        assert uniform(1234567, 0) == (first[0] >> 11) / 2**53

    def test_does_not_depend_on_the_batch(self) -> None:
        logits = random_logits(40, 3001, spread=1.5)
        kinds: list[dict[str, Any]] = [
            {"temperature": 0.0},
            {"temperature": 0.8},
            {"top_p": 0.9},
            {"top_k": 700, "temperature": 2.0},
            {"top_k": 20, "top_p": 0.7, "min_p": 0.01, "typical_p": 0.9},
            {"repetition_penalty": 1.4, "presence_penalty": 1.0, "logprobs": 3},
            {"temperature": 0.0, "frequency_penalty": 1.0, "logit_bias": {5: 3.0}},
            {"min_tokens": 50},
        ]
        states = [
            state([row, 3, 9], [row % 7] * (row % 5), seed=row + 1, **kinds[row % len(kinds)]) for row in range(40)
        ]
        together = sample(logits, states)
        alone = [sample(logits[row : row + 1], [states[row]])[0] for row in range(40)]
        assert together == alone
        order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
        assert sample(logits[order], [states[row] for row in order]) == [together[row] for row in order]

    def test_depends_on_seed_and_position_alone(self) -> None:
        """A preempted or restarted sequence has a new state and the same tokens so far: the same draw."""
        logits = random_logits(1, spread=1.0)
        output = [4, 5, 6]
        lived = state([1, 2], [], seed=11, repetition_penalty=1.1)
        for token in output:
            sample(logits, [lived])
            lived.output_token_ids.append(token)
        assert sample(logits, [lived]) == sample(logits, [state([1, 2], output, seed=11, repetition_penalty=1.1)])
        positions = {sample(logits, [state(output=[1] * n, seed=11)])[0] for n in range(20)}
        assert len(positions) > 10

    @pytest.mark.parametrize("vocab_size", [1, 5, 63, 64, 65, 1000])
    @pytest.mark.parametrize("number", [0.0, 0.5, 1.0 - 2.0**-53])
    def test_never_picks_what_is_masked(self, vocab_size: int, number: float) -> None:
        generator = torch.Generator().manual_seed(vocab_size)
        mass = torch.rand(50, vocab_size, generator=generator) ** 20
        mass = mass * (torch.rand(50, vocab_size, generator=generator) < 0.1)
        mass[:, vocab_size // 2] = 1e-30
        chosen = pick(mass, column(number, 50))
        assert (mass.gather(-1, chosen.unsqueeze(-1)) > 0).all()

    def test_is_the_inverse_of_the_cumulative_distribution(self) -> None:
        mass = torch.rand(1, 300, generator=torch.Generator().manual_seed(0)) ** 3
        numbers = np.linspace(0.0, 0.9999, 777)
        cumulative = (mass[0].double() / mass.double().sum()).cumsum(0).numpy()
        chosen = pick(mass.expand(777, -1).contiguous(), torch.from_numpy(numbers).unsqueeze(1))
        assert chosen.tolist() == np.searchsorted(cumulative, numbers, side="right").tolist()

    def test_picks_the_first_and_the_last_at_the_ends(self) -> None:
        mass = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0, 0.0]])
        assert pick(mass, column(0.0, 1)).item() == 1
        assert pick(mass, column(1.0 - 2.0**-53, 1)).item() == 4


class TestBadRows:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("where", [0, EOS, 49])
    @pytest.mark.parametrize(
        "params",
        [
            {"temperature": 0.0},
            {"temperature": 0.0, "min_tokens": 3},
            {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 2},
            {},
            {"top_p": 0.9, "top_k": 4},
            {"min_p": 0.2},
            {"typical_p": 0.5, "logprobs": 1},
            {"min_tokens": 3, "logit_bias": {0: 1.0}},
        ],
    )
    def test_fail_alone(self, bad: float, where: int, params: dict[str, Any]) -> None:
        logits = random_logits(3, 50)
        states = [state([1], [4], seed=row, **params) for row in range(3)]
        healthy = sample(logits, states)
        logits[1, where] = bad
        tokens, logprobs = Sampler(50, CPU).sample(logits, states)
        assert tokens == [healthy[0], -1, healthy[2]]
        assert logprobs[1] is None

    @pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"typical_p": 0.5}])
    def test_nothing_left_is_no_token(self, params: dict[str, Any]) -> None:
        logits = random_logits(2, 50)
        logits[0] = -torch.inf
        tokens = sample(logits, [state(**params), state(**params)])
        assert tokens[0] == -1
        assert tokens[1] >= 0

    def test_only_the_end_is_possible_but_it_is_too_early(self) -> None:
        logits = torch.full((1, 5), -torch.inf)
        logits[0, EOS] = 1.0
        assert sample(logits, [state(min_tokens=1)]) == [-1]
        assert sample(logits, [state(min_tokens=1, output=[4])]) == [EOS]

    def test_bias_against_everything_still_gives_a_token(self) -> None:
        logits = random_logits(2, 50)
        bias = dict.fromkeys(range(50), -100.0)
        states = [state(temperature=0.0, logit_bias=bias), state(logit_bias=bias)]
        chosen = sample(logits, states)
        assert chosen[0] == logits[0].argmax()
        assert chosen[1] >= 0


class TestLogprobs:
    def test_are_of_the_raw_distribution(self) -> None:
        logits = random_logits(3)
        asking = state(temperature=0.5, top_k=3, logit_bias={7: 100.0}, logprobs=4)
        quiet, chosen_alone = state(temperature=0.0), state(temperature=0.0, logprobs=0)
        tokens, logprobs = Sampler(1000, CPU).sample(logits, [asking, quiet, chosen_alone])
        raw = logits.log_softmax(-1)
        best = raw[0].topk(4)
        assert tokens[0] == 7
        assert logprobs[0] is not None
        assert logprobs[0].token_ids == [7, *best.indices.tolist()]
        assert logprobs[0].logprobs == pytest.approx([raw[0, 7].item(), *best.values.tolist()], abs=1e-5)
        assert logprobs[0].ranks == [int((raw[0] > raw[0, 7]).sum()) + 1, 1, 2, 3, 4]
        assert logprobs[1] is None
        assert logprobs[2] is not None
        assert (logprobs[2].token_ids, logprobs[2].ranks) == ([tokens[2]], [1])

    def test_equals_share_a_rank_and_come_by_id(self) -> None:
        logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 0.0]])
        (answer,) = answered(logits, [state(temperature=0.0, logprobs=3)])
        assert answer is not None
        assert (answer.token_ids, answer.ranks) == ([1, 1, 3, 2], [1, 1, 1, 3])

    @pytest.mark.parametrize("k", [1, 2, 5])
    def test_a_greedy_token_is_among_the_best_even_if_many_equal_it(self, k: int) -> None:
        logits = torch.zeros(1, 500)
        logits[0, 200:] = 4.0
        (answer,) = answered(logits, [state(temperature=0.0, logprobs=k)])
        assert answer is not None
        assert answer.token_ids[0] == 200
        assert 200 in answer.token_ids[1:]

    def test_a_token_that_equals_the_last_of_the_best_is_preferred_to_it(self) -> None:
        logits = torch.tensor([[5.0] + [4.0] * 9])
        for token in range(1, 10):
            (answer,) = prompt_logprobs(logits, [token], 2)
            assert answer.token_ids == [token, 0, token]
            assert answer.ranks == [2, 1, 2]

    def test_more_than_the_vocabulary_is_all_of_it(self) -> None:
        (answer,) = answered(torch.tensor([[1.0, 3.0, 2.0]]), [state(logprobs=20)])
        assert answer is not None
        assert answer.token_ids[1:] == [1, 2, 0]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_prompt_logprobs_are_log_softmax(self, dtype: torch.dtype) -> None:
        logits = random_logits(7, 100).to(dtype)
        following = [3, 99, 0, 3, 50, 51, 52]
        answers = prompt_logprobs(logits, following, 2)
        raw = logits.float().log_softmax(-1)
        assert [answer.token_ids[0] for answer in answers] == following
        for row, answer in enumerate(answers):
            assert answer.logprobs == pytest.approx(raw[row, answer.token_ids].tolist(), abs=1e-5)
            assert answer.logprobs[1:] == pytest.approx(raw[row].topk(2).values.tolist(), abs=1e-5)
            assert answer.ranks[0] == int((raw[row] > raw[row, following[row]]).sum()) + 1
        assert prompt_logprobs(logits[:0], [], 2) == []
        assert prompt_logprobs(logits[:1], [3], 0)[0].token_ids == [3]

    def test_travel_as_arrays(self) -> None:
        answer = Logprobs([1, 2], [-0.5, -1.0], [1, 2])
        packed = msgspec.msgpack.encode(answer)
        assert msgspec.msgpack.decode(packed) == [[1, 2], [-0.5, -1.0], [1, 2]]
        assert msgspec.msgpack.decode(packed, type=Logprobs) == answer


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_accelerator_gives_the_same_tokens() -> None:
    device = torch.device("cuda")
    logits = random_logits(6, 5000)
    states = [
        state([1, 2], [3], seed=row, **params)
        for row, params in enumerate(
            [
                {"temperature": 0.0},
                {"temperature": 0.0, "repetition_penalty": 1.3},
                {"top_p": 0.9},
                {"top_k": 40, "min_p": 0.05},
                {"typical_p": 0.7},
                {"logprobs": 3, "min_tokens": 5},
            ]
        )
    ]
    assert Sampler(5000, device).sample(logits.to(device), states)[0] == sample(logits, states)
