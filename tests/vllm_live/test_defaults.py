"""Requests get the same defaults of the model as from vLLM's own server, whatever its options say of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from vllm.config import ModelConfig

from handlers.backends.vllm.prompts import generation_defaults
from handlers.prompts.generation_config import read_default_sampling
from tests.support.models import make_text_model

FIELDS: dict[str, Any] = {
    "temperature": 0.6, "top_k": 20, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.05, "presence_penalty": 0.5,
    "frequency_penalty": -0.5, "max_new_tokens": 9, "do_sample": True, "max_length": 30, "stop_strings": ["x"],
    "min_new_tokens": 2, "eos_token_id": 257,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_text_model(tmp_path_factory.mktemp("model"))
    (path / "generation_config.json").write_text(json.dumps(FIELDS))
    other = path / "other"
    other.mkdir()
    (other / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3}))
    return path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"generation_config": "vllm"},
        {"generation_config": "other"},
        {"override_generation_config": {"max_new_tokens": 4, "top_k": 3}},
        {"generation_config": "vllm", "override_generation_config": {"temperature": 0.3}},
    ],
)
def test_they_are_vllms(model: Path, options: dict[str, Any]) -> None:
    if options.get("generation_config") == "other":
        options = {"generation_config": str(model / "other")}
    config = ModelConfig(model=str(model), **options)
    assert read_default_sampling(generation_defaults(config, str(model))) == config.get_diff_sampling_param()
