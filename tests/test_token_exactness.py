"""The engine's one promise: in float32, greedy, each request gets the tokens of transformers' own `generate`,
whatever shares its batch, however its prompt was cut, cached, or computed twice."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from engine.sampling_params import SamplingParams
from tests.engine_driver import Oracle, Prompt, Result, collect, load_engine, random_image
from tests.models import make_llava, make_text_model

MODELS = {
    "llama": lambda path: make_text_model(path, "llama"),
    "mistral-window": lambda path: make_text_model(path, "mistral"),
    "qwen2": lambda path: make_text_model(path, "qwen2"),
    "llava-clip-llama": lambda path: make_llava(path),
    "llava-clip-full-mistral": lambda path: make_llava(path, text="mistral", strategy="full"),
    "llava-siglip-qwen2": lambda path: make_llava(path, tower="siglip", text="qwen2", strategy="full"),
}


@pytest.fixture(scope="module", params=sorted(MODELS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    path = MODELS[request.param](tmp_path_factory.mktemp("models") / request.param)
    return path, Oracle(path)


def random_prompt(rng: random.Random, *, pictures: bool, prefixes: list[list[int]]) -> Prompt:
    """Some share a long beginning; some show the same few pictures again."""
    items: list = list(rng.choice(prefixes)) if rng.random() < 0.5 else []
    items += [rng.randrange(256) for _ in range(rng.randint(1, 70))]
    if pictures:
        for _ in range(rng.choice([0, 1, 1, 2, 3])):
            items.insert(rng.randint(0, len(items)), random_image(rng.randrange(6)))
    return Prompt(items)


@pytest.mark.parametrize("seed", range(4))
def test_tokens_equal_generate_for_random_loads(model: tuple[Path, Oracle], seed: int) -> None:
    path, oracle = model
    rng = random.Random(seed)
    block_size = rng.choice([4, 8, 16])
    tight = seed % 2 == 1
    engine = load_engine(
        path,
        block_size=block_size,
        max_model_len=240,
        max_num_seqs=8 if tight else rng.choice([3, 16]),
        max_num_batched_tokens=rng.choice([17, 48, 512]),
        # two layers of two key/value heads of sixteen: 512 bytes a token; tight holds one long request
        kv_cache_bytes=512 * (256 if tight else 8192),
        encoder_cache_bytes=rng.choice([0, 1 << 20]),
        enable_prefix_caching=rng.random() < 0.8,
    )
    prefixes = [[rng.randrange(256) for _ in range(rng.randint(10, 60))] for _ in range(2)]
    prompts = [
        random_prompt(rng, pictures=oracle.preprocessor is not None, prefixes=prefixes) for _ in range(14)
    ]
    lengths = [rng.randint(20, 44) if tight else rng.randint(1, 24) for _ in prompts]
    arrivals = sorted((rng.randint(0, 2 if tight else 40), number) for number in range(len(prompts)))
    aborted = set(rng.sample(range(len(prompts)), 2))
    results: dict[int, Result] = {}
    for step in range(5000):
        while arrivals and arrivals[0][0] <= step:
            _, number = arrivals.pop(0)
            params = SamplingParams(temperature=0.0, max_tokens=lengths[number])
            add = prompts[number].add(oracle.preprocessor, params)
            add.request_id = number
            assert engine.add(add) == []
        collect(results, engine.step())
        for number in list(aborted):
            if number in results and len(results[number].token_ids) >= min(3, lengths[number]):
                engine.abort(number)
                aborted.discard(number)
                results[number].outputs[-1].finish = "abort"
        if not arrivals and not engine.has_work:
            break
    else:
        pytest.fail("the engine did not finish")
    for number, prompt in enumerate(prompts):
        want = oracle.generate(prompt, lengths[number])
        got = results[number]
        if got.finish == "abort":
            assert got.token_ids == want[: len(got.token_ids)]
        else:
            assert got.token_ids == want, f"request {number}"
    assert engine.pool.num_used == 0
    if tight:
        assert engine.stats().preemptions > 0, "this load was meant to preempt"
