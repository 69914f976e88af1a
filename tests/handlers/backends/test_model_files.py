"""Damaged model directories: what `lmi check` passes is served, and the start refuses what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from container.build import build_backend
from container.check import describe
from engine.errors import EngineError
from engine.executor import load_runner
from engine.machine import this_machine
from handlers.backends.rolling.model_front import ModelFront
from handlers.backends.rolling.plan import plan_engines
from handlers.backends.weight_files import read_header
from properties.configuration import Configuration, resolve
from properties.problem import ConfigurationError
from tests.support.models import make_llava, make_text_model

Damage = Callable[[Path], object]

DAMAGES: dict[str, Damage] = {
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "halved": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "without its last byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "an empty object": lambda path: path.write_text("{}"),
    "a list": lambda path: path.write_text("[]"),
    "null": lambda path: path.write_text("null"),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00" * 9),
    "a pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    "without its entries": lambda path: path.write_text(json.dumps(_emptied(path))),
}  # fmt: skip
VISION_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json",
    "processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
)  # fmt: skip
SHARDED_FILES = ("model.safetensors.index.json", "model-00001-of-00002.safetensors")


def _emptied(path: Path) -> Any:
    """Every value of a JSON object replaced by an empty one of its type."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return {}
    return {name: type(value)() if value is not None else 0 for name, value in content.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of images, and one of text in two shards."""
    vision = make_llava(tmp_path_factory.mktemp("vision"))
    sharded = make_text_model(tmp_path_factory.mktemp("sharded"))
    tensors = load_file(sharded / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, sharded / shard, {"format": "pt"})
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: shard for shard, part in shards.items() for name in part},
    }
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    (sharded / "model.safetensors").unlink()
    return {"vision": vision, "sharded": sharded}


def configure(model: Path, *options: str) -> Configuration:
    return resolve(model=str(model), environ={}, options=["rolling_batch=rolling", *options])


def start(configuration: Configuration, model: Path) -> None:
    """What a start does, in its order, in this process."""
    configuration = configuration.with_model_directory(model)
    build_backend(configuration, model)
    front = ModelFront.load(configuration.settings, str(model))
    engine, *_ = plan_engines(configuration.settings, str(model), 0)
    assert front.text.tokenizer is not None
    load_runner(engine)


def outcome(model: Path, *options: str) -> tuple[list[str], list[str]]:
    """The errors of the check, and those of the start."""
    try:
        configuration = configure(model, *options)
    except ConfigurationError as error:  # both say so before they do anything
        return [str(error)], [str(error)]
    checked = describe(configuration, this_machine())["errors"]
    try:
        start(configuration, model)
    except ConfigurationError as error:
        return checked, [str(problem) for problem in error.problems]
    except EngineError as error:
        return checked, [str(error)]
    return checked, []


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "processor_config.json"])
def test_infinity_and_nan_are_numbers_as_in_transformers(whole: dict[str, Path], tmp_path: Path, name: str) -> None:
    model = shutil.copytree(whole["vision"], tmp_path / "model")
    content = json.loads((model / name).read_text("utf-8"))
    content |= {"model_max_length": float("inf"), "lowest": float("-inf"), "unknown": float("nan")}
    (model / name).write_text(json.dumps(content))
    assert outcome(model) == ([], [])


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("model", "file"),
    [("vision", name) for name in VISION_FILES] + [("sharded", name) for name in SHARDED_FILES],
)
def test_check_and_start_agree_about_a_damaged_file(
    whole: dict[str, Path], tmp_path: Path, model: str, file: str, damage: str
) -> None:
    shutil.copytree(whole[model], tmp_path / "model")
    path = tmp_path / "model" / file
    DAMAGES[damage](path)
    checked, started = outcome(tmp_path / "model")
    assert checked == started
    assert all("\n" not in text for text in checked if "problem" not in text)


@pytest.mark.parametrize(
    ("model", "change", "said"),
    [
        ("vision", {"preprocessor_config.json": None}, "there is no preprocessor_config.json in"),
        ("vision", {"model.safetensors": None}, "holds no weights: there is neither model.safetensors nor"),
        ("vision", {"tokenizer.json": None}, "the model has no tokenizer: there is no tokenizer.json in"),
        ("vision", {"chat_template.jinja": "{% if %}"}, "chat template of chat_template.jinja has an error in line 1"),
        ("sharded", {"model-00002-of-00002.safetensors": None}, "names model-00002-of-00002.safetensors, which"),
        ("sharded", {"tokenizer.json": "{}"}, "the tokenizer cannot be loaded from tokenizer.json, which is damaged"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(
    whole: dict[str, Path], tmp_path: Path, model: str, change: dict[str, str | None], said: str
) -> None:
    shutil.copytree(whole[model], tmp_path / "model")
    for name, text in change.items():
        path = tmp_path / "model" / name
        path.unlink() if text is None else path.write_text(text)
    checked, started = outcome(tmp_path / "model")
    (error,) = checked
    assert said in error
    assert started == checked


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("chat_template={% for m in messages %}{{ m", "option.chat_template has an error in line 1"),
        ("image_placeholder_token=abc", "option.image_placeholder_token = 'abc' is 3 tokens in this model's tokenizer"),
        ("max_model_len=100000", "option.max_model_len = 100000 (--option max_model_len) is more than the 512"),
        ("chat_template=absent.jinja", "no such file, and no template text"),
    ],
)  # fmt: skip
def test_options_that_the_model_refuses(whole: dict[str, Path], option: str, said: str) -> None:
    checked, started = outcome(whole["vision"], option)
    assert said in checked[0]
    assert started == checked


def test_a_context_that_only_the_family_knows_is_told_before_weights_are_read(
    whole: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(whole["vision"], tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    del config["text_config"]["max_position_embeddings"]  # Llama's own is 2048
    path.write_text(json.dumps(config))
    checked, started = outcome(tmp_path / "model", "max_model_len=2049")
    assert checked == started == ["option.max_model_len = 2049 is more than the model's own 2048 positions; lower it"]
    assert outcome(tmp_path / "model", "max_model_len=2048") == ([], [])


def test_no_chat_template_is_a_warning_in_both(
    whole: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(whole["vision"], tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    configuration = configure(tmp_path / "model")
    (warning,) = describe(configuration, this_machine())["warnings"]
    assert warning.startswith("the model has no chat template, so every chat request will be refused")
    start(configuration, tmp_path / "model")
    assert warning in caplog.text
    assert describe(configure(whole["vision"]), this_machine())["warnings"] == []


def test_that_8_bits_change_answers_is_a_warning_in_both(
    whole: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    configuration = configure(whole["vision"], "quantize=int8")
    (warning,) = describe(configuration, this_machine())["warnings"]
    assert warning.startswith("option.quantize = 'int8' changes answers")
    start(configuration, whole["vision"])
    assert warning in caplog.text


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1])
def test_a_weights_file_of_another_size_is_damaged(whole: dict[str, Path], tmp_path: Path, size: int) -> None:
    content = (whole["vision"] / "model.safetensors").read_bytes()
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert read_header(path).keys() == load_file(path).keys()
    path.write_bytes(content[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or cut off"):
        read_header(path)


def test_a_shard_without_a_tensor_of_the_index(whole: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(whole["sharded"], tmp_path / "model")
    path = tmp_path / "model" / "model-00001-of-00002.safetensors"
    tensors = load_file(path)
    lacking = min(tensors)
    save_file({name: tensor for name, tensor in tensors.items() if name != lacking}, path, {"format": "pt"})
    checked, started = outcome(tmp_path / "model")
    assert checked == started == [f"{path.name} has no tensor {lacking}, which its index names: fetch both again"]
