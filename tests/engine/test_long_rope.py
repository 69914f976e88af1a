"""LongRoPE: each request has the frequencies of its own length, whatever shares its step, before and after it grows."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from engine.sampling_params import SamplingParams
from tests.support.engine_driver import Oracle, Prompt, load_engine, run_all
from tests.support.exactness import PromptMaker, check_random_load
from tests.support.likeness import check_two_ranks
from tests.support.models import make_text_model

LIMIT = 48
PAIRS = 8
"""Of values of a head that are rotated together."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    """The reference computes each answer's tokens without a cache: with one, transformers 5.19 forgets the prompt of a
    Phi-3 whose answer passes the limit."""
    path = make_text_model(
        tmp_path_factory.mktemp("models") / "phi3",
        "phi3",
        sliding_window=40,
        original_max_position_embeddings=LIMIT,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "short_factor": [1.0 + 0.1 * pair for pair in range(PAIRS)],
            "long_factor": [2.0 + pair for pair in range(PAIRS)],
        },
    )
    oracle = Oracle(path)
    assert oracle.model.generation_config is not None
    oracle.model.generation_config.use_cache = False
    return path, oracle


def about_the_limit() -> PromptMaker:
    """Prompts that end below the limit, on it and above it, and share beginnings of either kind."""

    def make(rng: random.Random, prefixes: list[list[int]]) -> Prompt:
        length = rng.choice([5, LIMIT - 10, LIMIT - 1, LIMIT, LIMIT + 1, LIMIT + 30])
        begun = rng.choice(prefixes) if rng.random() < 0.6 else []
        return Prompt([*begun, *(rng.randrange(256) for _ in range(length))][:length])

    return make


@pytest.mark.parametrize("seed", range(6))
def test_tokens_equal_generate_for_random_loads(model: tuple[Path, Oracle], seed: int) -> None:
    path, oracle = model
    check_random_load(path, oracle, seed, about_the_limit())


def test_the_two_sets_of_frequencies_give_other_answers(model: tuple[Path, Oracle]) -> None:
    """Else the other tests would show nothing: a beginning that a long prompt computed is of no use to a short one."""
    path, oracle = model
    engine = load_engine(path, block_size=4)
    params = SamplingParams(temperature=0.0, max_tokens=LIMIT, ignore_eos=True)
    short, long = Prompt([*range(40)]), Prompt([*range(40), *range(30)])
    (first,) = run_all(engine, [long.add(None, params)]).values()
    (second,) = run_all(engine, [short.add(None, params)]).values()
    (third,) = run_all(engine, [long.add(None, params)]).values()
    assert [result.outputs[0].cached_tokens for result in (first, second, third)] == [0, 0, 68]
    assert second.token_ids == oracle.generate(short, LIMIT, ignore_eos=True)
    assert first.token_ids == third.token_ids == oracle.generate(long, LIMIT, ignore_eos=True)
    engine.runner.model.long_rope.frequencies[1] = engine.runner.model.long_rope.frequencies[0]  # type: ignore[union-attr]
    (other,) = run_all(engine, [short.add(None, params)]).values()
    assert other.token_ids[: LIMIT - 40 + 1] == second.token_ids[: LIMIT - 40 + 1]
    assert other.token_ids != second.token_ids


def test_several_answers_cross_the_limit_together(model: tuple[Path, Oracle]) -> None:
    path, oracle = model
    prompt = Prompt([*range(LIMIT - 4)])
    add = prompt.add(None, SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True))
    add.seeds = [1, 2, 3]
    results = run_all(load_engine(path, max_num_seqs=2), [add])
    want = oracle.generate(prompt, 20, ignore_eos=True)
    assert [result.token_ids for result in results.values()] == [want] * 3


def test_two_ranks_share_its_fused_projections(model: tuple[Path, Oracle]) -> None:
    path, oracle = model
    prompts = [Prompt([1, 2, 3]), Prompt([*range(LIMIT - 5)]), Prompt([*range(LIMIT + 20)])]
    check_two_ranks(path, oracle, prompts, length=20, ignore_eos=False)
