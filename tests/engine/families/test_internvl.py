"""InternVL on the embedded engine: pixels, tokens and answers are transformers' own."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer
from transformers.utils import is_torchvision_available

from engine.errors import ModelLoadError
from engine.families.internvl import InternVLPreprocessor
from engine.families.preprocessor import Preprocessor
from engine.loader import load_preprocessor
from engine.sampling_params import SamplingParams
from handlers.request import Constraint
from tests.support.engine_driver import Oracle, Prompt, load_engine, run_all
from tests.support.exactness import check_logprobs, check_random_load, expanded, image_of, prompts_with
from tests.support.likeness import check_two_ranks
from tests.support.model_front import learned
from tests.support.rolling import answer, check_stop_string, loaded, request, tokens
from tests.support.tiny_tiles import ROWS, inputs, make_internvl

SIZES = ((30, 40), (120, 4), (4, 120), (1, 1), (90, 60), (200, 190))
BLACK = Image.new("RGB", (40, 60))
IMAGE, START, END = 264, 265, 266
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "llama"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_internvl(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def oracle(model: Path) -> Oracle:
    return Oracle(model, inputs)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    """For what does not depend on the kind of decoder."""
    path = make_internvl(tmp_path_factory.mktemp("models") / "qwen3", "qwen3")
    return path, Oracle(path, inputs)


def images() -> list[Image.Image]:
    return [*(image_of(*size, seed) for seed, size in enumerate(SIZES)), BLACK]


@pytest.mark.parametrize("seed", range(4))
def test_tokens_equal_generate_for_random_loads(model: Path, oracle: Oracle, seed: int) -> None:
    check_random_load(model, oracle, seed, prompts_with(images()), max_model_len=400)


@pytest.mark.parametrize(
    "items",
    [
        [5, BLACK, 6],
        [image_of(120, 4), 7],
        [1, 2, 3, image_of(4, 120)],
        [1, image_of(30, 40), image_of(90, 20), 2],
        [1, 2, 3, 4],
    ],
    ids=["black", "30 to 1", "1 to 30 at the end", "two in a row", "none"],
)
def test_log_probabilities_equal_transformers_wherever_a_prompt_is_cut(
    model: Path, oracle: Oracle, items: list[Any]
) -> None:
    prompt = Prompt(items)
    check_logprobs(model, oracle, prompt)
    (got,) = run_all(load_engine(model, max_num_batched_tokens=256), [prompt.add(oracle.preprocessor, GREEDY)]).values()
    assert got.token_ids == oracle.generate(prompt, 16, ignore_eos=True)


def test_the_same_text_before_two_images_shares_no_more_than_the_text(one: tuple[Path, Oracle]) -> None:
    model, oracle = one
    engine = load_engine(model, block_size=4)
    prompts = [Prompt([*range(40), image_of(40, 40, seed), 9, 8]) for seed in (1, 2)]
    got = [run_all(engine, [p.add(oracle.preprocessor, GREEDY)])[0] for p in prompts]
    assert got[1].outputs[0].cached_tokens in range(36, 45)
    want = [oracle.generate(prompt, 16, ignore_eos=True) for prompt in prompts]
    assert want[0] != want[1]
    assert [result.token_ids for result in got] == want


@pytest.fixture(scope="module", params=["as it is", "cut into one", "not cut", "at least 3"])
def pixels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Preprocessor[Any]:
    path = make_internvl(tmp_path_factory.mktemp("models") / "model")
    overrides = {
        "cut into one": {"max_patches": 1}, "not cut": {"crop_to_patches": False}, "at least 3": {"min_patches": 3},
    }.get(request.param)  # fmt: skip
    made = load_preprocessor(str(path), overrides)
    assert made is not None
    assert made.to_bytes() is not None, "the front must do without transformers"
    return made


edges = st.integers(1, 260)


@settings(max_examples=40, deadline=None)
@given(st.one_of(st.tuples(edges, edges), st.sampled_from([(1, 1), (900, 30), (30, 900), (1200, 1), (1, 1200)])))
def test_pixels_and_tiles_equal_the_processors(pixels: Preprocessor[Any], size: tuple[int, int]) -> None:
    image = image_of(*size, seed=sum(size))
    prepared = pixels.prepare(image)
    want = pixels.reference(image)["pixel_values"]
    np.testing.assert_array_equal(prepared.tensors["pixel_values"], want)
    count = ROWS * len(want)
    assert prepared.token_ids == [START, *[IMAGE] * count, END]
    assert prepared.is_embed == [False, *[True] * count, False]


def test_images_are_cut_as_near_to_their_aspect_as_can_be(model: Path) -> None:
    preprocessor = load_preprocessor(str(model))
    assert preprocessor is not None
    for size, tiles in (((20, 20), 1), ((60, 60), 5), ((84, 28), 4), ((28, 400), 7), ((100, 66), 7), ((100, 50), 3)):
        assert len(preprocessor.layout(*size).token_ids) == 2 + ROWS * tiles, size


@pytest.mark.skipif(not is_torchvision_available(), reason="InternVL's joint processor needs torchvision")
@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=3), st.data())
def test_prompts_equal_the_joint_processors(model: Path, sizes: list[tuple[int, int]], data: st.DataObject) -> None:
    processor, preprocessor = AutoProcessor.from_pretrained(model), load_preprocessor(str(model))
    assert preprocessor is not None
    shown = [image_of(*size) for size in sizes]
    texts = st.sampled_from(["", "\n", "User: ", " what?\n\n", "<|end|>\n"])
    text = "".join(f"{data.draw(texts)}<IMG_CONTEXT>\n" for _ in shown) + data.draw(texts)
    want = processor(images=shown, text=text).input_ids[0]
    assert expanded(preprocessor, processor.tokenizer, text, shown) == list(want)


def test_the_front_needs_no_torch(one: tuple[Path, Oracle]) -> None:
    if is_torchvision_available():
        pytest.skip("torchvision resizes with torch")
    assert learned(one[0])["heavy"] == []


def test_chats_several_answers_stop_strings_and_grammars(one: tuple[Path, Oracle]) -> None:
    model, oracle = one

    async def scenario() -> None:
        async with loaded(model) as backend:
            asked = request(1, "what", 2, " is it?", n=2)
            shown = [part.loaded.image for part in asked.images() if part.loaded is not None]
            generation = await backend.generate(asked)
            deltas = [delta async for delta in generation]
            tokenizer = AutoTokenizer.from_pretrained(model)
            text = "<|user|><IMG_CONTEXT>\nwhat<IMG_CONTEXT>\n is it?<|end|>\n<|assistant|>\n"
            assert oracle.preprocessor is not None
            assert generation.stats.prompt_token_ids == expanded(oracle.preprocessor, tokenizer, text, shown)
            first, second = tokenizer(text).input_ids, iter(shown)
            prompt = Prompt([next(second) if token == IMAGE else token for token in first])
            want = oracle.generate(prompt, 12, ignore_eos=True)
            assert [tokens(deltas, index) for index in range(2)] == [want, want]

            await check_stop_string(backend, request, 1, "what", 2, " is it?")

            biased = {"logit_bias": dict.fromkeys((IMAGE, START, END), 90.0)}
            free = await answer(backend, request(1, sampling=biased))
            assert set(tokens(free)) <= {IMAGE, START, END}
            any_text = Constraint("regex", r"(.|\n)*")
            held = await answer(backend, request(1, sampling=biased, constraint=any_text))
            assert not set(tokens(held)) & {IMAGE, START, END}

    asyncio.run(scenario())


def test_two_ranks_give_the_same_tokens(one: tuple[Path, Oracle]) -> None:
    model, oracle = one
    prompts = [Prompt([1, 2, 3]), Prompt([9, image_of(50, 40), 4]), Prompt([image_of(4, 90), 7, BLACK, 8])]
    check_two_ranks(model, oracle, prompts, length=16)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"size": {"height": 56, "width": 56}}, "its vision tower takes 28 x 28 pixels"),
        ({"do_resize": False}, "do_resize"),
    ],
)
def test_what_is_not_served_is_said_before_loading(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    file = make_internvl(tmp_path) / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(ModelLoadError, match=message):
        InternVLPreprocessor.from_model(str(tmp_path))


def test_a_tower_whose_first_row_is_kept_is_refused(tmp_path: Path) -> None:
    file = make_internvl(tmp_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vision_feature_select_strategy": "full"}))
    with pytest.raises(ModelLoadError, match="'full'"):
        load_preprocessor(str(tmp_path))
