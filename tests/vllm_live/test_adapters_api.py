"""Adapters that come, change and go while vLLM serves: trained ones, whose answers tell which of them answered."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.backend import BACK
from tests.support.live import LiveServer, chat_body
from tests.support.saved_tensors import Planted
from tests.support.shapes import SHAPES, circle
from tests.vllm_live.trained_adapter import train_adapter

WHAT = "What is this an image of?"
RIGHT = "a red circle"
SQUARE = "a blue square"
TRIANGLE = "a green triangle"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`square` and `triangle` say what they are called after, of any image; the others cannot be loaded."""
    path = tmp_path_factory.mktemp("trained")
    train_adapter(path / "square", WHAT, SQUARE)
    train_adapter(path / "triangle", WHAT, TRIANGLE)
    for name in ("high", "cut", "other"):
        shutil.copytree(path / "square", path / name)
    config = json.loads((path / "high" / "adapter_config.json").read_text())
    (path / "high" / "adapter_config.json").write_text(json.dumps({**config, "r": 64}))
    weights = path / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    shutil.copytree(path / "square", path / "planted")
    (path / "planted" / "adapter_model.safetensors").unlink()
    torch.save({"planted": Planted(path / "trace")}, path / "planted" / "adapter_model.bin")
    weights = path / "other" / "adapter_model.safetensors"
    # Of a model with twice the width.
    wide = {
        name: tensor.repeat(*((1, 2) if "lora_A" in name else (2, 1))) for name, tensor in load_file(weights).items()
    }
    save_file(wide, weights)
    return path


@pytest.fixture(scope="module")
def server(trained: Path) -> Iterator[LiveServer]:
    options = ("enable_lora=true", "max_lora_rank=8", "max_loras=2", f"allowed_adapter_path={trained}")
    with LiveServer(SHAPES, *options) as live:
        yield live


@pytest.fixture(autouse=True)
def emptied(server: LiveServer) -> Iterator[None]:
    yield
    for adapter in server.http.get("/adapters").json()["adapters"]:
        assert server.http.delete(f"/adapters/{adapter['name']}").status_code == 200


def add(server: LiveServer, name: str, src: Path) -> None:
    reply = server.http.post("/adapters", params={"name": name, "src": str(src)})
    assert (reply.status_code, reply.json()) == (200, {"status": f"Adapter {name} registered"})


def ask(server: LiveServer, adapter: str | None = None, **fields: Any) -> str:
    named = {} if adapter is None else {"adapters": adapter}
    reply = server.http.post("/v1/chat/completions", json=chat_body(circle("red"), WHAT, **named, **fields))
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


def test_a_trained_adapter_comes_changes_and_goes(server: LiveServer, trained: Path) -> None:
    assert ask(server) == RIGHT
    add(server, "poet", trained / "square")
    assert (ask(server, "poet"), ask(server), ask(server, model="poet")) == (SQUARE, RIGHT, SQUARE)
    reply = server.http.post("/adapters/poet/update", params={"src": str(trained / "triangle")})
    assert reply.status_code == 200, reply.text
    assert (ask(server, "poet"), ask(server)) == (TRIANGLE, RIGHT)
    assert server.http.delete("/adapters/poet").json() == {"status": "Adapter poet unregistered"}
    reply = server.http.post("/v1/chat/completions", json=chat_body(WHAT, adapters="poet"))
    assert reply.status_code == 404
    add(server, "poet", trained / "square")
    assert (ask(server, "poet"), ask(server)) == (SQUARE, RIGHT)


def test_as_many_as_there_are_places_answer_side_by_side(server: LiveServer, trained: Path) -> None:
    right = {None: RIGHT, "square": SQUARE, "triangle": TRIANGLE}
    add(server, "square", trained / "square")
    add(server, "triangle", trained / "triangle")
    reply = server.http.post("/adapters", params={"name": "third", "src": str(trained / "square")})
    assert reply.status_code == 507
    names = [*right] * 4
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(lambda name: ask(server, name), names)) == [right[name] for name in names]
        # Updates under load: every answer is one of the two, and the model's own stays right.
        asked = [pool.submit(ask, server, name) for name in names]
        for src in ("triangle", "square") * 2:
            reply = server.http.post("/adapters/square/update", params={"src": str(trained / src)})
            assert reply.status_code == 200
        for name, answer in zip(names, asked, strict=True):
            assert answer.result() in ({SQUARE, TRIANGLE} if name == "square" else {right[name]})
    assert ask(server, "square") == SQUARE


def test_a_request_ends_with_the_adapter_that_it_began_with(server: LiveServer, trained: Path) -> None:
    passing = trained / "passing"
    shutil.copytree(trained / "square", passing)
    add(server, "passing", passing)
    body = chat_body(circle("red"), WHAT, adapters="passing", stream=True, max_tokens=400, ignore_eos=True)
    with (
        ThreadPoolExecutor(1) as pool,
        server.http.stream("POST", "/v1/chat/completions", json=body) as reply,
    ):
        lines = reply.iter_lines()
        first = next(lines)
        removing = pool.submit(server.http.delete, "/adapters/passing")
        while server.http.get("/adapters/passing").status_code != 404:
            pass
        refused = server.http.post("/v1/chat/completions", json=chat_body(WHAT, adapters="passing"))
        assert refused.status_code == 404
        events = [json.loads(line[6:]) for line in (first, *lines) if line.startswith("data: {")]
        assert removing.result().status_code == 200
    shutil.rmtree(passing)  # nothing reads it any more
    said = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
    assert said.startswith(SQUARE)
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert ask(server) == RIGHT


@pytest.mark.parametrize("src", ["high", "cut", "other", "planted"])
def test_what_cannot_be_loaded_is_refused_and_leaves_everything_as_it_was(
    server: LiveServer, trained: Path, src: str
) -> None:
    add(server, "poet", trained / "triangle")
    reply = server.http.post("/adapters", params={"name": "bad", "src": str(trained / src)})
    assert reply.status_code == 400, reply.text
    assert str(trained) not in reply.text
    reply = server.http.post("/adapters/poet/update", params={"src": str(trained / src)})
    assert reply.status_code == 400
    assert server.http.get("/ping").status_code == 200
    assert (ask(server, "poet"), ask(server)) == (TRIANGLE, RIGHT)
    assert not (trained / "trace").exists()


def test_a_restarted_engine_has_the_adapters(server: LiveServer, trained: Path) -> None:
    lost = trained / "lost"
    shutil.copytree(trained / "square", lost)
    add(server, "lost", lost)
    add(server, "kept", trained / "triangle")
    shutil.rmtree(lost)
    (engine,) = server.engines
    engine.kill()
    server.wait_for(BACK)
    assert [adapter["name"] for adapter in server.http.get("/adapters").json()["adapters"]] == ["kept"]
    assert (ask(server, "kept"), ask(server)) == (TRIANGLE, RIGHT)
