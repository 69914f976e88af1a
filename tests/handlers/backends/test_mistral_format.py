"""Models with files of Mistral's own format: which of them are read, and what is refused with what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from container.check import describe
from engine.errors import ModelLoadError
from handlers.backends.vllm.checkpoint import (
    format_warnings,
    replaced_formats,
    weight_problems,
)
from handlers.prompts.tokenizer import load_tokenizer
from tests.support.checked import CPU, configure
from tests.support.engine_driver import load_engine
from tests.support.models import make_text_model
from tests.support.shapes import SHAPES
from tests.support.tiny_mistral import make_mistral, tekken


@pytest.fixture
def both(tmp_path: Path) -> Path:
    """A model with the files of both formats."""
    model = tmp_path / "both"
    shutil.copytree(SHAPES, model)
    (model / "tekken.json").write_text("{}")
    (model / "params.json").write_text("{}")
    (model / "consolidated.safetensors").hardlink_to(model / "model.safetensors")
    return model


@pytest.fixture
def own(both: Path) -> Path:
    """The same without a tokenizer of the Hugging Face format."""
    (both / "tokenizer.json").unlink()
    return both


def test_the_hugging_face_tokenizer_is_taken_where_both_are(both: Path) -> None:
    ours, plain = (
        load_tokenizer(str(path), trust_remote_code=False)("a red circle")["input_ids"] for path in (both, SHAPES)
    )
    assert ours == plain
    assert describe(configure(both), CPU)["errors"] == []


def test_a_tokenizer_of_sentencepiece_alone_is_refused_with_what_to_do(own: Path) -> None:
    (own / "tekken.json").rename(own / "tokenizer.model.v3")
    with pytest.raises(ModelLoadError, match=r"tokenizer\.model\.v3 only.*serve the model in the Hugging Face format"):
        load_tokenizer(str(own), trust_remote_code=False)
    (error,) = describe(configure(own), CPU)["errors"]
    assert "tokenizer as tokenizer.model.v3 only, Mistral's own format, and no tokenizer.json" in error


def test_a_tekken_tokenizer_alone_is_used(tmp_path: Path) -> None:
    model = make_text_model(tmp_path / "model", "mistral")
    (model / "tokenizer.json").unlink()
    (model / "tekken.json").write_text(json.dumps(tekken(images=False)))
    found = describe(configure(model, f"download_dir={tmp_path}"), CPU)
    assert found["errors"] == []
    tokenizer = load_tokenizer(found["model"]["directory"], trust_remote_code=False)
    assert tokenizer.convert_ids_to_tokens(tokenizer(" the").input_ids) == ["<s>", "Ġthe"]


def test_weights_alone_of_another_kind_of_model_are_refused(both: Path) -> None:
    """They are read for Mistral's own models."""
    (both / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="which is not read for model type 'llava'"):
        load_engine(both)


def test_vllm_reads_weights_alone_as_mistral_has_them(tmp_path: Path) -> None:
    model = make_mistral(tmp_path / "model")
    mistrals = {"tokenizer_mode": "mistral", "config_format": "mistral", "load_format": "mistral"}
    assert replaced_formats(configure(model), model) == mistrals
    assert replaced_formats(configure(model, "load_format=dummy"), model).keys() == {
        "tokenizer_mode",
        "config_format",
    }
    assert format_warnings(configure(model, "tokenizer_mode=mistral"), model) == []
    assert list(weight_problems(model, "auto")) == []
    (model / "params.json").unlink()
    (problem,) = weight_problems(model, "auto")
    assert "which vLLM reads with params.json, and that is missing" in problem


def test_weights_of_both_formats_without_an_index_are_told_for_vllm(both: Path) -> None:
    (problem,) = weight_problems(both, "dummy")
    assert "remove consolidated*.safetensors" in problem
    (both / "model.safetensors.index.json").write_text("{}")
    assert list(weight_problems(both, "dummy")) == []
    assert list(weight_problems(SHAPES, "auto")) == []


def test_a_model_without_config_json_is_told_from_none(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("{}")
    (error,) = describe(configure(tmp_path), CPU)["errors"]
    assert error.startswith("params.json of the model: Object missing required field `dim`")


def test_code_of_the_models_own_may_read_what_this_server_does_not(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("{}")
    (tmp_path / "model.py").write_text("def handle(inputs):\n    return inputs\n")
    assert describe(configure(tmp_path), CPU)["errors"] == []


def test_vllm_is_told_to_read_what_this_server_reads(both: Path) -> None:
    hugging_face = {"tokenizer_mode": "hf", "config_format": "hf", "load_format": "hf"}
    assert replaced_formats(configure(both), both) == hugging_face
    every = ("tokenizer_mode=mistral", "config_format=mistral", "load_format=mistral")
    assert replaced_formats(configure(both, *every), both) == hugging_face
    assert replaced_formats(configure(SHAPES, "tokenizer_mode=mistral"), SHAPES) == hugging_face
    dummy = replaced_formats(configure(both, "load_format=dummy"), both)
    assert dummy == {"tokenizer_mode": "hf", "config_format": "hf"}
    assert replaced_formats(configure(SHAPES), SHAPES) == {}


def test_options_that_are_replaced_are_said() -> None:
    told = format_warnings(configure(SHAPES, "tokenizer_mode=mistral", "config_format=mistral"), SHAPES)
    assert [str(warning).partition(" is not used")[0] for warning in told] == [
        "option.tokenizer_mode = mistral (--option tokenizer_mode)",
        "option.config_format = mistral (--option config_format)",
    ]
    assert format_warnings(configure(SHAPES, "tokenizer_mode=hf"), SHAPES) == []
