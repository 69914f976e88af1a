"""A model that has Mistral's own files beside those of the Hugging Face format, asked for as LMI's users do."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path

from safetensors import safe_open

from tests.live import LiveServer, chat_body
from tests.test_shapes_live import SHAPES, circle


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
