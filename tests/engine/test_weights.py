"""Weights are read from safetensors; from pickles only where the operator allows it, and nothing in one is ever run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig
from engine.errors import ModelLoadError
from engine.loader import load_model
from engine.weights import POOLING, complete, weight_files
from handlers.backends.rolling.model_front import ModelFront
from handlers.backends.rolling.plan import plan_engines
from handlers.backends.vllm.checkpoint import replaced_formats
from handlers.errors import ImageError
from tests.support.checked import configure
from tests.support.embeddings import loaded as uploaded
from tests.support.models import make_llava
from tests.support.saved_tensors import Planted, part, saved

CPU = torch.device("cpu")
BIN, SAFE = "pytorch_model.bin", "model.safetensors"


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture
def model(llava: Path, tmp_path: Path) -> Path:
    return shutil.copytree(llava, tmp_path / "model")


def pickled(model: Path, **more: object) -> None:
    """Its weights as PyTorch's own file alone."""
    torch.save({**load_file(model / SAFE), **more}, model / BIN)
    (model / SAFE).unlink()


def loaded(model: Path, **options: Any) -> dict[str, torch.Tensor]:
    return load_model(EngineConfig(model_path=str(model), dtype="float32", **options), CPU).model.state_dict()


def test_a_planted_pickle_is_refused_unread_and_never_run(model: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    pickled(model, planted=Planted(trace))
    with pytest.raises(ModelLoadError, match=r"not in safetensors but in pytorch_model\.bin.*load_format=pt"):
        loaded(model)
    with pytest.raises(ModelLoadError, match="weights cannot be loaded"):
        loaded(model, pickled_weights=True)
    assert not trace.exists()
    torch.load(model / BIN, weights_only=False)
    assert trace.exists()


def test_an_operator_may_allow_pickles_which_load_as_safetensors_do(model: Path) -> None:
    wanted = loaded(model)
    pickled(model)
    found = loaded(model, pickled_weights=True)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_pickles_of_every_name_beside_a_model_are_left_alone(model: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for name in (
        BIN, "model.pt", "consolidated.00.pth", "training_args.bin", "optimizer.pt", "adapter_model.bin",
        "tokenizer.pkl", "tokenizer.bin", "vocab.bin", "preprocessor.bin", "processor.pkl", "generation_config.bin",
        "flax_model.msgpack",
    ):  # fmt: skip
        torch.save(Planted(trace), model / name)
    (model / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"planted": BIN}}))
    ModelFront.load(configure(model).settings, str(model))
    for allowed in (False, True):
        assert loaded(model, pickled_weights=allowed)
    assert not trace.exists()


