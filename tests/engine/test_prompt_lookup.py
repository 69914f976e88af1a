"""Speculative decoding by prompt lookup: the drafts, no token of any answer changes, and it saves steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher

from engine.config import LookupConfig, Vocabulary
from engine.messages import Add
from engine.prompt_lookup import PromptLookup
from engine.sampling_params import SamplingParams
from handlers.backends.rolling.plan import plan_engines
from handlers.errors import InvalidConfiguration
from properties.settings import Settings
from tests.support.engine_driver import EOS, Oracle, Prompt, Result, load_engine, random_image, run_all
from tests.support.live import LiveServer
from tests.support.models import VOCAB, make_llava, make_text_model, make_tokenizer
from tests.support.second_rank import two_ranks
from tests.support.shapes import SHAPES, drawing

LOOKUP = LookupConfig(tokens=4, shortest=1, longest=3)


def expected(ids: list[int], most: int, setting: LookupConfig) -> list[int]:
    """The same rule, by trying every place."""
    for length in range(setting.longest, setting.shortest - 1, -1):
        ends = [
            end for end in range(length, len(ids)) if length < len(ids) and ids[end - length : end] == ids[-length:]
        ]
        if ends:
            whole = [end for end in ends if end + most <= len(ids)]
            start = whole[-1] if whole else ends[0]
            return ids[start : start + most]
    return []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 6), st.integers(1, 3), st.integers(0, 2))
def test_drafts_are_what_followed_the_longest_match(ids: list[int], most: int, shortest: int, more: int) -> None:
    setting = LookupConfig(6, shortest, shortest + more)
    lookup = PromptLookup(setting)
    for count in range(1, len(ids) + 1):
        assert lookup.draft(ids[:count], most) == expected(ids[:count], most, setting)


def test_wrong_drafts_make_the_next_ones_shorter_and_right_ones_longer() -> None:
    lookup = PromptLookup(LookupConfig(8, 1, 1))
    ids = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1]
    lengths = []
    for accepted in (0, 0, 1, 1, 3, 6, 0):
        lengths.append(len(lookup.draft(ids, 99)))
        lookup.verified(lengths[-1], accepted)
    assert lengths == [8, 1, 1, 2, 3, 6, 8]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(scope="module")
def oracle(path: Path) -> Oracle:
    return Oracle(path)


ABABAB = [64, 65] * 4  # "ab" four times
QUOTED = [10, 20, 30, 40, 50, 60] * 5


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 1},
        {"temperature": 0.4},
        {"temperature": 0.9, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
        {"temperature": 0.7, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
        {"temperature": 0.0, "min_tokens": 20, "ignore_eos": False, "stop_token_ids": (30,)},
        {"temperature": 0.0, "no_repeat_ngram_size": 3},
        {"temperature": 0.8, "mirostat_mode": 2, "mirostat_tau": 3.0, "mirostat_eta": 0.1},
        {"temperature": 0.0, "logit_bias": {10: 3.0, 20: 3.0}},
    ],
    ids=str,
)  # fmt: skip
def test_no_answer_changes(path: Path, oracle: Oracle, params: dict[str, Any]) -> None:
    """Nor its log probabilities, whatever chooses the tokens, with others in the batch and with images."""
    sampling = SamplingParams(**{"max_tokens": 40, "ignore_eos": True, **params})
    prompts = [
        Prompt(QUOTED),
        Prompt([1, random_image(1), *QUOTED, 2, 3]),
        Prompt([5, 6, 7]),
        Prompt([random_image(2)]),
    ]
    results: list[dict[int, Result]] = []
    for lookup in (None, LOOKUP):
        adds = [prompt.add(oracle.preprocessor, sampling) for prompt in prompts]
        engine = load_engine(path, lookup=lookup)
        results.append(run_all(engine, adds))
        assert (engine.stats().draft_tokens > 0) == (lookup is not None)
        assert engine.pool.num_used == 0
    plain, drafted = results
    for number, result in plain.items():
        got = drafted[number]
        assert got.token_ids == result.token_ids
        assert got.finish == result.finish
        for before, after in zip(result.outputs, got.outputs, strict=True):
            assert (before.logprobs is None) == (after.logprobs is None)
            for ours, theirs in zip(after.logprobs or (), before.logprobs or (), strict=True):
                assert ours.token_ids == theirs.token_ids
                assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_grammars_are_kept(tmp_path: Path) -> None:
    tokenizer = make_tokenizer().backend_tokenizer
    words = Vocabulary(tokenizer.to_str(), tokenizer.get_vocab_size(), size=VOCAB, eos_token_ids=EOS)
    grammar = LLMatcher.grammar_from_regex("(ab|ba){12}c?")
    model = make_text_model(tmp_path / "text")
    answers = []
    for lookup in (None, LOOKUP):
        engine = load_engine(model, vocabulary=words, lookup=lookup)
        params = SamplingParams(temperature=1.0, max_tokens=60)
        adds = [Add(0, [256, *ABABAB], params, [seed], EOS, grammar=grammar) for seed in range(6)]
        answers.append([(result.token_ids, result.finish) for result in run_all(engine, adds).values()])
        assert (engine.stats().accepted_tokens > 0) == (lookup is not None)
    assert answers[0] == answers[1]


def test_an_answer_that_repeats_itself_takes_fewer_steps(path: Path) -> None:
    """The bias makes one token certain, so that every draft after the first is right."""
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, logit_bias={77: 100.0})
    engine = load_engine(path, lookup=LookupConfig(tokens=8, shortest=2, longest=4))
    (result,) = run_all(engine, [Add(0, [1, 2, 3], params, [0], EOS)]).values()
    assert result.token_ids == [77] * 60
    stats = engine.stats()
    assert stats.accepted_tokens == stats.draft_tokens > 40
    assert stats.steps < 15


def test_two_ranks_give_the_same_tokens(path: Path, oracle: Oracle) -> None:
    prompts = [Prompt([*QUOTED, random_image(3)]), Prompt(QUOTED)]
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    with two_ranks(path, lookup=LOOKUP) as engine:
        results = run_all(engine, [prompt.add(oracle.preprocessor, params) for prompt in prompts])
        assert engine.stats().draft_tokens > 0
    for number, prompt in enumerate(prompts):
        assert results[number].token_ids == oracle.generate(prompt, 30, ignore_eos=True)


def test_the_server_counts_what_it_drafts() -> None:
    asked = 'option.speculative_config={"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1}'
    with LiveServer(SHAPES, asked) as server:
        reply = server.chat("What is this?", drawing("red-circle"), max_tokens=60, ignore_eos=True).json()
        assert reply["choices"][0]["message"]["content"].startswith("a red circle")
        metrics = server.metrics()
    assert metrics["lmi_draft_tokens_total"] > 0
    assert metrics["lmi_draft_tokens_total"] >= metrics["lmi_accepted_draft_tokens_total"]


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"method": "eagle", "num_speculative_tokens": 2}, "eagle.*method ngram only"),
        ({"method": "ngram"}, "num_speculative_tokens"),
        ({"method": "ngram", "num_speculative_tokens": 0}, ">= 1"),
        ({"method": "ngram", "num_speculative_tokens": 3, "model": "a/b"}, "model"),
        (
            {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 4, "prompt_lookup_max": 3},
            "prompt_lookup_min is 4, above prompt_lookup_max, 3",
        ),
    ],
)
def test_other_configurations_are_refused(asked: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidConfiguration, match=reason):
        plan_engines(Settings(speculative_config=asked), "", 0)


@pytest.mark.parametrize(
    ("asked", "shortest", "longest"), [({}, 5, 5), ({"prompt_lookup_max": 3}, 3, 3), ({"prompt_lookup_min": 2}, 2, 2)]
)
def test_the_defaults_are_vllms(asked: dict[str, int], shortest: int, longest: int) -> None:
    whole = {"method": "ngram", "num_speculative_tokens": 7, **asked}
    (plan,) = plan_engines(Settings(speculative_config=whole), "", 0)
    assert plan.lookup == LookupConfig(7, shortest, longest)
