"""Llava-OneVision: as Llava-Next, features shrunk and images prepared according to their number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engine.errors import ModelLoadError
from engine.families.llava_onevision import SEVERAL
from engine.families.preprocessor import Preprocessor
from engine.loader import read_config
from tests.support.engine_driver import Oracle, Prompt
from tests.support.exactness import check_random_load, prompts_with
from tests.support.likeness import (
    check_answers,
    check_arrays,
    check_chat,
    check_front,
    check_joint_expansion,
    check_logprobs,
    check_two_ranks,
    edit_json,
    noise,
    sizes,
    text,
)
from tests.support.tiny_llava_onevision import TEMPLATE, inputs, make_llava_onevision

LENGTH = 320


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava_onevision(tmp_path_factory.mktemp("models") / "onevision")


@pytest.fixture(scope="module")
def oracle(path: Path) -> Oracle:
    return Oracle(path, inputs)


@pytest.fixture(scope="module")
def preprocessor(oracle: Oracle) -> Preprocessor[Any]:
    assert oracle.preprocessor is not None
    return oracle.preprocessor


@settings(max_examples=60, deadline=None)
@given(sizes(), st.sampled_from([0, SEVERAL]), st.integers(0, 2**32 - 1))
def test_pixels_equal_the_processors(
    preprocessor: Preprocessor[Any], size: tuple[int, int], variant: int, seed: int
) -> None:
    check_arrays(preprocessor, noise(*size, seed), variant)


def test_the_front_needs_neither_torch_nor_the_processor(path: Path) -> None:
    check_front(path)


@settings(max_examples=25, deadline=None)
@given(st.lists(sizes(1500), min_size=1, max_size=3))
def test_expansion_equals_the_joint_processors(path: Path, wanted: list[tuple[int, int]]) -> None:
    check_joint_expansion(path, "<image>", [noise(*size) for size in wanted])


@pytest.mark.parametrize(
    ("size", "images", "count"),
    [
        ((28, 28), 1, 16 + 4 * 5),
        ((56, 56), 1, 16 + 8 * 9),
        # 16 x 16 features are 3.2 times as many as those of 5 tiles: 1.789 times along each edge
        ((112, 112), 1, 16 + 8 * 9),
        ((112, 112), 2, 17),
        ((1, 30), 2, 17),
    ],
)
def test_known_numbers_of_tokens(
    preprocessor: Preprocessor[Any], size: tuple[int, int], images: int, count: int
) -> None:
    assert len(preprocessor.layout(*size, preprocessor.variant(images)).token_ids) == count


@pytest.mark.parametrize("seed", range(4))
def test_tokens_equal_generate_for_random_loads(path: Path, oracle: Oracle, seed: int) -> None:
    shapes = [(9, 60), (300, 40), (112, 112), (33, 31), (20, 600), (130, 120)]
    images = [noise(*size, seed) for size in shapes]
    check_random_load(path, oracle, seed, prompts_with(images, most=3), max_model_len=LENGTH)


def test_what_could_go_wrong_with_images(path: Path, oracle: Oracle) -> None:
    """Among them: the same image alone and beside another, after the same text."""
    black, thin = Image.new("RGB", (90, 90)), noise(12, 360)
    first, second = noise(80, 40, 1), noise(80, 40, 2)
    prompts = [
        Prompt([*text("black "), black, *text(" end")]),
        Prompt([*text("thin "), thin, *text(" end")]),
        Prompt([*text("same text before "), first, *text(" and after")]),
        Prompt([*text("same text before "), first, *text(" and after"), second]),
        Prompt([*text("same text before "), second, *text(" and after")]),
        Prompt([*text("at the very end "), first]),
        Prompt([first, second, *text("two in a row")]),
        Prompt(text("a turn without one")),
        Prompt([black, thin]),
    ]
    check_answers(path, oracle, prompts)


def test_log_probabilities_equal_transformers(path: Path, oracle: Oracle) -> None:
    check_logprobs(path, oracle, Prompt([1, noise(120, 90), 2, 3]))
    check_logprobs(path, oracle, Prompt([1, noise(70, 30), 2, noise(31, 90, 1), 3]))


def test_two_ranks_give_the_same_tokens(path: Path, oracle: Oracle) -> None:
    check_two_ranks(
        path, oracle, [Prompt([1, noise(70, 30), 2]), Prompt([noise(31, 90, 1), noise(20, 20), 3])], ignore_eos=False
    )


def test_a_chat_through_the_backend(path: Path, oracle: Oracle) -> None:
    check_chat(path, oracle, TEMPLATE, [noise(70, 30), noise(31, 90, 1)])


def test_a_ratio_that_is_not_known_is_refused(tmp_path: Path) -> None:
    path = make_llava_onevision(tmp_path / "model")
    edit_json(path / "config.json", vision_aspect_ratio="square")
    with pytest.raises(ModelLoadError, match=r"'square' of config\.json is not supported"):
        read_config(str(path))
