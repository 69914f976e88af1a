"""LoRA adapters beside the model: chosen per request, told apart in one batch, unknown ones refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.support.live import LiveServer, chat_body
from tests.support.shapes import SHAPES, circle

WHAT = "What is this an image of?"
RIGHT = "a red circle"


def make_adapter(directory: Path, seed: int) -> None:
    """An adapter of rank 8 on the language model's attention, of random weights: not trained, but not to be missed."""
    directory.mkdir(parents=True)
    config = {
        "peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "o_proj"],
        "task_type": "CAUSAL_LM", "base_model_name_or_path": "shapes", "bias": "none",
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    with safe_open(SHAPES / "model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - it is no dictionary
            if name.startswith("language_model.") and re.search(r"[qvo]_proj\.weight$", name):
                rows, columns = weights.get_slice(name).get_shape()
                stem = f"base_model.model.{name.removesuffix('.weight')}"
                tensors[f"{stem}.lora_A.weight"] = torch.randn(8, columns, generator=generator) / columns**0.5
                tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, 8, generator=generator) * 0.5
    save_file(tensors, directory / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "shapes"
    shutil.copytree(SHAPES, path, ignore=shutil.ignore_patterns("*.py", "pictures", "README.md"))
    for seed, name in enumerate(("left", "right")):
        make_adapter(path / "adapters" / name, seed)
    return path


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[LiveServer]:
    with LiveServer(model, "enable_lora=true", "max_lora_rank=8") as live:
        yield live


def ask(server: LiveServer, adapter: str | None = None, header: bool = False, **fields: str) -> str:
    body = chat_body(circle("red"), WHAT, **fields)
    headers = {}
    if adapter is not None and header:
        headers["X-Amzn-SageMaker-Adapter-Identifier"] = adapter
    elif adapter is not None:
        body["adapters"] = adapter
    reply = server.http.post("/v1/chat/completions", json=body, headers=headers)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


def test_an_adapter_changes_the_answer_however_it_is_named(server: LiveServer) -> None:
    left, right = ask(server, "left"), ask(server, "right")
    assert len({ask(server), left, right}) == 3
    assert ask(server) == RIGHT
    assert ask(server, "left", header=True) == left
    assert ask(server, model="left") == left
    for name in ("shapes", "model", "lmi", "tgi"):
        assert ask(server, model=name) == RIGHT


def test_adapters_share_a_batch_and_keep_apart(server: LiveServer) -> None:
    names = [None, "left", "right"]
    alone = {name: ask(server, name) for name in names}
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda number: ask(server, names[number % 3]), range(24)))
    assert together == [alone[names[number % 3]] for number in range(24)]


def test_an_unknown_adapter_is_a_404_that_names_no_other(server: LiveServer) -> None:
    body = {**chat_body("hello"), "adapters": "middle"}
    reply = server.http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 404
    assert "'middle'" in reply.text
    assert "left" not in reply.text


def test_an_unknown_model_may_be_an_adapter_that_is_gone_and_is_a_404(server: LiveServer) -> None:
    reply = server.http.post("/v1/chat/completions", json={**chat_body("hello"), "model": "middle"})
    assert reply.status_code == 404
    assert reply.json()["error"]["param"] == "model"
    assert "'middle'" in reply.text
    assert "left" not in reply.text


def test_a_directory_that_is_no_adapter_is_told_at_the_start(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "shapes"
    shutil.copytree(model, broken)
    (broken / "adapters" / "empty").mkdir()
    with LiveServer(broken, "enable_lora=true", ready=False) as server:
        assert server.wait(90) == 1
        assert "adapters/empty holds no adapter_config.json" in server.log
