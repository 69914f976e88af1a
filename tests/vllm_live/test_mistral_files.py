"""Models with Mistral's own files, beside those of the Hugging Face format and alone."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.support.likeness import noise
from tests.support.live import LiveServer, chat_body, message
from tests.support.shapes import SHAPES, circle
from tests.support.tiny_mistral import UNIT, make_mistral


def test_it_is_served_with_the_hugging_face_files(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(SHAPES, model)
    tokenizer = str(files("mistral_common").joinpath("data", "tekken_240911.json"))
    (model / "tekken.json").symlink_to(tokenizer)
    (model / "params.json").write_text("{}")
    (model / "consolidated.safetensors").write_bytes(b"not read")
    named = safe_open(model / "model.safetensors", framework="np").keys()
    index = {"metadata": {}, "weight_map": dict.fromkeys(named, "model.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    asked = ("tokenizer_mode=mistral", "config_format=mistral", "load_format=mistral")
    with LiveServer(model, *asked) as server:
        reply = server.http.post("/v1/chat/completions", json=chat_body(circle("red"), max_tokens=8))
        assert reply.status_code == 200, reply.text
        assert "circle" in reply.json()["choices"][0]["message"]["content"]
        assert "option.tokenizer_mode = mistral (--option tokenizer_mode) is not used" in server.log


@pytest.mark.parametrize("merge", [1, 2])
def test_mistrals_own_files_alone_give_the_same_answers_with_both_backends(merge: int, tmp_path: Path) -> None:
    """For images that need no resizing: mistral_common, which vLLM prepares them with, has OpenCV do that."""
    model = make_mistral(tmp_path / "model", merge=merge)
    images = [noise(UNIT * columns, UNIT * rows, rows) for columns, rows in ((8, 8), (1, 3), (5, 2))]
    chats = [
        [message("look: ", images[0])],
        [message(images[1], " and ", images[2], "?")],
        [message("what?"), message("that", role="assistant"), message(images[2])],
        [message("no image at all")],
    ]
    ours, theirs = (answers(model, chats, f"rolling_batch={backend}") for backend in ("rolling", "vllm"))
    assert ours == theirs


def answers(model: Path, chats: list[list[dict[str, Any]]], *options: str) -> list[tuple[int, str]]:
    """Tokens of each prompt, and the text."""
    found = []
    with LiveServer(
        model, "dtype=float32", 'limit_mm_per_prompt={"image": 2}', "max_model_len=400", *options
    ) as server:
        for chat in chats:
            body = {"messages": chat, "temperature": 0, "max_tokens": 16, "ignore_eos": True}
            reply = server.http.post("/v1/chat/completions", json=body)
            assert reply.status_code == 200, reply.text
            content = reply.json()["choices"][0]["message"]["content"]
            found.append((reply.json()["usage"]["prompt_tokens"], content))
    return found
