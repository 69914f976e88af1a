"""Whole servers of the Qwen-VL families, with either backend: the answers are those of transformers.

Embeddings for a model that also wants to know how an image's patches stand are here, too: vLLM trusts what it is told.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from tests.support.embeddings import answer, body, post
from tests.support.likeness import noise
from tests.support.live import LiveServer, chat_body, message
from tests.support.saved_tensors import encoded
from tests.support.tiny_qwen_vl import FAMILIES, HIDDEN, IMAGE, make_qwen_vl

SHOWN = {"logprobs": True, "max_tokens": 8}
LIMITS = '{"min_pixels": 8192, "max_pixels": 16384}'
"""Other ones than the model's own files have."""


@dataclass
class Served:
    """A server, and transformers' own code for the model behind it. row_size: of the vision tower's rows."""

    http: LiveServer
    path: Path
    row_size: int

    @cached_property
    def model(self) -> Any:
        return AutoModelForImageTextToText.from_pretrained(self.path, dtype=torch.float32)

    @cached_property
    def processor(self) -> Any:
        load: Any = AutoImageProcessor.from_pretrained
        return load(self.path, min_pixels=8192, max_pixels=16384)

    def prompt(self, messages: list[dict[str, Any]], *images: Image.Image) -> list[int]:
        """By the template, with as many placeholders for each image as it has tokens."""
        tokenizer = AutoTokenizer.from_pretrained(self.path)
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        waiting = iter(images)
        ids: list[int] = []
        for token in tokenizer(text).input_ids:
            count = 1
            if token == IMAGE:
                image = next(waiting)
                count = self.processor.get_number_of_image_patches(image.height, image.width) // 4
            ids += [token] * count
        return ids

    @torch.inference_mode()
    def generate(self, prompt: list[int], *images: Image.Image) -> list[int]:
        ids = torch.tensor([prompt])
        extra = {}
        if images:
            pixels = self.processor(list(images), return_tensors="pt")
            extra = {**pixels, "mm_token_type_ids": (ids == IMAGE).int()}
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            **extra,
        )
        return list(out[0, len(prompt) :].tolist())

    @torch.inference_mode()
    def features(self, image: Image.Image) -> dict[str, torch.Tensor]:
        prepared = self.processor(image, return_tensors="pt")
        grid = prepared["image_grid_thw"]
        out = self.model.model.get_image_features(prepared["pixel_values"], grid, return_dict=True)
        layers = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
        return {"image_embeds": torch.cat([layer[0] for layer in layers], dim=1), "image_grid_thw": grid}


@pytest.fixture(scope="module", params=FAMILIES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    path = make_qwen_vl(tmp_path_factory.mktemp("models") / "tiny", request.param)
    if request.param == "qwen2_5_vl":
        # as on the hub, where it is 1.05: for greedy answers, too
        defaults = path / "generation_config.json"
        defaults.write_text(json.dumps(json.loads(defaults.read_text()) | {"repetition_penalty": 1.3}))
    options = (
        "enable_mm_embeds=true", 'limit_mm_per_prompt={"image": 3}', "dtype=fp32", f"mm_processor_kwargs={LIMITS}",
    )  # fmt: skip
    with LiveServer(path, *options) as live:
        yield Served(live, path, HIDDEN * (4 if request.param == "qwen3_vl" else 1))


def scores(reply: dict[str, Any]) -> list[tuple[str, float]]:
    return [(item["token"], item["logprob"]) for item in reply["choices"][0]["logprobs"]["content"]]


def test_chats_are_answered_as_transformers_answers_them(served: Served) -> None:
    wide, high, black = noise(300, 10), noise(60, 180), Image.new("RGB", (50, 50))
    chats: list[tuple[list[dict[str, Any]], list[Image.Image]]] = [
        ([message("What is this?", wide)], [wide]),
        ([message(high, black, "Which is black?")], [high, black]),
        ([message("Hello")], []),
        (
            [
                message(black, high, "One?"),
                {"role": "assistant", "content": "Yes."},
                message("And now?", wide),
            ],
            [black, high, wide],
        ),
    ]
    for messages, images in chats:
        wanted = served.prompt([{**turn, "content": _shown(turn["content"])} for turn in messages], *images)
        asked = {
            "messages": messages, "temperature": 0, "max_tokens": 12, "ignore_eos": True,
            "return_token_ids": True,
        }  # fmt: skip
        reply = post(served.http, asked).json()
        assert reply["prompt_token_ids"] == wanted
        assert reply["choices"][0]["token_ids"] == served.generate(wanted, *images)


def _shown(content: Any) -> Any:
    if isinstance(content, str):
        return content
    return [{"type": "image"} if part["type"] == "image_url" else part for part in content]


def test_an_image_that_is_too_long_is_refused(served: Served) -> None:
    reply = served.http.chat("What?", noise(2, 402))
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]
    assert served.http.chat("What?", noise(2, 400)).status_code == 200
    assert served.http.metrics()["lmi_engine_restarts_total"] == 0