def test_a_planted_upload_in_place_of_an_image_is_refused_and_never_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for planted in (Planted(trace), {"image_embeds": torch.ones(2, 16), "planted": Planted(trace)}):
        with pytest.raises(ImageError, match="image_embeds"):
            uploaded(part(saved(planted)))
    assert not trace.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop("language_model.lm_head.weight"), r"lack lm_head\.weight \(transformers' names\)"),
        (
            lambda found: [found.pop(name) for name in list(found) if "language_model.model.layers" in name],
            r"lack model\.language_model\.layers\.\S+, \S+, \S+, and \d+ more",
        ),
        (
            lambda found: found.update({"language_model.lm_head.weight": torch.zeros(3, 5)}),
            r"lm_head\.weight is \[3, 5\] in the files and should be \[\d+, \d+\]: fetch",
        ),
    ],
    ids=["one", "many", "another shape"],
)
def test_a_checkpoint_without_all_of_its_weights_is_refused(
    model: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    """transformers would answer with random numbers in their place."""
    tensors = load_file(model / SAFE)
    change(tensors)
    save_file(tensors, model / SAFE, {"format": "pt"})
    with pytest.raises(ModelLoadError, match=message):
        loaded(model)


def test_what_a_family_does_not_use_may_be_missing(model: Path) -> None:
    """Features are taken before the tower's last norm, whatever it holds."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vision_feature_layer": -2}))
    tensors = load_file(model / SAFE)
    before = loaded(model)
    norms = [name for name in tensors if "post_layernorm" in name]
    assert norms
    save_file({name: tensors[name] for name in tensors.keys() - norms}, model / SAFE, {"format": "pt"})
    after = loaded(model)
    assert all(torch.equal(before[name], after[name]) for name in before if "post_layernorm" not in name)


def test_pooling_may_be_missing_in_every_family() -> None:
    tower = torch.nn.ModuleDict({"head": torch.nn.Linear(1, 1), "layer": torch.nn.Linear(1, 1)})
    model: Any = torch.nn.ModuleDict({"vision_tower": tower})
    info = {"mismatched_keys": [], "missing_keys": ["vision_tower.head.weight"]}
    assert complete((model, info), [POOLING]) is model
    info["missing_keys"].append("vision_tower.layer.bias")
    with pytest.raises(ModelLoadError, match=r"lack vision_tower\.layer\.bias \("):
        complete((model, info), [POOLING])


def test_tensors_that_the_model_does_not_have_change_nothing(model: Path) -> None:
    tensors = load_file(model / SAFE)
    before = loaded(model)
    save_file({**tensors, "language_model.further.weight": torch.zeros(3)}, model / SAFE, {"format": "pt"})
    after = loaded(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_files_of_a_checkpoint(tmp_path: Path) -> None:
    def put(name: str, *shards: str) -> None:
        (tmp_path / name).write_text(json.dumps({"weight_map": dict(enumerate(shards))}))

    def names(**options: Any) -> list[str]:
        return [file.name for file in weight_files(tmp_path, **options)]

    def refusal(**options: Any) -> str:
        with pytest.raises(ModelLoadError) as caught:
            weight_files(tmp_path, **options)
        return str(caught.value)

    assert refusal().startswith("the model's directory holds no weights: there is neither model.safetensors nor")
    put("pytorch_model.bin.index.json", "a.bin", "b.bin")
    assert refusal() == refusal(pickled=True)
    assert refusal().startswith("pytorch_model.bin.index.json names a.bin, which is missing")
    for name in ("a.bin", "b.bin"):
        put(name)
    assert "in a.bin, which is a pickle" in refusal()
    assert names(pickled=True) == ["a.bin", "b.bin"]
    put("model.safetensors.index.json", "b.safetensors", "a.safetensors", "a.safetensors")
    put("b.safetensors")
    assert refusal(pickled=True).startswith("model.safetensors.index.json names a.safetensors, which is missing")
    put("a.safetensors")
    assert names() == names(pickled=True) == ["a.safetensors", "b.safetensors"]
    put(SAFE)
    assert names() == names(pickled=True) == [SAFE]
    put("adapter_model.bin")
    assert "in adapter_model.bin, which is a pickle" in refusal(named="adapter_model.bin")
    assert names(named="model.safetensors.index.json") == ["a.safetensors", "b.safetensors"]
    for content in ("{}", "[]", "?", '{"weight_map": 1}'):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        assert "cannot be read" in refusal(named="model.safetensors.index.json")


@pytest.mark.parametrize(
    ("written", "allowed", "obeyed"),
    [
        ("auto", False, True),
        ("safetensors", False, True),
        ("pt", True, True),
        ("PT", True, True),
        ("dummy", False, False),
    ],
)
def test_the_option_reaches_the_engine_or_is_said_to_have_no_effect(
    llava: Path, written: str, allowed: bool, obeyed: bool
) -> None:
    configuration = configure(llava, f"load_format={written}")
    plan, *_ = plan_engines(configuration.settings, str(llava), 0)
    assert plan.pickled_weights is allowed
    told = [str(problem) for problem in configuration.unhonoured("rolling")]
    assert told == ([] if obeyed else [
        "option.load_format (--option load_format) has no effect with the rolling backend; honoured by: vllm"
    ])  # fmt: skip
    assert not configuration.unhonoured("vllm")


def test_vllm_is_told_a_word_that_reads_the_files_there_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")

    def told(load_format: str) -> dict[str, str]:
        return replaced_formats(configure(tmp_path, f"load_format={load_format}"), tmp_path)

    assert told("pt") == {"load_format": "auto"}
    assert told("auto") == told("dummy") == {}
    (tmp_path / "model.pt").touch()
    assert told("pt") == {}
