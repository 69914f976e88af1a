"""Idefics3 and SmolVLM on the embedded engine: pixels, tokens and answers are transformers' own."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, Idefics3Processor
from transformers.utils import is_torchvision_available

from engine.errors import ModelLoadError
from engine.families.idefics3 import Idefics3Preprocessor
from engine.families.preprocessor import Preprocessor
from engine.families.tiles import TILES_AT_ONCE, encode_tiles
from engine.loader import load_preprocessor
from engine.sampling_params import SamplingParams
from handlers.request import Constraint
from tests.support.engine_driver import Oracle, Prompt, load_engine, run_all
from tests.support.exactness import check_logprobs, check_random_load, expanded, image_of, prompts_with
from tests.support.likeness import check_two_ranks
from tests.support.model_front import learned
from tests.support.rolling import answer, check_stop_string, loaded, request, tokens
from tests.support.tiny_tiles import ROWS, TILE, make_idefics3

SIZES = ((30, 40), (120, 4), (4, 120), (1, 1), (90, 60), (200, 190))
BLACK = Image.new("RGB", (40, 60))
IMAGE = 259
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module", params=["idefics3", "smolvlm"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_idefics3(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def oracle(model: Path) -> Oracle:
    return Oracle(model)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    """For what does not depend on the kind of decoder."""
    path = make_idefics3(tmp_path_factory.mktemp("models") / "smolvlm", "smolvlm")
    return path, Oracle(path)


def images() -> list[Image.Image]:
    return [*(image_of(*size, seed) for seed, size in enumerate(SIZES)), BLACK]


@pytest.mark.parametrize("seed", range(4))
def test_tokens_equal_generate_for_random_loads(model: Path, oracle: Oracle, seed: int) -> None:
    check_random_load(model, oracle, seed, prompts_with(images()), max_model_len=512)


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


def test_a_tile_of_zeros_keeps_its_rows(tmp_path: Path) -> None:
    """transformers takes it for padding and fails, since there are then more image tokens than rows."""
    path = make_idefics3(tmp_path, do_normalize=False)
    preprocessor = load_preprocessor(str(path))
    half = Image.new("RGB", (112, 112))
    half.paste(image_of(112, 56), (0, 56))
    results = run_all(
        load_engine(path, encoder_cache_bytes=0),
        [Prompt([5, image, 6]).add(preprocessor, GREEDY) for image in (BLACK, half)],
    )
    assert [result.finish for result in results.values()] == ["length", "length"]
    assert results[0].token_ids != results[1].token_ids


def test_few_tiles_go_through_the_tower_together() -> None:
    """However many images are encoded; each gets the rows of its own tiles."""
    sizes: list[int] = []

    def tower(tiles: torch.Tensor) -> torch.Tensor:
        sizes.append(len(tiles))
        return tiles[:, 0, :ROWS]

    shown = [torch.full((count, 3, 8, 5), float(count)) for count in (1, 17, 13, 17)]
    rows = encode_tiles(tower, shown)
    assert max(sizes) == TILES_AT_ONCE
    assert [tuple(part.shape) for part in rows] == [(len(image), ROWS, 5) for image in shown]
    assert all(bool((part == len(image)).all()) for part, image in zip(rows, shown, strict=True))


@pytest.fixture(scope="module", params=["idefics3", "smolvlm", "not split", "not enlarged", "bicubic"])
def pixels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Preprocessor[Any]:
    settings: dict[str, Any] = {
        "not split": {"do_image_splitting": False}, "not enlarged": {"do_resize": False}, "bicubic": {"resample": 3},
    }.get(request.param, {})  # fmt: skip
    kind = "smolvlm" if request.param == "smolvlm" else "idefics3"
    made = load_preprocessor(str(make_idefics3(tmp_path_factory.mktemp("models"), kind, **settings)))
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
    assert prepared.is_embed is not None
    assert sum(prepared.is_embed) == ROWS * len(want)
    assert [token == IMAGE for token in prepared.token_ids] == prepared.is_embed


def test_how_many_tokens_an_image_takes(model: Path) -> None:
    """A tag of two tokens and four rows of the encoder for each tile, a line's end after each row of tiles, and as many
    tokens as for a tile for the whole image and one behind it."""
    preprocessor = load_preprocessor(str(model))
    assert preprocessor is not None
    for size, rows, columns in (((56, 56), 4, 4), ((200, 100), 2, 4), ((20, 80), 4, 1), ((1, 1000), 4, 1)):
        want = rows * columns * 6 + rows + 7
        assert len(preprocessor.layout(*size).token_ids) == want, size


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=3), st.data())
def test_prompts_equal_the_joint_processors(
    joint: tuple[Any, Preprocessor[Any]], sizes: list[tuple[int, int]], data: st.DataObject
) -> None:
    processor, preprocessor = joint
    shown = [image_of(*size) for size in sizes]
    texts = st.sampled_from(["", "\n", "User: ", " what?\n\n", "<end_of_utterance>\n"])
    text = "".join(f"{data.draw(texts)}<image>" for _ in shown) + data.draw(texts)
    want = processor(images=[shown], text=text).input_ids[0]
    assert expanded(preprocessor, processor.tokenizer, text, shown) == list(want)


@pytest.fixture(scope="module")
def joint(model: Path) -> tuple[Any, Preprocessor[Any]]:
    preprocessor = load_preprocessor(str(model))
    assert preprocessor is not None
    if "smolvlm" not in model.name:
        parts = AutoImageProcessor.from_pretrained(model), AutoTokenizer.from_pretrained(model)
        return Idefics3Processor(*parts, image_seq_len=ROWS), preprocessor
    if not is_torchvision_available():
        pytest.skip("SmolVLM's joint processor needs torchvision")
    from transformers import SmolVLMProcessor, SmolVLMVideoProcessor
    from transformers.models.smolvlm import processing_smolvlm

    processing_smolvlm.num2words = processing_smolvlm.num2words or str  # of use for videos alone
    parts = AutoImageProcessor.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    return SmolVLMProcessor(*parts, SmolVLMVideoProcessor(), image_seq_len=ROWS), preprocessor


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
            text = "<s>User:<image>what<image> is it?<end_of_utterance>\nAssistant:"
            assert oracle.preprocessor is not None
            assert generation.stats.prompt_token_ids == expanded(oracle.preprocessor, tokenizer, text, shown)
            first, second = tokenizer(text).input_ids, iter(shown)
            prompt = Prompt([next(second) if token == IMAGE else token for token in first])
            want = oracle.generate(prompt, 12, ignore_eos=True)
            assert [tokens(deltas, index) for index in range(2)] == [want, want]

            await check_stop_string(backend, request, 1, "what", 2, " is it?")

            biased = {"logit_bias": dict.fromkeys((IMAGE, *range(264, 283)), 90.0)}
            free = await answer(backend, request(1, sampling={**biased, "skip_special_tokens": False}))
            assert all(token == IMAGE or token >= 264 for token in tokens(free))
            any_text = Constraint("regex", r"(.|\n)*")
            held = await answer(backend, request(1, sampling=biased, constraint=any_text))
            assert not any(token == IMAGE or token >= 264 for token in tokens(held))

    asyncio.run(scenario())


def test_two_ranks_give_the_same_tokens(one: tuple[Path, Oracle]) -> None:
    model, oracle = one
    prompts = [Prompt([1, 2, 3]), Prompt([9, image_of(50, 40), 4]), Prompt([image_of(4, 90), 7, BLACK, 8])]
    check_two_ranks(model, oracle, prompts, length=16)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"size": {"height": 56, "width": 56}}, "supported: longest_edge alone"),
        ({"max_image_size": {"longest_edge": 3 * TILE // 4}}, "cannot be merged 2 by 2"),
    ],
)
def test_what_is_not_served_is_said_before_loading(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    file = make_idefics3(tmp_path) / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(ModelLoadError, match=message):
        Idefics3Preprocessor.from_model(str(tmp_path))


def test_another_decoder_is_refused(tmp_path: Path) -> None:
    file = make_idefics3(tmp_path) / "config.json"
    config = json.loads(file.read_text())
    config["text_config"] = {"model_type": "gpt_neox"}
    file.write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match="'gpt_neox'"):
        load_preprocessor(str(tmp_path))
