"""A model whose `model.py` has no handler, but formatters around the engine's, in the manner of LMI."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from handlers.custom import djl
from handlers.custom.messages import Start
from handlers.custom.worker import formatting
from tests.live import LiveServer, message
from tests.test_shapes_live import SHAPES, circle

WHAT = "What is this an image of?"

CODE = """
from djl_python.input_parser import input_formatter
from djl_python.output_formatter import output_formatter
import json, os, time


@input_formatter
def read(payload: dict, **kwargs) -> dict:
    if payload.get("trouble") == "raise":
        raise ValueError("a secret detail")
    if payload.get("trouble") == "type":
        return "text"
    if payload.get("trouble") == "exit":
        os._exit(1)
    if "question" in payload:
        payload["messages"] = [{"role": "user", "content": payload.pop("question")}]
        payload["temperature"] = 0
    return payload


@output_formatter
def write(response):
    if isinstance(response, str):
        data = response.removeprefix("data: ").strip()
        if data == "[DONE]":
            return "end\\n"
        choice = json.loads(data)["choices"][0]
        return {"piece": choice["delta"].get("content") if "delta" in choice else choice["text"]}
    choice = response.choices[0]
    if hasattr(choice, "message"):
        if choice.message.content == "one":
            raise KeyError("a secret detail")
        return {"chat": choice.message.content, "tokens": response.usage.completion_tokens}
    return f"completion: {choice.text}"
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    path = tmp_path_factory.mktemp("formatted")
    for file in SHAPES.iterdir():
        if file.is_file() and file.suffix != ".py":
            shutil.copy(file, path)
    (path / "model.py").write_text(CODE)
    with LiveServer(path) as live:
        yield live


def ask(server: LiveServer, **body: Any) -> httpx.Response:
    return server.http.post("/invocations", json=body)


def test_requests_and_replies_go_through_the_formatters(server: LiveServer) -> None:
    reply = ask(server, question=message(circle("red"), WHAT)["content"])
    assert reply.json() == {"chat": "a red circle", "tokens": reply.json()["tokens"]}
    assert reply.json()["tokens"] > 1
    assert "formatters in model.py" in server.log


def test_the_lmi_body_is_formatted_from_a_completion(server: LiveServer) -> None:
    reply = ask(server, inputs="<|user|>What is this an image of?</s><|assistant|>")
    assert reply.text == "completion: I see no image."
    assert reply.headers["content-type"] == "application/json"


def test_each_event_of_a_stream_is_formatted(server: LiveServer) -> None:
    question = message(circle("red"), WHAT)["content"]
    reply = ask(server, question=question, stream=True)
    assert reply.headers["content-type"] == "application/jsonlines"
    *lines, end = reply.text.splitlines()
    assert end == "end"
    assert "".join(json.loads(line)["piece"] or "" for line in lines) == "a red circle"
    reply = ask(server, inputs="<|user|>Describe this image.</s><|assistant|>", stream=True)
    *lines, end = reply.text.splitlines()
    assert "".join(json.loads(line)["piece"] for line in lines) == "I see no image."


def test_the_tokenizer_is_there_for_formatters_that_name_it() -> None:
    @djl.input_formatter
    def count(payload: dict[str, Any], tokenizer: Any = None, **more: Any) -> dict[str, Any]:
        return {"inputs": str(len(tokenizer(payload["inputs"])["input_ids"]))}

    formats = formatting({"count": count}, Start(str(SHAPES), "model.py", None, {"model_id": str(SHAPES)}))
    inputs = djl.Input()
    inputs.properties["formatter"] = "input"
    inputs.content.add("data", b'{"inputs": "red circle"}')
    assert int(formats(inputs)["inputs"]) >= 2


@pytest.mark.parametrize(("trouble", "status"), [("raise", 424), ("type", 424), ("exit", 500)])
def test_an_input_formatter_that_fails_fails_its_request_alone(
    server: LiveServer, trouble: str, status: int
) -> None:
    reply = ask(server, inputs="x", trouble=trouble)
    assert reply.status_code == status
    assert "secret" not in reply.text
    assert ask(server, inputs="x").status_code == 200


def test_an_output_formatter_that_fails_is_a_424(server: LiveServer) -> None:
    question = message(circle("red"), "How many shapes are there?")["content"]
    reply = ask(server, question=question)
    assert reply.status_code == 424
    assert "KeyError" in reply.text
    assert "secret" not in reply.text


def test_two_formatters_of_a_kind_are_refused(tmp_path: Path) -> None:
    shutil.copy(SHAPES / "config.json", tmp_path)
    (tmp_path / "model.py").write_text(CODE + "\n\n@input_formatter\ndef another(payload): return payload\n")
    live = LiveServer(tmp_path, ready=False)
    try:
        live.wait_for("two functions with @input_formatter")
        assert live.wait() == 1
    finally:
        live.kill()
