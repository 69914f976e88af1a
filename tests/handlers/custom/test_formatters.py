"""A model whose `model.py` has no handler, but formatters around the engine's, in the manner of LMI."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from handlers.custom import djl
from handlers.custom.messages import Start
from handlers.custom.worker import formatting
from tests.support.scripted_server import ServerProcess
from tests.support.shapes import SHAPES

CODE = """
from djl_python.input_parser import input_formatter
from djl_python.output_formatter import output_formatter
import json, os

twos = []


def count_two():
    twos.append(1)
    return len(twos)


@input_formatter
def read(payload: dict, **kwargs) -> dict:
    if payload.get("trouble") == "raise":
        raise ValueError("a secret detail")
    if payload.get("trouble") == "type":
        return "text"
    if payload.get("trouble") == "exit":
        os._exit(1)
    if payload.get("trouble") == "older signature":
        return payload.get_as_json()
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
        if choice.get("delta", {}).get("content") == "two" and count_two() == 2:
            raise KeyError("a secret detail")
        return {"piece": choice["delta"].get("content") if "delta" in choice else choice["text"]}
    choice = response.choices[0]
    if hasattr(choice, "message"):
        if choice.message.content == "one":
            raise KeyError("a secret detail")
        return {"chat": choice.message.content, "tokens": response.usage.completion_tokens}
    return f"completion: {choice.text}"
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    path = tmp_path_factory.mktemp("formatted") / "model"
    path.mkdir()
    (path / "model.py").write_text(CODE)
    with ServerProcess(path) as running:
        yield running.ready()


def ask(server: ServerProcess, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/invocations", json=body, timeout=30)


def saying(text: str, tokens: int = 1) -> str:
    """A question that the backend answers so."""
    return json.dumps({"say": text, "tokens": tokens})


def test_requests_and_replies_go_through_the_formatters(server: ServerProcess) -> None:
    assert ask(server, question=saying("red ", 2)).json() == {"chat": "red red ", "tokens": 2}
    assert "formatters in model.py" in server.log


def test_the_lmi_body_is_formatted_from_a_completion(server: ServerProcess) -> None:
    reply = ask(server, inputs=saying("blue"))
    assert reply.text == "completion: blue"
    assert reply.headers["content-type"] == "application/json"


def test_each_event_of_a_stream_is_formatted(server: ServerProcess) -> None:
    for asked in ({"question": saying("á\n\n", 3)}, {"inputs": saying("á\n\n", 3)}):
        reply = ask(server, **asked, stream=True)
        assert reply.headers["content-type"] == "application/jsonlines"
        *lines, end = reply.text.splitlines()
        assert end == "end"
        assert "".join(json.loads(line)["piece"] or "" for line in lines) == "á\n\n" * 3


def test_the_tokenizer_is_there_for_formatters_that_name_it() -> None:
    @djl.input_formatter
    def count(payload: dict[str, Any], tokenizer: Any = None, **more: Any) -> dict[str, Any]:
        return {"inputs": str(len(tokenizer(payload["inputs"])["input_ids"]))}

    formats = formatting({"count": count}, Start(str(SHAPES), "model.py", None, {"model_id": str(SHAPES)}))
    inputs = djl.Input()
    inputs.properties["formatter"] = "input"
    inputs.content.add("data", b'{"inputs": "red circle"}')
    assert int(formats(inputs)["inputs"]) >= 2


@pytest.mark.parametrize(
    ("trouble", "status"), [("raise", 424), ("type", 424), ("older signature", 424), ("exit", 500)]
)
def test_an_input_formatter_that_fails_fails_its_request_alone(
    server: ServerProcess, trouble: str, status: int
) -> None:
    reply = ask(server, inputs="x", trouble=trouble)
    assert reply.status_code == status
    assert "secret" not in reply.text
    assert ask(server, inputs="x").status_code == 200


def test_an_output_formatter_that_fails_is_a_424(server: ServerProcess) -> None:
    reply = ask(server, question=saying("one"))
    assert reply.status_code == 424
    assert "KeyError" in reply.text
    assert "secret" not in reply.text
    *lines, last = ask(server, question=saying("two", 3), stream=True).text.splitlines()
    assert [json.loads(line)["piece"] for line in lines] == ["two"] * len(lines)
    assert json.loads(last)["code"] == 424


def test_two_formatters_of_a_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.py").write_text(CODE + "\n\n@input_formatter\ndef another(payload): return payload\n")
    with ServerProcess(tmp_path) as server:
        server.wait_for("two functions with @input_formatter")
        assert server.wait() == 1
