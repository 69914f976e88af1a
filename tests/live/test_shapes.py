"""The model in the repository, served as a newcomer serves it: the answers must be right, not only well formed.

The images are drawn here with plain Pillow calls, by none of the world's own renderers.
"""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from PIL import Image

from tests.support.live import LiveServer, data_url, message
from tests.support.shapes import IMAGES, SHAPES, circle, square


@pytest.fixture(scope="module")
def server(shapes_server: LiveServer) -> LiveServer:
    return shapes_server


@pytest.fixture(scope="module")
def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def ask(client: openai.OpenAI, *content: str | Image.Image, history: list[dict] | None = None) -> str:
    reply = client.chat.completions.create(
        model="shapes", messages=[*(history or []), message(*content)], temperature=0, max_tokens=64
    )
    return reply.choices[0].message.content or ""


@pytest.mark.parametrize("name", sorted(path.name for path in IMAGES.iterdir()))
def test_the_images_in_the_repository_are_named_after_the_answer(client: openai.OpenAI, name: str) -> None:
    words = Path(name).stem.replace("-and-", " and ").replace("-", " ")
    want = " and ".join(f"{'an' if part[0] in 'aeiou' else 'a'} {part}" for part in words.split(" and "))
    assert ask(client, Image.open(IMAGES / name).convert("RGB"), "What is this an image of?") == want


@pytest.mark.parametrize("color", ["red", "green", "blue", "yellow", "black"])
def test_the_answer_follows_the_pixels(client: openai.OpenAI, color: str) -> None:
    background = "white" if color != "yellow" else "black"
    assert ask(client, circle(color, background), "What is this an image of?") == f"a {color} circle"


def test_every_phrasing_of_the_vision_documentation_is_understood(client: openai.OpenAI) -> None:
    for question in (
        "What's in this image?",
        "Whats in this image?",
        "What is the content of this image?",
        "Describe this image.",
    ):
        assert ask(client, square("blue"), question) == "a blue square", question


def test_which_image_comes_first_matters(client: openai.OpenAI) -> None:
    first, second = circle("red"), square("blue")
    question = "What is in the second image?"
    assert ask(client, first, second, question) == "a blue square"
    assert ask(client, second, first, question) == "a red circle"


def test_earlier_turns_are_remembered(client: openai.OpenAI) -> None:
    history = [
        message(square("green"), "What is this an image of?"),
        message("a green square", role="assistant"),
    ]
    assert ask(client, "How many shapes are there?", history=history) == "one"
    assert ask(client, "What's the color of this image?", history=history) == "white"


def test_json_when_asked_for(client: openai.OpenAI) -> None:
    answer = ask(client, circle("red"), "What is this an image of? Answer in JSON.")
    assert json.loads(answer) == {"shapes": [{"color": "red", "shape": "circle"}]}


def test_without_an_image_it_says_so(client: openai.OpenAI) -> None:
    assert ask(client, "What is this an image of?") == "I see no image."


def test_invocations_streamed_and_whole_and_in_lmis_own_words(server: LiveServer) -> None:
    body = {"messages": [message(circle("red"), "What is this an image of?")], "temperature": 0}
    whole = server.http.post("/invocations", json=body).json()
    assert whole["choices"][0]["message"]["content"] == "a red circle"
    assert whole["choices"][0]["finish_reason"] == "stop"
    text = ""
    with server.http.stream("POST", "/invocations", json={**body, "stream": True}) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
    assert text == "a red circle"
    lmi = server.http.post("/invocations", json={"inputs": f"![]({data_url(circle('red'))}) hello"}).json()
    assert isinstance(lmi["generated_text"], str)


def test_right_answers_while_many_share_the_batch(client: openai.OpenAI) -> None:
    colors = ["red", "green", "blue", "black"] * 8
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda color: ask(client, circle(color), "What is this an image of?"), colors))
    assert answers == [f"a {color} circle" for color in colors]


def test_the_commands_that_make_serve_prints_can_be_pasted(server: LiveServer) -> None:
    port = server.url.rsplit(":", 1)[1]
    printed = subprocess.run(
        ["sh", str(SHAPES.parent / "curl.sh"), port], capture_output=True, text=True, check=True
    ).stdout
    commands = [part.split("\nJSON\n")[0] + "\nJSON\n" for part in printed.split("curl ")[1:]]
    assert len(commands) == 2
    for command in commands:
        result = subprocess.run(["sh", "-c", "curl " + command], capture_output=True, text=True, timeout=60)
        assert "orange" in result.stdout, result.stdout + result.stderr
        assert "square" in result.stdout
