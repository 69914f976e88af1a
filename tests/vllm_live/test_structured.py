"""Structured answers, tokens' probabilities and the edges of sampling, as vLLM does them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.live import LiveServer
from tests.support.shapes import SHAPES, circle, square

WHAT = "What is this an image of?"
SCHEMA = {
    "type": "object",
    "properties": {
        "color": {"enum": ["red", "blue"]},
        "count": {"type": "integer", "maximum": 9, "minimum": 1},
    },
    "required": ["color", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    compact = 'structured_outputs_config={"backend": "guidance", "disable_any_whitespace": true}'
    with LiveServer(SHAPES, "request_priorities=true", compact) as live:
        yield live


def answer(server: LiveServer, *content: Any, **fields: Any) -> str:
    reply = server.chat(*(content or (circle("red"), WHAT)), **{"max_tokens": 64, **fields})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


def test_every_kind_of_constraint_holds(server: LiveServer) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "shape", "schema": SCHEMA, "strict": True}}
    found = json.loads(answer(server, response_format=schema, max_tokens=200))
    assert found["color"] in ("red", "blue")
    assert 1 <= found["count"] <= 9
    assert answer(server, structured_outputs={"choice": ["a blue square", "a red circle"]}) == "a red circle"
    assert re.fullmatch("[0-9]{3}-[a-c]{2}", answer(server, structured_outputs={"regex": "[0-9]{3}-[a-c]{2}"}))
    assert answer(server, structured_outputs={"grammar": 'root ::= "yes" | "no"'}) in ("yes", "no")


def test_an_answer_ends_with_its_grammar_whatever_is_said_of_its_end(server: LiveServer) -> None:
    choice = {"choice": ["a blue square", "a red circle"]}
    assert answer(server, structured_outputs=choice, ignore_eos=True) == "a red circle"
    assert answer(server, structured_outputs=choice, min_tokens=20) == "a red circle"


def test_log_probabilities_are_those_after_the_grammar(server: LiveServer) -> None:
    reply = server.chat("hello", structured_outputs={"regex": "Q{3}"}, logprobs=True, max_tokens=8)
    content = reply.json()["choices"][0]["logprobs"]["content"]
    assert "".join(token["token"] for token in content).startswith("QQQ")
    assert all(token["logprob"] > -2 for token in content)  # before the grammar a Q is as good as impossible


@pytest.mark.parametrize(
    "fields",
    [
        {"structured_outputs": {"regex": "[a-c"}},
        {"structured_outputs": {"grammar": "root ::= ( "}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "nonsense"}},
            }
        },
    ],
    ids=["regex", "grammar", "schema"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_compiled_is_a_400_before_a_stream_begins(
    server: LiveServer, fields: dict[str, Any], stream: bool
) -> None:
    reply = server.chat("hello", stream=stream, **fields)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"]
    assert "Traceback" not in error["message"]
    assert "vllm" not in error["message"].lower()


def test_greedy_answers_are_made_once_and_told_n_times(server: LiveServer) -> None:
    reply = server.chat(square("blue"), WHAT, n=3, logprobs=True, top_logprobs=2).json()
    assert [choice["message"]["content"] for choice in reply["choices"]] == ["a blue square"] * 3
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert reply["usage"]["completion_tokens"] == 3 * len(reply["choices"][0]["logprobs"]["content"])


def test_seeds_count_per_answer(server: LiveServer) -> None:
    fields = {"temperature": 2.0, "max_tokens": 12, "ignore_eos": True}

    def texts(**more: Any) -> list[str]:
        choices = server.chat("hello", **fields, **more).json()["choices"]
        return [choice["message"]["content"] for choice in choices]

    first = texts(seed=5, n=3)
    assert first == texts(seed=5, n=3)
    assert len(set(first)) > 1
    assert texts(seed=6, n=1) == [first[1]], "the second answer's seed is the next number"


def test_prompt_logprobs_and_bias_and_minimum(server: LiveServer) -> None:
    body = {"prompt": "hello", "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    logprobs = server.http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
    assert len(answer(server, "hello", min_tokens=20, max_tokens=20)) > 0
    plain = server.chat("hello", logprobs=True, max_tokens=1).json()["choices"][0]["logprobs"]["content"][0]
    ids = server.http.post("/tokenize", json={"prompt": plain["token"], "add_special_tokens": False}).json()
    banned = server.chat("hello", logit_bias={str(ids["tokens"][0]): -100}, max_tokens=1).json()
    assert banned["choices"][0]["message"]["content"] != plain["token"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"temperature": 300.0}, "temperature"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"max_tokens": 100_000}, "max_tokens"),
    ],
)
def test_what_vllm_cannot_do_is_told_in_the_clients_words(
    server: LiveServer, fields: dict[str, Any], named: str
) -> None:
    reply = server.chat("hello", **fields)
    assert reply.status_code == 400, reply.text
    assert named in reply.json()["error"]["message"]
