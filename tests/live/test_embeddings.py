"""Images sent as their embeddings, which transformers' own code makes of the same model, to a whole server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, LlavaForConditionalGeneration

from tests.support.embeddings import WHAT, Shell, answer, body, post
from tests.support.live import LiveServer, chat_body, data_url
from tests.support.saved_tensors import bomb, saved
from tests.support.shapes import SHAPES, circle, square


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with LiveServer(SHAPES, "enable_mm_embeds=true", 'limit_mm_per_prompt={"image": 3}') as live:
        yield live


@cache
def _model() -> tuple[Any, Any]:
    load: Any = AutoImageProcessor.from_pretrained
    return LlavaForConditionalGeneration.from_pretrained(SHAPES, dtype=torch.float32), load(SHAPES)


def features(image: Image.Image) -> torch.Tensor:
    """[tokens, hidden size]: what the projector gives."""
    model, processor = _model()
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        rows = model.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output[0]
    found: torch.Tensor = rows.clone()
    return found


@pytest.mark.parametrize("image", [circle("red"), square("blue"), circle("green", "black")])
def test_embeddings_are_answered_like_the_image(server: LiveServer, image: Image.Image) -> None:
    """Also its log probabilities, as far as two ways to the same rows can agree."""
    shown = {"logprobs": True, "top_logprobs": 2}
    asked = {**chat_body(image, WHAT, max_tokens=32), **shown}
    from_image, embedded = post(server, asked).json(), post(server, body(features(image), **shown)).json()
    assert embedded["choices"][0]["message"] == from_image["choices"][0]["message"]
    assert embedded["usage"]["prompt_tokens"] == from_image["usage"]["prompt_tokens"]
    pairs = zip(
        from_image["choices"][0]["logprobs"]["content"],
        embedded["choices"][0]["logprobs"]["content"],
        strict=True,
    )
    assert all(abs(left["logprob"] - right["logprob"]) < 0.02 for left, right in pairs)


def test_several_keep_their_order_and_a_batch_of_one_is_one(server: LiveServer) -> None:
    red, blue = circle("red"), square("blue")
    told = [
        answer(server, body(features(first), features(second)[None])) for first, second in ((red, blue), (blue, red))
    ]
    assert told[0] == answer(server, chat_body(red, blue, WHAT, max_tokens=32))
    assert told[1] == answer(server, chat_body(blue, red, WHAT, max_tokens=32))
    assert told[0] != told[1]


def test_the_same_embeddings_again_are_answered_the_same(server: LiveServer) -> None:
    asked = body(features(circle("yellow", "black")))
    assert [answer(server, asked) for _ in range(3)] == ["a yellow circle"] * 3


def test_several_clients_at_once_are_kept_apart(server: LiveServer) -> None:
    colors = ["red", "green", "blue", "yellow"]
    bodies = [body(features(circle(color, "black"))) for color in colors]
    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(lambda number: answer(server, bodies[number % 4]), range(16)))
    assert told == [f"a {colors[number % 4]} circle" for number in range(16)]


def test_a_stream_says_the_same(server: LiveServer) -> None:
    asked = body(features(square("blue")), stream=True)
    texts = []
    with server.http.stream("POST", "/v1/chat/completions", json=asked) as reply:
        assert reply.status_code == 200
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                delta = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
                texts.append(delta.get("content") or "")
    assert "".join(texts) == "a blue square"


def test_another_number_of_tokens_is_the_clients_own_affair(server: LiveServer) -> None:
    """A client may have cut rows that say little; what comes out is not to be foreseen, but the server lives."""
    rows = features(circle("red"))
    for some in (rows[:1], rows[:7], rows.repeat(3, 1)):
        reply = post(server, body(some))
        assert reply.status_code == 200
        without = post(server, body(rows)).json()["usage"]["prompt_tokens"] - len(rows)
        assert reply.json()["usage"]["prompt_tokens"] - without == len(some)
    assert answer(server, body(rows)) == "a red circle"


def test_they_are_counted_as_tokens(server: LiveServer) -> None:
    rows, image = features(circle("red")), circle("red")
    for asked in (body(rows), body(rows[:7])):
        counted = post(server, {"messages": asked["messages"]}, "/tokenize").json()["count"]
        assert counted == post(server, asked).json()["usage"]["prompt_tokens"]
    asked = chat_body(image, WHAT)
    tokens = post(server, {"messages": asked["messages"]}, "/tokenize").json()["tokens"]
    assert tokens == post(server, {"messages": body(rows)["messages"]}, "/tokenize").json()["tokens"]


@cache
def _refused() -> dict[str, tuple[Any, str]]:
    rows = features(circle("red"))
    tokens, hidden = rows.shape
    return {
        "hidden size": (rows[:, 1:].clone(), f"shape [{tokens}, {hidden - 1}]; this model wants [tokens, {hidden}]"),
        "double hidden size": (rows.repeat(1, 2), f"this model wants [tokens, {hidden}]"),
        "one dimension": (rows.flatten(), f"shape [{tokens * hidden}]; wanted: [tokens, hidden size]"),
        "a batch of two": (torch.stack([rows, rows]), "one part for each image"),
        "not finite": (torch.full_like(rows, torch.nan), "not finite"),
        "integers": (torch.ones(tokens, hidden, dtype=torch.int32), "'int32'"),
        "sparse": (rows.to_sparse(), "not a dense tensor"),
        "expanded": (torch.ones(1, 1).expand(2**30, hidden), "strides [0, 0]"),
        "a bomb": (bomb(), "compressed"),
        "code": (saved(Shell()), "not a dense tensor"),
        "cut short": (saved(rows)[:-1], "cut short"),
        "a grid": ({"image_embeds": rows, "image_grid_thw": torch.tensor([1, 8, 8])}, "no image_grid_thw"),
        "more than the context": (torch.ones(20_000, hidden, dtype=torch.float16), "tokens for one image"),
    }  # fmt: skip


@pytest.mark.parametrize("name", _refused())
def test_what_the_model_does_not_take_is_refused_and_the_server_lives(server: LiveServer, name: str) -> None:
    thing, reason = _refused()[name]
    for fields in ({}, {"stream": True}):
        reply = post(server, body(thing, **fields))
        assert reply.status_code == 400, reply.text
        assert reason in reply.json()["error"]["message"]
    assert post(server, {"messages": body(thing)["messages"]}, "/tokenize").status_code == 400
    assert answer(server, body(features(circle("red")))) == "a red circle"
    assert server.metrics()["lmi_engine_restarts_total"] == 0


def test_other_bad_parts_are_refused(server: LiveServer) -> None:
    rows = features(circle("red"))
    wrong = [
        ({"type": "image_embeds", "image_embeds": "%%%"}, "base64"),
        ({"type": "image_embeds"}, "image_embeds is missing"),
        ({"type": "image_embeds", "image_embeds": None, "uuid": "a"}, "image_embeds is missing"),
        ({"type": "image_url", "image_url": {"url": data_url(circle("red"))}}, "not both"),
    ]
    for bad, reason in wrong:
        asked = body(rows)
        asked["messages"][0]["content"].insert(0, bad)
        reply = post(server, asked)
        assert reply.status_code == 400
        assert reason in reply.json()["error"]["message"]
    reply = post(server, body(rows, rows, rows, rows))
    assert reply.status_code == 400
    assert "option.limit_mm_per_prompt" in reply.json()["error"]["message"]


def test_too_many_tokens_together_are_refused_as_of_images(server: LiveServer) -> None:
    context = server.http.get("/v1/models").json()["data"][0]["max_model_len"]
    rows = features(circle("red"))
    some = rows.repeat(context // 3 // len(rows) + 1, 1).half()
    reply = post(server, body(some, some, some))
    assert reply.status_code == 400
    assert "this model's context" in reply.json()["error"]["message"]
    assert answer(server, chat_body("What is this?", max_tokens=4)) is not None


def test_text_and_images_are_answered_after_all_that(server: LiveServer) -> None:
    assert answer(server, chat_body(circle("red"), WHAT, max_tokens=32)) == "a red circle"
    assert post(server, chat_body("hello")).status_code == 200
    assert server.http.get("/ping").status_code == 200


def test_without_the_option_nothing_of_it_is_read(shapes_server: LiveServer) -> None:
    for thing in (features(circle("red")), b"not a tensor"):
        reply = post(shapes_server, body(thing))
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "image_embeds"
        assert "option.enable_mm_embeds=true" in reply.json()["error"]["message"]
    assert answer(shapes_server, chat_body(circle("red"), WHAT, max_tokens=32)) == "a red circle"
