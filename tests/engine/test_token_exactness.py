"""Text decoders and Llava give the tokens of transformers' own `generate`; other families are in tests/families."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.engine_driver import Oracle
from tests.support.exactness import check_random_load, prompts_with, small_images
from tests.support.models import make_llava, make_text_model

DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
"""Has no effect within a model's own positions, and no request is longer than those."""

MODELS = {
    "llama": lambda path: make_text_model(path, "llama"),
    "mistral-window": lambda path: make_text_model(path, "mistral"),
    "llama-dynamic": lambda path: make_text_model(path, "llama", max_position_embeddings=240, rope_parameters=DYNAMIC),
    "phi3": lambda path: make_text_model(path, "phi3"),
    "phi3-window": lambda path: make_text_model(path, "phi3", sliding_window=24),
    "qwen2": lambda path: make_text_model(path, "qwen2"),
    "gemma": lambda path: make_text_model(path, "gemma"),
    "gemma2": lambda path: make_text_model(path, "gemma2"),
    "gemma3": lambda path: make_text_model(path, "gemma3_text"),
    "qwen3": lambda path: make_text_model(path, "qwen3"),
    "qwen3-window": lambda path: make_text_model(
        path, "qwen3", use_sliding_window=True, sliding_window=24, max_window_layers=1
    ),
    "llava-clip-llama": lambda path: make_llava(path),
    "llava-clip-full-mistral": lambda path: make_llava(path, text="mistral", strategy="full"),
    "llava-siglip-qwen2": lambda path: make_llava(path, tower="siglip", text="qwen2", strategy="full"),
}


@pytest.fixture(scope="module", params=sorted(MODELS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    path = MODELS[request.param](tmp_path_factory.mktemp("models") / request.param)
    # transformers' sdpa leaves the caps of attention scores out
    return path, Oracle(path, attn_implementation="eager" if request.param == "gemma2" else "sdpa")


@pytest.mark.parametrize("seed", range(4))
def test_tokens_equal_generate_for_random_loads(model: tuple[Path, Oracle], seed: int) -> None:
    path, oracle = model
    images = small_images() if oracle.preprocessor is not None else []
    check_random_load(path, oracle, seed, prompts_with(images))
