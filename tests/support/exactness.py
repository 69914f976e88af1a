"""The engine's one promise: in float32, greedy, each request gets the tokens of transformers' own `generate`,
whatever shares its batch, however its prompt was cut, cached, or computed twice."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine.config import LookupConfig
from engine.families.base import CacheLayout
from engine.families.preprocessor import Preprocessor
from engine.sampling_params import SamplingParams
from tests.support.engine_driver import Oracle, Prompt, Result, collect, load_engine, random_image, run_all

PromptMaker = Callable[[random.Random, list[list[int]]], Prompt]
"""(random numbers, beginnings that prompts should share) -> a prompt."""


def prompts_with(images: Sequence[Image.Image], most: int = 3) -> PromptMaker:
    """Prompts of random text with up to `most` of these images anywhere in it. Some share a long beginning."""

    def make(rng: random.Random, prefixes: list[list[int]]) -> Prompt:
        items: list = list(rng.choice(prefixes)) if rng.random() < 0.5 else []
        items += [rng.randrange(256) for _ in range(rng.randint(1, 70))]
        if images:
            for _ in range(rng.choice([0, 1, 1, *range(2, most + 1)])):
                items.insert(rng.randint(0, len(items)), rng.choice(images))
        return Prompt(items)

    return make


def small_images(count: int = 6) -> list[Image.Image]:
    return [random_image(seed) for seed in range(count)]


def image_of(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def expanded(preprocessor: Preprocessor[Any], tokenizer: Any, text: str, images: Sequence[Image.Image]) -> list[int]:
    """The tokens of a text with an image token for each image, as the backend makes them."""
    variant, waiting = preprocessor.variant(len(images)), iter(images)
    token_ids: list[int] = []
    for token_id in tokenizer(text).input_ids:
        if token_id == preprocessor.image_token_id:
            token_ids += preprocessor.layout(*next(waiting).size, variant).token_ids
        else:
            token_ids.append(token_id)
    assert next(waiting, None) is None
    return token_ids


def check_logprobs(path: Path, oracle: Oracle, prompt: Prompt, budget: int = 7) -> None:
    """The log probabilities of all tokens of a prompt are transformers' own within 1e-4, though it is cut into chunks
    of at most `budget` tokens, also within images."""
    engine = load_engine(path, max_model_len=512, max_num_seqs=1, max_num_batched_tokens=budget)
    add = prompt.add(oracle.preprocessor, SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0))
    token_ids = torch.tensor(add.token_ids)
    (result,) = run_all(engine, [add]).values()
    found = result.outputs[0].prompt_logprobs
    assert found is not None
    got = torch.tensor([entry.logprobs[0] for entry in found])
    want = oracle.logits(prompt)[:-1].log_softmax(-1).gather(1, token_ids[1:, None])[:, 0]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def check_random_load(
    path: Path,
    oracle: Oracle,
    seed: int,
    make: PromptMaker,
    *,
    max_model_len: int = 240,
    budget: int = 0,
    cached_layers: int | None = None,
    encoder_caches: Sequence[int] = (0, 1 << 20),
) -> None:
    """Random arrivals, lengths, aborts and engine settings; odd seeds have a cache so small that it preempts.

    Of four seeds, the last two draft tokens.


    budget: the fewest tokens of a step, for families whose prompts may not be cut anywhere.
    cached_layers: how many of the layers have keys and values of tokens, where that is not all.
    encoder_caches: sizes in bytes, of which one is drawn.
    """
    layout = CacheLayout.of(oracle.model.config.get_text_config())
    token_bytes = 8 * (cached_layers or layout.num_layers) * layout.kv_heads * layout.head_dim
    rng = random.Random(seed)
    block_size = rng.choice([4, 8, 16])
    tight = seed % 2 == 1
    lookup = LookupConfig(4, 1, 3) if seed % 4 >= 2 else None
    engine = load_engine(
        path,
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_seqs=8 if tight else rng.choice([3, 16]),
        max_num_batched_tokens=max(budget, rng.choice([17, 48, 512])),
        # tight holds one long request
        kv_cache_bytes=token_bytes * (max_model_len + 16 if tight else 8192),
        encoder_cache_bytes=rng.choice(encoder_caches),
        enable_prefix_caching=rng.random() < 0.8,
        lookup=lookup,
    )
    prefixes = [[rng.randrange(256) for _ in range(rng.randint(10, 60))] for _ in range(2)]
    prompts = [make(rng, prefixes) for _ in range(14)]
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
    if tight and lookup is None:  # with drafts, requests may be done before the memory is short
        assert engine.stats().preemptions > 0, "this load was meant to preempt"
