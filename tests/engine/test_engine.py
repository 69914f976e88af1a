"""The engine step by step: endings, failures that stay alone, reuse, probabilities, and draws that do not depend
on company."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.engine import ENCODE_PER_STEP, Engine
from engine.errors import EngineError, ModelLoadError
from engine.messages import Add, Logprobs
from engine.sampling_params import SamplingParams
from engine.sampling_state import SamplingState
from tests.support.engine_driver import EOS, Oracle, Prompt, Result, collect, load_engine, random_image, run_all
from tests.support.models import VOCAB, make_llava


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(scope="module")
def oracle(path: Path) -> Oracle:
    return Oracle(path)


@pytest.fixture
def engine(path: Path) -> Engine:
    return load_engine(path)


def greedy(**fields: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, **{"max_tokens": 12, **fields})  # type: ignore[arg-type]


def one(engine: Engine, add: Add) -> Result:
    return run_all(engine, [add])[0]


def text(*token_ids: int, params: SamplingParams | None = None, seed: int = 0, eos: tuple[int, ...] = EOS) -> Add:
    return Add(0, list(token_ids), params or greedy(), [seed], eos)


def test_an_answer_ends_at_the_models_own_end(engine: Engine, oracle: Oracle) -> None:
    free = one(engine, text(1, 2, 3, params=greedy(ignore_eos=True), eos=()))
    ending = free.token_ids[4]
    first = free.token_ids.index(ending)
    result = one(engine, text(1, 2, 3, eos=(ending,)))
    assert result.token_ids == free.token_ids[: first + 1]
    assert (result.finish, result.outputs[-1].stop_token) == ("stop", None)


def test_a_stop_id_ends_an_answer_and_is_named(engine: Engine) -> None:
    free = one(engine, text(1, 2, 3, params=greedy(ignore_eos=True)))
    ending = free.token_ids[4]
    first = free.token_ids.index(ending)
    result = one(engine, text(1, 2, 3, params=greedy(ignore_eos=True, stop_token_ids=(ending,))))
    assert result.token_ids == free.token_ids[: first + 1]
    assert (result.finish, result.outputs[-1].stop_token) == ("stop", ending)


def test_no_ending_is_honoured_before_min_tokens(engine: Engine) -> None:
    free = one(engine, text(1, 2, 3, params=greedy(ignore_eos=True)))
    ending = free.token_ids[0]
    result = one(engine, text(1, 2, 3, params=greedy(min_tokens=6), eos=(ending,)))
    assert ending not in result.token_ids[:6]
    assert len(result.token_ids) >= 6


def test_length_ends_at_max_tokens_and_at_the_contexts_end(path: Path) -> None:
    engine = load_engine(path, max_model_len=32)
    assert len(one(engine, text(1, params=greedy(max_tokens=7, ignore_eos=True))).token_ids) == 7
    result = one(engine, text(*range(30), params=greedy(max_tokens=None, ignore_eos=True)))
    assert (len(result.token_ids), result.finish) == (2, "length")


@pytest.mark.parametrize("token_ids", [[], list(range(32)), [5, 100_000], [-1]])
def test_a_prompt_that_cannot_be_run_is_refused_and_the_others_go_on(path: Path, token_ids: list[int]) -> None:
    engine = load_engine(path, max_model_len=32)
    results = run_all(engine, [text(1, 2), text(*token_ids), text(3, 4)])
    assert results[1].finish == "error"
    assert results[1].outputs[-1].error
    assert results[0].finish in ("stop", "length")
    assert results[2].finish in ("stop", "length")


def test_an_image_that_cannot_be_encoded_fails_its_request_alone(engine: Engine, oracle: Oracle) -> None:
    good = Prompt([1, random_image(1), 2])
    adds = [prompt.add(oracle.preprocessor, greedy()) for prompt in (good, Prompt([3, random_image(2)]))]
    adds[1].images[0].tensors["pixel_values"].shape = (3, 14, 56)
    adds.append(text(7, 8, 9))
    results = run_all(engine, adds)
    assert results[1].finish == "error"
    assert results[0].token_ids == oracle.generate(good, 12)
    assert results[2].token_ids == oracle.generate(Prompt([7, 8, 9]), 12)


def test_a_request_with_nan_fails_alone_and_poisons_nobody_later(path: Path, oracle: Oracle) -> None:
    engine = load_engine(path, kv_cache_bytes=512 * 128, max_model_len=100, enable_prefix_caching=True)
    poisoned = Prompt([3, random_image(2), 4]).add(oracle.preprocessor, greedy())
    tensor = poisoned.images[0].tensors["pixel_values"]
    poison = tensor.unpack()
    poison[...] = float("nan")
    poisoned.images[0].tensors["pixel_values"] = type(tensor).pack(poison)
    results = run_all(engine, [poisoned, text(7, 8, 9)])
    assert results[0].finish == "error"
    assert "no usable probabilities" in str(results[0].outputs[-1].error)
    assert results[1].token_ids == oracle.generate(Prompt([7, 8, 9]), 12)
    for start in range(0, 60, 7):
        prompt = Prompt(list(range(start, start + 61)))
        assert one(engine, prompt.add(None, greedy())).token_ids == oracle.generate(prompt, 12)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda weights: weights.fill_(float("nan")),
            "its logits are NaN or infinite; its weights are damaged, or too",
        ),
        (lambda weights: setattr(weights, "data", weights.data[:, 1:]), "its first step failed, as logged above"),
    ],
)
def test_a_model_that_cannot_generate_is_refused_before_any_request(
    engine: Engine, damage: Callable[[torch.Tensor], object], said: str
) -> None:
    with torch.no_grad():
        damage(engine.runner.model.head.weight)  # type: ignore[arg-type]
    with pytest.raises(ModelLoadError, match=said) as refused:
        engine.warm_up()
    assert "request" not in str(refused.value), "an operator has sent none"


def test_a_step_that_raises_for_one_request_is_finished_for_the_others(
    engine: Engine, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device error cannot be provoked here, so the model is made to raise when it sees one marked token."""
    real = engine.runner.model.embed

    def embed(token_ids: torch.Tensor) -> torch.Tensor:
        if (token_ids == 255).any():
            raise RuntimeError("provoked")
        return real(token_ids)

    monkeypatch.setattr(engine.runner.model, "embed", embed)
    results = run_all(engine, [text(1, 2, 3), text(4, 255, 5), text(6, 7)])
    assert results[1].finish == "error"
    assert results[0].token_ids == oracle.generate(Prompt([1, 2, 3]), 12)
    assert results[2].token_ids == oracle.generate(Prompt([6, 7]), 12)
    assert engine.pool.num_used == 0


