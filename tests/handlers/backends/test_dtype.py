"""Which type a model computes in, and why."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from container.check import check, describe
from engine.loader import resolve_dtype
from engine.machine import Device, Machine, computes_bfloat16
from handlers.backends.fit import fit
from handlers.backends.select import backend_of
from handlers.backends.vllm.checkpoint import served_dtype, stored_dtype
from properties.configuration import resolve
from tests.support.models import make_text_model


@pytest.mark.parametrize(
    ("stored", "device", "bfloat16", "expected", "reason"),
    [
        ("float32", "cpu", True, torch.float32, "as the model is stored"),
        ("float32", "cpu", False, torch.float32, "as the model is stored"),
        ("float16", "cpu", True, torch.float32, "stored in float16, in which this CPU does not compute fast"),
        ("bfloat16", "cpu", True, torch.bfloat16, "as the model is stored"),
        (
            "bfloat16",
            "cpu",
            False,
            torch.float32,
            "stored in bfloat16, in which this CPU does not compute fast",
        ),
        (
            "float32",
            "cuda",
            True,
            torch.bfloat16,
            "16-bit type here; option.dtype=float32 keeps it",
        ),
        ("float32", "cuda", False, torch.float16, "as with vLLM"),
        ("float16", "cuda", True, torch.float16, "as the model is stored"),
        ("bfloat16", "cuda", True, torch.bfloat16, "as the model is stored"),
        (
            "bfloat16",
            "cuda",
            False,
            torch.float16,
            "stored in bfloat16, in which this accelerator does not compute",
        ),
        (None, "cuda", True, torch.float32, "config.json does not name a type"),
    ],
)
def test_auto(stored: str | None, device: str, bfloat16: bool, expected: torch.dtype, reason: str) -> None:
    found = resolve_dtype(LlamaConfig(dtype=stored), "auto", device, bfloat16=bfloat16)
    assert found.dtype == expected
    assert reason in found.reason
    assert found.lossy == (expected is not torch.float32 and str(expected) != f"torch.{stored}")


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_asked_for_is_done(name: str, device: str) -> None:
    found = resolve_dtype(LlamaConfig(dtype="float32"), name, device, bfloat16=False)
    assert found == (getattr(torch, name), "option.dtype says so", False)


@pytest.mark.parametrize(
    ("name", "stored", "bfloat16", "expected", "reason"),
    [
        ("auto", "float32", True, "bfloat16", "vLLM serves what is stored in float32 in bfloat16"),
        ("auto", "float32", False, "float16", "vLLM serves what is stored in float32 in float16"),
        ("auto", "float16", True, "float16", "as the model is stored"),
        ("auto", "bfloat16", False, "float16", "this accelerator does not compute"),
        ("auto", None, True, "bfloat16", "config.json does not name a type"),
        ("float32", "bfloat16", True, "float32", "option.dtype says so"),
    ],
)
def test_vllms_rule(name: str, stored: str | None, bfloat16: bool, expected: str, reason: str) -> None:
    found, why = served_dtype(name, stored, bfloat16=bfloat16)
    assert found == expected
    assert reason in why


@pytest.mark.parametrize(
    ("config", "weights", "expected"),
    [
        ({"dtype": "bfloat16"}, [torch.float16], "bfloat16"),
        ({"vision_config": {"dtype": "float16"}}, [torch.bfloat16], "float16"),
        ({}, [torch.float16], "float16"),
        ({}, [torch.bfloat16, torch.int64], "bfloat16"),
        ({}, [torch.float16, torch.float32], "float32"),
        ({}, [torch.float16, torch.bfloat16], None),
        ({}, [], None),
    ],
)
def test_vllm_reads_the_weights_where_config_json_says_nothing(
    tmp_path: Path, config: dict[str, object], weights: list[torch.dtype], expected: str | None
) -> None:
    if weights:
        tensors = {str(number): torch.zeros(2, dtype=dtype) for number, dtype in enumerate(weights)}
        save_file(tensors, tmp_path / "model.safetensors")
    assert stored_dtype(tmp_path, config) == expected


def test_check_of_vllm_reads_them_too(tmp_path: Path) -> None:
    model = make_text_model(tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "dtype" not in k}))
    tensors = {name: tensor.half() for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    configuration = resolve(model=str(model), environ={}, options=[])
    raw = json.loads((model / "config.json").read_text())
    found = fit(configuration, backend_of("vllm"), model, raw, Machine((), Device("host memory", 8 << 30)))
    assert (found.dtype, found.dtype_reason) == ("float16", "as the model is stored")


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_check_says_which_and_why(tmp_path: Path, stored: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_text_model(tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "dtype": stored}))
    expected = resolve_dtype(LlamaConfig(dtype=stored), "auto", "cpu", bfloat16=computes_bfloat16("cpu"))
    configuration = resolve(model=str(model), environ={}, options=["rolling_batch=rolling"])
    machine = Machine((), Device("host memory", 8 << 30))
    memory = describe(configuration, machine)["memory"]
    assert (f"torch.{memory['dtype']}", memory["dtype_reason"]) == (str(expected.dtype), expected.reason)
    check(configuration, as_json=False, machine=machine)
    assert f"computing in {memory['dtype']}: {expected.reason}" in capsys.readouterr().out
