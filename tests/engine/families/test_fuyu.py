"""Fuyu on the embedded engine: patches as rows of the prompt, image and text tokenised apart."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor, FuyuProcessor

from engine.loader import load_preprocessor
from handlers import LLM, StructuredOutputsParams
from handlers import SamplingParams as OfflineParams
from handlers.errors import InvalidRequest
from tests.support.engine_driver import CAPITALS, Oracle, Prompt
from tests.support.exactness import check_random_load
from tests.support.likeness import check_logprobs, check_two_ranks
from tests.support.tiny_fuyu import ANSWER, BOS, SPEAKER, make_fuyu, make_tokenizer, patches_of


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def images() -> list[Image.Image]:
    sizes = ((10, 10), (80, 60), (33, 47), (300, 10), (7, 200), (1, 1))
    return [noise(width, height, seed) for seed, (width, height) in enumerate(sizes)]


def joint(path: Path) -> FuyuProcessor:
    return FuyuProcessor(AutoImageProcessor.from_pretrained(path), make_tokenizer())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    path = make_fuyu(tmp_path_factory.mktemp("models") / "fuyu")
    return path, Oracle(path, patches_of)


def make_prompt(rng: random.Random, prefixes: list[list[int]]) -> Prompt:
    """One image at the beginning, as the family has it, or none."""
    text = list(rng.choice(prefixes)) if rng.random() < 0.5 else []
    text += [rng.randrange(90) for _ in range(rng.randint(1, 70))]
    return Prompt([rng.choice(images()), BOS, *text, ANSWER] if rng.random() < 0.7 else text)


@pytest.mark.parametrize("seed", range(4))
def test_tokens_equal_generate_for_random_loads(model: tuple[Path, Oracle], seed: int) -> None:
    path, oracle = model
    check_random_load(path, oracle, seed, make_prompt)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300))
def test_patches_and_tokens_equal_the_joint_processors(model: tuple[Path, Oracle], width: int, height: int) -> None:
    path, oracle = model
    assert oracle.preprocessor is not None
    assert oracle.preprocessor.to_bytes() is not None, "the direct way is in use"
    if min(width * 60 // height, height * 80 // width) == 0:
        return  # transformers fails on these
    image = noise(width, height)
    want = joint(path)(text="What is it?", images=[image])
    prepared = oracle.preprocessor.prepare(image)
    patches = want["image_patches"].reshape(-1, 300)
    np.testing.assert_array_equal(prepared.tensors["image_patches"], patches)
    before, after = oracle.preprocessor.around(1)
    text = make_tokenizer()("What is it?", add_special_tokens=False).input_ids
    ids = [*prepared.token_ids, *before[1:], *text, *after]
    assert ids == want["input_ids"][0].tolist()


def test_torchvisions_way_takes_one_mean_for_all_channels(model: tuple[Path, Oracle]) -> None:
    """`option.image_processor_backend=torchvision`: the published processor has one number for the three."""
    path, oracle = model
    theirs = load_preprocessor(str(path), None, "torchvision")
    assert theirs is not None
    assert oracle.preprocessor is not None
    image = images()[0]  # not resized
    want = oracle.preprocessor.prepare(image).tensors["image_patches"]
    np.testing.assert_allclose(theirs.prepare(image).tensors["image_patches"], want, atol=1e-6)


def test_two_ranks_give_the_same_tokens(model: tuple[Path, Oracle]) -> None:
    path, oracle = model
    prompts = [Prompt([image, BOS, 65, 66, ANSWER]) for image in images()[:3]]
    check_two_ranks(path, oracle, prompts)


def test_a_chat_through_the_whole_way(model: tuple[Path, Oracle]) -> None:
    path, oracle = model
    image = images()[2]
    parts = [{"type": "text", "text": "What is it?"}, {"type": "image_pil", "image_pil": image}]
    turn = [{"role": "user", "content": parts}]
    greedy = OfflineParams(temperature=0, max_tokens=10, ignore_eos=True, n=2)
    with LLM(str(path), dtype="float32") as llm:
        (output,) = llm.chat(turn, greedy, use_tqdm=False)
        plain = {"prompt": "What is it?", "multi_modal_data": {"image": image}}
        (completed,) = llm.generate(plain, greedy, use_tqdm=False)
        digits = StructuredOutputsParams(regex="[0-9]{4}")
        (number,) = llm.chat(
            turn, OfflineParams(temperature=0, max_tokens=9, structured_outputs=digits), use_tqdm=False
        )
        (text,) = llm.chat([{"role": "user", "content": "What is it?"}], greedy, use_tqdm=False)
        letters = {"temperature": 0, "max_tokens": 10, "ignore_eos": True, "allowed_token_ids": CAPITALS}
        written = llm.chat(turn, OfflineParams(**letters), use_tqdm=False)[0].outputs[0].text
        stop = written[2]
        (stopped,) = llm.chat(turn, OfflineParams(**letters, stop=[stop]), use_tqdm=False)
        earlier = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, *turn]
        with pytest.raises(InvalidRequest, match="single user message"):
            llm.chat(earlier, greedy, use_tqdm=False)
        with pytest.raises(InvalidRequest, match="has 2 images, but a prompt of this model holds at most 1"):
            llm.chat([{"role": "user", "content": [*parts, parts[1]]}], greedy, use_tqdm=False)
    want = joint(path)(text="What is it?", images=[image])["input_ids"][0].tolist()
    after = want[want.index(BOS) :]
    tokens = oracle.generate(Prompt([image, *after]), 10, ignore_eos=True)
    for result in (output, completed):
        assert result.prompt_token_ids == want
        assert [list(choice.token_ids) for choice in result.outputs] == [tokens, tokens]
    assert SPEAKER not in text.prompt_token_ids
    assert ANSWER not in text.prompt_token_ids
    assert number.outputs[0].text.strip().isdigit()
    assert stopped.outputs[0].text == written[: written.index(stop)]
    assert stopped.outputs[0].finish_reason == "stop"


def test_log_probabilities_equal_transformers(model: tuple[Path, Oracle]) -> None:
    path, oracle = model
    check_logprobs(path, oracle, Prompt([images()[1], BOS, 65, 66, 67, ANSWER]))