def test_a_sampler_that_raises_for_one_request_fails_it_alone(
    engine: Engine, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No parameter is known that makes the sampler raise, so it is made to, for one marked seed."""
    real = engine.sampler.sample

    def sample(logits: torch.Tensor, states: Sequence[SamplingState]) -> tuple[list[int], list[Logprobs | None]]:
        if any(state.seed == 13 for state in states):
            raise RuntimeError("provoked")
        return real(logits, states)

    monkeypatch.setattr(engine.sampler, "sample", sample)
    results = run_all(engine, [text(1, 2, 3), text(4, 5, seed=13)])
    assert results[1].finish == "error"
    assert results[0].token_ids == oracle.generate(Prompt([1, 2, 3]), 12)


@pytest.mark.parametrize("error", [RuntimeError("provoked"), torch.AcceleratorError("provoked")])
def test_an_engine_that_fails_every_request_ends_instead_of_living_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A broken accelerator cannot be had here, so every run raises; the process then dies and is replaced."""

    def run(chunks: object) -> None:
        raise error

    monkeypatch.setattr(engine.runner, "run", run)

    def serve_twenty() -> None:
        for _ in range(20):
            run_all(engine, [text(1, 2, 3)])

    with pytest.raises((EngineError, torch.AcceleratorError)):
        serve_twenty()


@pytest.mark.parametrize(
    "params",
    [
        {"stop_token_ids": (2**63,)},
        {"stop_token_ids": (-(2**63),)},
        {"top_k": 2**63},
        {"min_tokens": 2**63},
        {"logit_bias": {2**63: 1.0}},
        {"logit_bias": {-5: 1.0, 10**6: 1.0}},
        {"max_tokens": 2**63},
    ],
)
def test_absurd_parameters_harm_nobody(engine: Engine, oracle: Oracle, params: dict[str, Any]) -> None:
    results = run_all(engine, [text(1, 2, 3), text(4, 5, params=greedy(**params))], max_steps=1000)
    assert results[0].token_ids == oracle.generate(Prompt([1, 2, 3]), 12)
    assert results[1].finish is not None


def test_answers_to_one_prompt_share_its_computation(path: Path, oracle: Oracle) -> None:
    engine = load_engine(path, block_size=4)
    params = SamplingParams(temperature=1.0, max_tokens=6, ignore_eos=True, prompt_logprobs=None)
    add = Prompt([*range(30), random_image(1), 9]).add(oracle.preprocessor, params)
    add.seeds = [5, 6, 7, 8]
    results = run_all(engine, [add])
    assert len(results) == 4
    assert len({tuple(result.token_ids) for result in results.values()}) > 1
    assert [results[n].outputs[0].cached_tokens for n in range(4)] == [0, 44, 44, 44]
    add.seeds = [7]
    assert run_all(load_engine(path), [add])[0].token_ids == results[2].token_ids


def test_prompt_logprobs_come_once_for_all_answers(path: Path) -> None:
    add = text(1, 2, 3, params=greedy(prompt_logprobs=1, max_tokens=2, ignore_eos=True))
    add.seeds = [1, 2]
    results = run_all(load_engine(path), [add])
    assert results[0].outputs[0].prompt_logprobs is not None
    assert results[1].outputs[0].prompt_logprobs is None


def test_prompt_logprobs_are_the_same_however_few_logits_are_computed_at_a_time(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def entries() -> list[Logprobs]:
        found = one(load_engine(path), text(*range(20), params=greedy(prompt_logprobs=2, max_tokens=1)))
        assert found.outputs[0].prompt_logprobs is not None
        return found.outputs[0].prompt_logprobs

    together = entries()
    monkeypatch.setattr("engine.engine.PROMPT_LOGITS", 3 * VOCAB)
    parts = entries()
    assert len(together) == len(parts) == 19
    assert [entry.token_ids for entry in parts] == [entry.token_ids for entry in together]
    for part, whole in zip(parts, together, strict=True):
        assert part.logprobs == pytest.approx(whole.logprobs, abs=1e-5)


def test_aborting_the_first_answer_lets_the_others_go_on(engine: Engine) -> None:
    add = text(*range(60), params=greedy(max_tokens=3, ignore_eos=True))
    add.seeds = [1, 2]
    engine.add(add)
    engine.abort(0)
    results: dict[int, Result] = {}
    for _ in range(20):
        collect(results, engine.step())
    assert results[1].finish == "length"


def test_image_tokens_beyond_the_vocabulary_have_no_probability(tmp_path: Path) -> None:
    oracle = Oracle(make_llava(tmp_path, vocab_size=259))
    add = Prompt([1, random_image(1), 2]).add(oracle.preprocessor, greedy(max_tokens=1, prompt_logprobs=0))
    result = one(load_engine(tmp_path), add)
    prompt_logprobs = result.outputs[0].prompt_logprobs
    assert prompt_logprobs is not None
    assert [entry.logprobs[0] for entry in prompt_logprobs[:16]] == [float("-inf")] * 16
    assert prompt_logprobs[16].token_ids[0] == 2
    assert prompt_logprobs[16].logprobs[0] > float("-inf")


def test_a_prefix_is_reused_and_a_different_image_is_not(path: Path, oracle: Oracle) -> None:
    engine = load_engine(path, block_size=4)
    beginning = list(range(20))
    first = Prompt([*beginning, random_image(1), 50, 51, 52])
    other = Prompt([*beginning, random_image(2), 50, 51, 52])
    params = greedy()
    assert one(engine, first.add(oracle.preprocessor, params)).outputs[0].cached_tokens == 0
    again = one(engine, first.add(oracle.preprocessor, params))
    assert again.outputs[0].cached_tokens == 36
    changed = one(engine, other.add(oracle.preprocessor, params))
    assert changed.outputs[0].cached_tokens == 20
    assert changed.token_ids == oracle.generate(other, 12)
    assert engine.stats().encoder_hits == 1
    assert engine.stats().prefix_hits == 56


def test_decodes_are_not_starved_by_a_long_prompt(path: Path) -> None:
    engine = load_engine(path, max_num_seqs=4, max_num_batched_tokens=8)
    short = text(1, 2, params=greedy(max_tokens=100, ignore_eos=True))
    engine.add(short)
    engine.step()
    long = text(*(i % 256 for i in range(300)), params=greedy(max_tokens=1))
    long.request_id = 1
    engine.add(long)
    for _ in range(30):
        outputs = engine.step()
        assert any(output.request_id == 0 for output in outputs), "the decode was left out of a step"


def test_an_abort_frees_everything_before_the_next_step(engine: Engine) -> None:
    for number in range(3):
        add = text(1, 2, 3, params=greedy(max_tokens=200, ignore_eos=True))
        add.request_id = number
        engine.add(add)
    engine.step()
    engine.abort(1)
    engine.abort(1)
    assert {output.request_id for output in engine.step()} == {0, 2}
    engine.abort(0)
    engine.abort(2)
    assert not engine.has_work
    assert engine.pool.num_used == 0


def test_lower_priority_values_go_first(path: Path) -> None:
    engine = load_engine(path, max_num_seqs=1)
    for number, priority in enumerate([5, 5, -1]):
        add = text(1, number, params=greedy(max_tokens=1))
        add.request_id, add.priority = number, priority
        engine.add(add)
    order = [engine.step()[0].request_id for _ in range(3)]
    assert order == [2, 0, 1]


def test_seeded_draws_do_not_depend_on_company_chunking_or_preemption(path: Path) -> None:
    params = SamplingParams(temperature=1.2, top_p=0.95, max_tokens=30, ignore_eos=True)
    rng = random.Random(5)
    alone = one(load_engine(path), text(9, 8, 7, params=params, seed=42)).token_ids
    crowd = load_engine(path, max_model_len=90, kv_cache_bytes=512 * 128, max_num_batched_tokens=16, max_num_seqs=16)
    adds = [
        text(*(rng.randrange(256) for _ in range(rng.randint(3, 40))), params=params, seed=number)
        for number in range(9)
    ]
    adds.insert(4, text(9, 8, 7, params=params, seed=42))
    results = run_all(crowd, adds)
    assert crowd.stats().preemptions > 0
    assert results[4].token_ids == alone
    assert results[4].token_ids != results[3].token_ids


def test_logprobs_are_those_of_the_model(path: Path, oracle: Oracle) -> None:
    prompt = Prompt([1, random_image(1), 2, 3])
    add = prompt.add(oracle.preprocessor, greedy(max_tokens=5, logprobs=3, prompt_logprobs=2, ignore_eos=True))
    result = one(load_engine(path, max_num_batched_tokens=7, max_num_seqs=4), add)
    ids = torch.tensor([add.token_ids + result.token_ids])
    pixels = torch.from_numpy(add.images[0].tensors["pixel_values"].unpack())[None]
    with torch.inference_mode():
        want = oracle.model(input_ids=ids, pixel_values=pixels).logits[0].log_softmax(-1)
    start = len(add.token_ids) - 1
    for place, output in enumerate(result.outputs):
        assert output.logprobs is not None
        (got,) = output.logprobs
        row = want[start + place]
        best = row.topk(3)
        assert got.token_ids[0] == output.token_ids[0]
        assert got.token_ids[1:] == best.indices.tolist()
        assert got.logprobs[1:] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert got.ranks == [1, 1, 2, 3]
    prompt_logprobs = result.outputs[0].prompt_logprobs
    assert prompt_logprobs is not None
    assert len(prompt_logprobs) == len(add.token_ids) - 1
    for place, entry in enumerate(prompt_logprobs):
        assert entry.token_ids[0] == add.token_ids[place + 1]
        assert entry.logprobs[0] == pytest.approx(want[place, add.token_ids[place + 1]].item(), abs=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_follows_float32_closely(path: Path, oracle: Oracle, dtype: str) -> None:
    """Tokens may differ at near ties, so what is compared is the first step's distribution."""
    prompt = Prompt([1, random_image(1), 2, 3, 4, 5])
    add = prompt.add(oracle.preprocessor, greedy(max_tokens=1, logprobs=20))
    want = one(load_engine(path), prompt.add(oracle.preprocessor, greedy(max_tokens=1, logprobs=20)))
    got = one(load_engine(path, dtype=dtype), add)
    assert want.outputs[0].logprobs is not None
    assert got.outputs[0].logprobs is not None
    exact = dict(zip(want.outputs[0].logprobs[0].token_ids, want.outputs[0].logprobs[0].logprobs, strict=True))
    close = dict(zip(got.outputs[0].logprobs[0].token_ids, got.outputs[0].logprobs[0].logprobs, strict=True))
    shared = exact.keys() & close.keys()
    assert len(shared) >= 14
    assert max(abs(exact[token] - close[token]) for token in shared) < 0.5


def test_the_encoder_cache_keeps_to_its_budget(path: Path, oracle: Oracle) -> None:
    one_image = 16 * 64 * 4
    engine = load_engine(path, encoder_cache_bytes=2 * one_image)
    results: dict[int, Result] = {}
    for number in range(6):
        add = Prompt([random_image(number), 1, 2]).add(oracle.preprocessor, greedy(max_tokens=2))
        add.request_id = number
        engine.add(add)
        while engine.has_work:
            collect(results, engine.step())
        assert engine.runner.encoder_cache.used_bytes <= 2 * one_image


def test_more_images_in_a_chunk_than_a_step_encodes_are_no_dead_end(tmp_path: Path, oracle: Oracle) -> None:
    """With no room in the cache, images encoded in one step would be forgotten before the next."""
    prompt = Prompt([*map(random_image, range(ENCODE_PER_STEP + 1)), 1, 2])
    add = prompt.add(oracle.preprocessor, greedy(max_tokens=4))
    longer = make_llava(tmp_path, max_position_embeddings=1024)
    engine = load_engine(longer, encoder_cache_bytes=0)
    results = run_all(engine, [add, text(1, 2, 3)], max_steps=100)
    assert results[0].token_ids == oracle.generate(prompt, 4)


def test_cached_images_do_not_keep_their_whole_batch_in_memory(engine: Engine, oracle: Oracle) -> None:
    adds = [Prompt([random_image(n), 1]).add(oracle.preprocessor, greedy(max_tokens=1)) for n in range(4)]
    run_all(engine, adds)
    for add in adds:
        features = engine.runner.encoder_cache[add.images[0].digest]
        assert features.untyped_storage().nbytes() == features.nbytes
