"""Models in Mistral's own format: served where the Hugging Face format is beside it, else refused with what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from container.check import describe
from engine.errors import ModelLoadError
from engine.machine import Device, Machine
from handlers.backends.mistral_format import format_problems
from handlers.backends.model_facts import load_tokenizer
from handlers.backends.vllm.options.mistral import (
    format_warnings,
    replaced_formats,
    weight_problems,
)
from properties.configuration import Configuration, resolve

SHAPES = Path(__file__).parents[1] / "examples" / "shapes"
CPU = Machine((), Device("host memory", 16 << 30))


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


def configure(model: Path, *options: str) -> Configuration:
    return resolve(model=str(model), environ={}, options=["rolling_batch=rolling", *options])


def test_the_hugging_face_tokenizer_is_taken_where_both_are(both: Path) -> None:
    ours, plain = (
        load_tokenizer(str(path), trust_remote_code=False)("a red circle")["input_ids"]
        for path in (both, SHAPES)
    )
    assert ours == plain
    assert describe(configure(both), CPU)["errors"] == []


def test_mistrals_own_tokenizer_alone_is_refused_with_what_to_do(own: Path) -> None:
    with pytest.raises(
        ModelLoadError, match=r"tekken\.json only.*serve the model in the Hugging Face format"
    ):
        load_tokenizer(str(own), trust_remote_code=False)
    (error,) = describe(configure(own), CPU)["errors"]
    assert "tokenizer as tekken.json only, Mistral's own format, and no tokenizer.json" in error


def test_mistrals_own_weights_alone_are_refused(both: Path) -> None:
    (both / "model.safetensors").unlink()
    (problem,) = format_problems(both)
    assert "consolidated*.safetensors only" in str(problem)


def test_weights_of_both_formats_without_an_index_are_told_for_vllm(both: Path) -> None:
    (problem,) = weight_problems(both)
    assert "remove consolidated*.safetensors" in str(problem)
    (both / "model.safetensors.index.json").write_text("{}")
    assert weight_problems(both) == []
    assert weight_problems(SHAPES) == []


def test_a_model_without_config_json_is_told_from_none(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("{}")
    (error,) = describe(configure(tmp_path), CPU)["errors"]
    assert error.startswith("the model has params.json and no config.json, which is Mistral's own format")


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
    told = format_warnings(configure(SHAPES, "tokenizer_mode=mistral", "config_format=mistral"))
    assert [str(warning).partition(" is not used")[0] for warning in told] == [
        "option.tokenizer_mode = mistral (--option tokenizer_mode)",
        "option.config_format = mistral (--option config_format)",
    ]
    assert format_warnings(configure(SHAPES, "tokenizer_mode=hf")) == []
