"""Llama 3.2 Vision on the embedded engine: cross-attention to tiled images, token for token as transformers."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor

from container.cli import main
from engine.sampling_params import SamplingParams
from handlers import LLM, StructuredOutputsParams
from handlers import SamplingParams as OfflineParams
from handlers.backends.embeddings import EmbeddingsWanted
from handlers.backends.rolling.image_preparer import ImagePreparer
from handlers.errors import ImageError
from handlers.request import EmbeddingsPart, LoadedEmbeddings
from tests.support.engine_driver import Oracle, Prompt, Result, collect, load_engine, run_all
from tests.support.exactness import check_random_load, prompts_with
from tests.support.likeness import check_two_ranks, noise
from tests.support.models import VOCAB
from tests.support.tiny_mllama import inputs, make_mllama

SIZES = ((20, 20), (60, 20), (20, 90), (200, 7), (7, 200), (57, 57))


def images() -> list[Image.Image]:
    random = np.random.default_rng(0)
    drawn = [random.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in SIZES]
    return [Image.fromarray(pixels) for pixels in drawn] + [Image.new("RGB", (30, 30))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    path = make_mllama(tmp_path_factory.mktemp("models") / "mllama")
    return path, Oracle(path, inputs)


@pytest.mark.parametrize("seed", range(6))
def test_tokens_equal_generate_for_random_loads(model: tuple[Path, Oracle], seed: int) -> None:
    path, oracle = model
    make = prompts_with(images())
    check_random_load(path, oracle, seed, make, cached_layers=3, encoder_caches=(1 << 19, 1 << 20))


def test_requests_wait_for_places_of_images_and_text_passes_them(model: tuple[Path, Oracle]) -> None:
    path, oracle = model
    engine = load_engine(path, encoder_cache_bytes=2 * 34816)
    assert engine.scheduler.image_slots == 2
    some = images()
    prompts = [Prompt([*range(40, 50), some[n], some[n + 1], *range(60, 70)]) for n in (0, 2, 4)]
    prompts.append(Prompt([*range(40, 60)]))
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    ended: list[int] = []
    results: dict[int, Result] = {}
    for number, prompt in enumerate(prompts):
        add = prompt.add(oracle.preprocessor, params)
        add.request_id = number
        collect(results, engine.add(add))
    while engine.has_work:
        outputs = engine.step()
        collect(results, outputs)
        ended += [output.request_id for output in outputs if output.finish is not None]
        assert engine.runner.encoder_cache.used_bytes <= 2 * 34816, "2 layers, 2 x 2 x 16 x 68 values an image"
    assert ended == [0, 3, 1, 2] or ended == [3, 0, 1, 2]
    for number, prompt in enumerate(prompts):
        assert results[number].token_ids == oracle.generate(prompt, 6, ignore_eos=True)


def test_a_request_with_more_images_than_there_are_places_is_refused(model: tuple[Path, Oracle]) -> None:
    path, oracle = model
    engine = load_engine(path, encoder_cache_bytes=0)
    prompt = Prompt([images()[0], 65, images()[1], 66])
    (output,) = engine.add(prompt.add(oracle.preprocessor, SamplingParams(max_tokens=6)))
    assert output.invalid
    assert output.error == "the request has 2 different images; this server's memory holds 1 at a time"
    assert not engine.has_work


@pytest.mark.parametrize("text", ["<|image|><|image|>hi", "<|image|><s>hi", "hi<|image|>", "hi", "<s><|image|>"])
def test_a_prompt_that_is_no_chat_begins_as_the_processor_has_it(model: tuple[Path, Oracle], text: str) -> None:
    from transformers.models.mllama.processing_mllama import build_string_from_input

    _, oracle = model
    assert oracle.preprocessor is not None
    assert oracle.preprocessor.arranged(text, "<s>") == build_string_from_input(text, "<s>", "<|image|>")


@pytest.mark.parametrize(("before", "between"), [(0, 0), (0, 12), (12, 0), (12, 12)], ids=lambda count: str(count))
def test_images_anywhere_are_seen_by_the_right_tokens(model: tuple[Path, Oracle], before: int, between: int) -> None:
    """Tokens before the first image see all of them; images next to each other are seen together."""
    path, oracle = model
    first, second = images()[:2]
    filler = list(range(65, 65 + 12))
    prompts = [
        Prompt([*filler[:before], *pair, *filler[:3]])
        for pair in ([first, *filler[:between], second], [second, *filler[:between], first])
    ]
    prompts.append(Prompt([*filler[:before], *filler, first]))
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    engine = load_engine(path, block_size=4, max_num_batched_tokens=7, max_num_seqs=4)
    # twice: the second time prefixes are found
    for _ in range(2):
        results = run_all(engine, [prompt.add(oracle.preprocessor, params) for prompt in prompts])
        for number, prompt in enumerate(prompts):
            assert results[number].token_ids == oracle.generate(prompt, 8, ignore_eos=True)
    assert engine.pool.hits > 0


def test_text_before_different_images_is_not_shared(model: tuple[Path, Oracle]) -> None:
    path, oracle = model
    first, second = images()[:2]
    text = list(range(65, 97))
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    engine = load_engine(path, block_size=4)
    for image in (first, second):
        run_all(engine, [Prompt([*text, image, 66]).add(oracle.preprocessor, params)])
    assert engine.pool.hits == 0
    run_all(engine, [Prompt([*text, first, 67]).add(oracle.preprocessor, params)])
    assert engine.pool.hits == 32


def test_log_probabilities_are_transformers(model: tuple[Path, Oracle]) -> None:
    path, oracle = model
    prompt = Prompt([*range(65, 80), images()[1], *range(80, 90)])
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    add = prompt.add(oracle.preprocessor, params)
    engine = load_engine(path, max_num_batched_tokens=8, max_num_seqs=2)
    (output,) = run_all(engine, [add])[0].outputs
    assert output.prompt_logprobs is not None
    got = [entry.logprobs[0] for entry in output.prompt_logprobs]
    ids = torch.tensor([add.token_ids])
    processor = AutoImageProcessor.from_pretrained(path)
    with torch.inference_mode():
        logits = oracle.model(ids, **inputs(processor, prompt.images, ids)).logits[0]
    known = [(n, token) for n, token in enumerate(add.token_ids[1:]) if token < logits.shape[-1]]
    want = torch.log_softmax(logits, -1)
    for number, token in known:
        assert got[number] == pytest.approx(float(want[number, token]), abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400))
def test_pixels_equal_the_processors(model: tuple[Path, Oracle], width: int, height: int) -> None:
    _, oracle = model
    assert oracle.preprocessor is not None
    assert oracle.preprocessor.to_bytes() is not None, "the direct way is in use"
    random = np.random.default_rng(width * 1000 + height)
    image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
    want, got = oracle.preprocessor.reference(image), oracle.preprocessor.direct(image)
    assert want.keys() == got.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


@pytest.mark.parametrize(("width", "height"), [(3000, 10), (10, 3000), (1, 1), (2000, 1999)])
def test_extreme_sizes_equal_the_processors(model: tuple[Path, Oracle], width: int, height: int) -> None:
    _, oracle = model
    assert oracle.preprocessor is not None
    image = noise(width, height)
    want, got = oracle.preprocessor.reference(image), oracle.preprocessor.direct(image)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


def test_two_ranks_give_the_same_tokens(model: tuple[Path, Oracle]) -> None:
    path, oracle = model
    some = images()
    prompts = [Prompt([65, 66, some[0], 67]), Prompt([some[1], some[2], 68, 69]), Prompt([70, 71])]
    check_two_ranks(path, oracle, prompts)


def test_a_chat_with_images_through_the_whole_way(model: tuple[Path, Oracle]) -> None:
    """Template, placeholders, answers, stop strings and grammars, without a server."""
    path, oracle = model
    first, second = images()[:2]
    parts = [
        {"type": "text", "text": "A "},
        {"type": "image_pil", "image_pil": first},
        {"type": "text", "text": " B "},
        {"type": "image_pil", "image_pil": second},
    ]
    greedy = {"temperature": 0, "max_tokens": 10, "ignore_eos": True}
    with LLM(str(path), dtype="float32", limit_mm_per_prompt={"image": 2}) as llm:
        turn = [{"role": "user", "content": parts}]
        (output,) = llm.chat(turn, OfflineParams(**greedy, n=2, seed=1), use_tqdm=False)
        waiting = iter((first, second))
        items = [next(waiting) if token == VOCAB else token for token in output.prompt_token_ids]
        want = oracle.generate(Prompt(items), 10, ignore_eos=True)
        assert [list(choice.token_ids) for choice in output.outputs] == [want, want]
        text = output.outputs[0].text
        (cut,) = llm.chat(turn, OfflineParams(**greedy, stop=[text[3:5]]), use_tqdm=False)
        assert cut.outputs[0].text == text[: text.index(text[3:5])]
        digits = StructuredOutputsParams(regex="[0-9]{4}")
        limited = OfflineParams(temperature=0, max_tokens=10, structured_outputs=digits)
        (number,) = llm.chat(turn, limited, use_tqdm=False)
        assert number.outputs[0].text.isdigit()
        assert len(number.outputs[0].text) == 4


def test_rows_in_place_of_an_image_are_refused(model: tuple[Path, Oracle]) -> None:
    _, oracle = model
    assert oracle.preprocessor is not None
    wanted = EmbeddingsWanted(hidden_size=64, most_tokens=100, dtype="float32")
    preparer = ImagePreparer(oracle.preprocessor, ThreadPoolExecutor(1), 0, wanted)
    rows = LoadedEmbeddings(np.zeros((3, 64), np.float32), 0.0, None, bytes(32))
    sent = EmbeddingsPart("", loaded=rows)
    with pytest.raises(ImageError, match="takes no image_embeds; send the image itself"):
        asyncio.run(preparer.prepare([sent]))


def test_check_counts_the_layers_that_hold_tokens_and_the_images_apart(
    model: tuple[Path, Oracle], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(model[0]), "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert memory["cache_bytes_per_token"] == 3 * 2 * 2 * 16 * 4, "three of five layers, two heads of 16"
    assert memory["image_bytes"] == 2 * 2 * 2 * 16 * 4 * 17 * 4, "two layers, four tiles of 17 rows"