def test_rows_and_their_grid_are_answered_like_the_image(served: Served) -> None:
    wide, high = noise(120, 60), noise(60, 180)
    sent = [served.features(image) for image in (wide, high)]
    assert len({one["image_embeds"].shape for one in sent}) == 2
    from_image = post(served.http, chat_body(wide, high, "What?", **SHOWN)).json()
    embedded = post(served.http, body(*sent, text="What?", **SHOWN)).json()
    assert embedded["usage"]["prompt_tokens"] == from_image["usage"]["prompt_tokens"]
    pairs = list(zip(scores(from_image), scores(embedded), strict=True))
    assert all(left[0] == right[0] and abs(left[1] - right[1]) < 0.01 for left, right in pairs)
    turned = post(served.http, body(*sent[::-1], text="What?", **SHOWN)).json()
    assert scores(turned) != scores(embedded)


def _rows(served: Served, count: int = 12) -> torch.Tensor:
    return torch.randn(count, served.row_size, generator=torch.Generator().manual_seed(7))


def test_every_grid_that_fits_its_rows_is_answered(served: Served) -> None:
    rows, seen = _rows(served), set()
    for grid in ([1, 6, 8], [1, 2, 24], [1, 24, 2]):
        sent = {"image_embeds": rows, "image_grid_thw": torch.tensor(grid)}
        told = scores(post(served.http, body(sent, **SHOWN)).json())
        seen.add(tuple(told))
        written = body(**SHOWN)
        value = {"image_embeds": encoded(rows), "image_grid_thw": grid}
        written["messages"][0]["content"].insert(0, {"type": "image_embeds", "image_embeds": value})
        assert scores(post(served.http, written).json()) == told
    assert len(seen) == 3, "the same rows mean something else where they stand otherwise"


def test_a_grid_that_does_not_fit_is_refused_and_the_engine_lives(served: Served) -> None:
    """Sent on to vLLM, most of these would end the engine's process."""
    rows, fitting = _rows(served), [1, 6, 8]
    fits = {"image_embeds": rows, "image_grid_thw": torch.tensor(fitting)}
    for some, grid, reason in (
        (rows, None, "wants image_grid_thw beside"),
        (rows, [1, 6, 10], "which is 15 tokens; image_embeds has 12 rows"),
        (rows[:11], fitting, "which is 12 tokens; image_embeds has 11 rows"),
        (rows, [1, 3, 16], "must be multiples of 2"),
        (rows, [1, 2**40, 2**40], "image_embeds has 12 rows"),
        (rows, [2, 4, 6], "an image has 1 frame"),
        (rows, [0, 6, 8], "numbers from 1"),
        (rows[:, 1:].contiguous(), fitting, f"wants [tokens, {served.row_size}]"),
        (rows.repeat(1, 2), fitting, f"wants [tokens, {served.row_size}]"),
        (rows.repeat(2, 1), fitting, "image_embeds has 24 rows"),
    ):
        sent = some if grid is None else {"image_embeds": some, "image_grid_thw": torch.tensor(grid)}
        for things in ([sent], [fits, sent]):
            reply = post(served.http, body(*things))
            assert reply.status_code == 400
            assert f"image {len(things) - 1}: " in reply.json()["error"]["message"]
            assert reason in reply.json()["error"]["message"]
    assert answer(served.http, body(fits)) == answer(served.http, body(fits))
    assert served.http.metrics()["lmi_engine_restarts_total"] == 0
