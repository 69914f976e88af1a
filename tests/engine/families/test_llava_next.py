"""Llava-Next: pixels and expansion are transformers' own, and so are the tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engine.errors import ModelLoadError
from engine.families.preprocessor import Preprocessor
from engine.loader import load_preprocessor
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
from tests.support.tiny_llava_next import MISTRAL, make_llava_next

MODELS: dict[str, dict[str, str]] = {
    "mistral": {"text": "mistral"},
    "vicuna": {"text": "llama"},
    "siglip-qwen2": {"tower": "siglip", "text": "qwen2"},
}
LENGTH = 480


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    path = make_llava_next(tmp_path_factory.mktemp("models") / request.param, **MODELS[request.param])
    return path, Oracle(path)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava_next(tmp_path_factory.mktemp("models") / "path")


@pytest.fixture(scope="module")
def preprocessor(path: Path) -> Preprocessor[Any]:
    found = load_preprocessor(str(path))
    assert found is not None
    return found


@settings(max_examples=60, deadline=None)
@given(sizes(), st.integers(0, 2**32 - 1))
def test_pixels_equal_the_processors(preprocessor: Preprocessor[Any], size: tuple[int, int], seed: int) -> None:
    check_arrays(preprocessor, noise(*size, seed))


def test_the_front_needs_neither_torch_nor_the_processor(path: Path) -> None:
    check_front(path)


@settings(max_examples=25, deadline=None)
@given(st.lists(sizes(1500), min_size=1, max_size=3))
def test_expansion_equals_the_joint_processors(path: Path, wanted: list[tuple[int, int]]) -> None:
    check_joint_expansion(path, "<image>", [noise(*size) for size in wanted])


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ((56, 56), 16 + 8 * 9),  # the grid of 2 x 2 tiles, full
        ((200, 200), 16 + 8 * 9),
        ((28, 56), 16 + 8 * 5),  # one tile wide, two high
        ((100, 50), 16 + 4 * 9),
        ((80, 600), 16 + 12 * 3),  # of 4 columns of features the outer ones show padding
        ((30, 900), 16 + 12 * 1),  # all of them do, by transformers' rounding: only the lines' ends stay
        ((900, 30), 16),
        ((1, 1), 16 + 4 * 5),  # all grids keep its one pixel: the smallest is taken
    ],
)
def test_known_numbers_of_tokens(preprocessor: Preprocessor[Any], size: tuple[int, int], count: int) -> None:
    assert len(preprocessor.layout(*size).token_ids) == count


@pytest.mark.parametrize("seed", range(4))
def test_tokens_equal_generate_for_random_loads(model: tuple[Path, Oracle], seed: int) -> None:
    shapes = [(9, 60), (300, 40), (56, 56), (33, 31), (20, 600), (130, 120)]
    images = [noise(*size, seed) for size in shapes]
    check_random_load(*model, seed, prompts_with(images, most=2), max_model_len=LENGTH)


def test_what_could_go_wrong_with_images(model: tuple[Path, Oracle]) -> None:
    black, thin = Image.new("RGB", (90, 90)), noise(12, 360)
    first, second = noise(80, 40, 1), noise(80, 40, 2)
    prompts = [
        Prompt([*text("black "), black, *text(" end")]),
        Prompt([*text("thin "), thin, *text(" end")]),
        Prompt([*text("same text before "), first, *text(" and after")]),
        Prompt([*text("same text before "), second, *text(" and after")]),
        Prompt([*text("at the very end "), first]),
        Prompt([first, second, *text("two in a row")]),
        Prompt(text("a turn without one")),
        Prompt([black, thin]),
    ]
    check_answers(*model, prompts)


def test_log_probabilities_equal_transformers(model: tuple[Path, Oracle]) -> None:
    check_logprobs(*model, Prompt([1, noise(70, 30), 2, noise(31, 90, 1), 3]))


def test_two_ranks_give_the_same_tokens(path: Path) -> None:
    check_two_ranks(
        path,
        Oracle(path),
        [Prompt([1, noise(70, 30), 2]), Prompt([noise(31, 90, 1), noise(20, 20), 3])],
        ignore_eos=False,
    )


def test_a_chat_through_the_backend(path: Path) -> None:
    check_chat(path, Oracle(path), MISTRAL, [noise(70, 30), noise(31, 90, 1)])


@pytest.mark.parametrize(
    ("file", "changed", "message"),
    [
        ("config.json", {"image_grid_pinpoints": [[28, 50]]}, "multiples of the vision tower's 28 pixels"),
        ("config.json", {"vision_feature_select_strategy": "full"}, "one feature for each patch"),
        ("preprocessor_config.json", {"image_grid_pinpoints": [[28, 56]]}, "not those of config.json"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 32}}, "tiles of 28, 32 pixels"),
    ],
)
def test_a_model_that_cannot_work_is_refused(tmp_path: Path, file: str, changed: dict[str, Any], message: str) -> None:
    path = make_llava_next(tmp_path / "model")
    edit_json(path / file, **changed)
    with pytest.raises(ModelLoadError, match=message):
        load_preprocessor(str(path))
