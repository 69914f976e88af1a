"""Pixtral, as the Llava that it is on the hub, and Mistral 3: rows of tokens that follow an image's aspect."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engine.errors import ModelLoadError, RequestRejected
from engine.families.preprocessor import Preprocessor
from engine.loader import load_preprocessor
from handlers.backends.embeddings import EmbeddingsWanted
from handlers.backends.rolling.image_preparer import ImagePreparer
from handlers.errors import ImageError
from handlers.request import (
    EmbeddingsPart,
    ImagePart,
    LoadedEmbeddings,
    LoadedImage,
)
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
from tests.support.tiny_pixtral import IMG, IMG_BREAK, IMG_END, LONGEST, TEMPLATE, UNIT, inputs, make_pixtral

LENGTH = 400

WANTED = EmbeddingsWanted(hidden_size=64, most_tokens=100, dtype="float32")


@pytest.fixture(scope="module", params=[1, 2], ids=["pixtral", "mistral3"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pixtral(tmp_path_factory.mktemp("models") / "pixtral", merge=request.param)


@pytest.fixture(scope="module")
def oracle(path: Path) -> Oracle:
    return Oracle(path, inputs)


@pytest.fixture(scope="module")
def preprocessor(oracle: Oracle) -> Preprocessor[Any]:
    assert oracle.preprocessor is not None
    return oracle.preprocessor


@settings(max_examples=60, deadline=None)
@given(sizes(), st.integers(0, 2**32 - 1))
def test_pixels_equal_the_processors(preprocessor: Preprocessor[Any], size: tuple[int, int], seed: int) -> None:
    check_arrays(preprocessor, noise(*size, seed))


def test_the_front_needs_neither_torch_nor_the_processor(path: Path) -> None:
    check_front(path)


@settings(max_examples=25, deadline=None)
@given(st.lists(sizes(1500), min_size=1, max_size=3))
def test_expansion_equals_the_joint_processors(path: Path, wanted: list[tuple[int, int]]) -> None:
    check_joint_expansion(path, "[IMG]", [noise(*size) for size in wanted])


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [
        ((16, 8), 1, 2),
        ((17, 9), 2, 3),  # not enlarged but for what the last ones lack
        ((64, 64), 8, 8),
        ((640, 320), 4, 8),
        ((1920, 64), 1, 8),
        ((1, 1), 1, 1),
    ],
)
def test_known_tokens(preprocessor: Preprocessor[Any], size: tuple[int, int], rows: int, columns: int) -> None:
    layout = preprocessor.layout(*size)
    row = [IMG] * columns + [IMG_BREAK]
    assert layout.token_ids == row * (rows - 1) + [IMG] * columns + [IMG_END]
    assert preprocessor.forbidden_token_ids == [IMG, IMG_BREAK, IMG_END]
    assert layout.is_embed == ([True] * columns + [False]) * rows
    height, width = preprocessor.prepare(noise(*size)).tensors["pixel_values"].shape[1:]
    assert (height, width) == (rows * UNIT, columns * UNIT)


@pytest.mark.parametrize("seed", range(4))
def test_tokens_equal_generate_for_random_loads(path: Path, oracle: Oracle, seed: int) -> None:
    shapes = [(9, 60), (300, 40), (64, 64), (33, 31), (20, 600), (130, 120)]
    images = [noise(*size, seed) for size in shapes]
    check_random_load(path, oracle, seed, prompts_with(images, most=3), max_model_len=LENGTH)


def test_what_could_go_wrong_with_images(path: Path, oracle: Oracle) -> None:
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
    check_answers(path, oracle, prompts)


def test_log_probabilities_equal_transformers(path: Path, oracle: Oracle) -> None:
    check_logprobs(path, oracle, Prompt([1, noise(70, 30), 2, noise(31, 90, 1), 3]))


def test_two_ranks_give_the_same_tokens(path: Path, oracle: Oracle) -> None:
    check_two_ranks(
        path, oracle, [Prompt([1, noise(70, 30), 2]), Prompt([noise(31, 90, 1), noise(20, 20), 3])], ignore_eos=False
    )


def test_a_chat_through_the_backend(path: Path, oracle: Oracle) -> None:
    check_chat(path, oracle, TEMPLATE, [noise(70, 30), noise(31, 90, 1)])


def test_an_image_of_which_nothing_would_be_left_is_refused(preprocessor: Preprocessor[Any]) -> None:
    thin = noise(1, 2 * LONGEST)
    with pytest.raises(RequestRejected, match="too thin"):
        preprocessor.prepare(thin)

    preparer = ImagePreparer(preprocessor, ThreadPoolExecutor(1), 0, WANTED)
    with pytest.raises(ImageError, match="too thin"):
        asyncio.run(preparer.prepare([ImagePart("data:", loaded=LoadedImage(thin, b"thin"))]))


def test_rows_in_place_of_an_image_are_refused(preprocessor: Preprocessor[Any]) -> None:
    preparer = ImagePreparer(preprocessor, ThreadPoolExecutor(1), 0, WANTED)
    rows = LoadedEmbeddings(np.zeros((3, 64), np.float32), 0.0, None, bytes(32))
    with pytest.raises(ImageError, match="takes no image_embeds; send the image itself"):
        asyncio.run(preparer.prepare([EmbeddingsPart("", loaded=rows)]))


@pytest.mark.parametrize(
    ("file", "changed", "message"),
    [
        ("config.json", {"vision_feature_select_strategy": "default"}, "no class token; set 'full'"),
        ("processor_config.json", {"image_break_token": "[ROW]"}, r"no token '\[ROW\]'"),
    ],
)
def test_a_model_that_cannot_work_is_refused(tmp_path: Path, file: str, changed: dict[str, Any], message: str) -> None:
    path = make_pixtral(tmp_path / "model")
    edit_json(path / file, **changed)
    with pytest.raises(ModelLoadError, match=message):
        load_preprocessor(str(path))
