"""Structured answers of the model in the repository: well formed, and right."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest
from PIL import Image
from pydantic import BaseModel, Field

from tests.support.live import LiveServer, chat_body, data_url
from tests.support.shapes import SHAPES

COLORS = ["red", "green", "blue", "yellow", "orange", "purple", "black", "white"]
KINDS = ["circle", "square", "triangle", "star", "cross"]


class Shape(BaseModel):
    color: Literal["red", "green", "blue", "yellow", "orange", "purple", "black", "white"]
    shape: Literal["circle", "square", "triangle", "star", "cross"]


class Drawing(BaseModel):
    shapes: list[Shape] = Field(min_length=1, max_length=3)


SHAPE = {
    "type": "object",
    "properties": {"color": {"enum": COLORS}, "shape": {"enum": KINDS}},
    "required": ["color", "shape"],
    "additionalProperties": False,
}
DRAWING = {
    "type": "object",
    "properties": {"shapes": {"type": "array", "items": SHAPE, "minItems": 1, "maxItems": 3}},
    "required": ["shapes"],
    "additionalProperties": False,
}
COUNTED = {
    "type": "object",
    "properties": {
        "first": SHAPE,
        "count": {"type": "integer", "minimum": 1, "maximum": 3},
        "colors": {"type": "array", "items": {"enum": COLORS}, "minItems": 1, "maxItems": 3},
    },
    "required": ["first", "count", "colors"],
}


def drawing(name: str) -> Image.Image:
    return Image.open(next((SHAPES / "pictures").glob(f"{name}.*"))).convert("RGB")


def seen(name: str) -> list[dict[str, str]]:
    """What an image shows, by its file's name."""
    return [dict(zip(("color", "shape"), one.split("-"), strict=True)) for one in name.split("-and-")]


def json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


@pytest.fixture(scope="module")
def server(shapes_server: LiveServer) -> LiveServer:
    return shapes_server


def choice(reply: httpx.Response) -> tuple[str, str]:
    assert reply.status_code == 200, reply.text
    first = reply.json()["choices"][0]
    return first["message"]["content"], first["finish_reason"]


NAMES = ["red-circle", "orange-star-and-blue-square", "red-circle-and-blue-square-and-green-star"]


@pytest.mark.parametrize("name", NAMES)
def test_a_json_object_extracted_from_an_image(server: LiveServer, name: str) -> None:
    text, finish = choice(
        server.chat("Answer in JSON.", drawing(name), response_format=json_schema(DRAWING), max_tokens=100)
    )
    assert finish == "stop"
    assert json.loads(text) == {"shapes": seen(name)}


@pytest.mark.parametrize("name", NAMES)
def test_the_same_streamed(server: LiveServer, name: str) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    parts: list[str] = []
    finish = None
    for chunk in client.chat.completions.create(
        **chat_body("Answer in JSON.", drawing(name), max_tokens=100),  # type: ignore[arg-type]
        model="shapes",
        response_format=json_schema(DRAWING),
        stream=True,
    ):
        parts.append(chunk.choices[0].delta.content or "")
        finish = chunk.choices[0].finish_reason or finish
    assert finish == "stop"
    assert sum(1 for part in parts if part) > 1
    assert json.loads("".join(parts)) == {"shapes": seen(name)}


def test_a_pydantic_model_as_openais_client_parses_it(server: LiveServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    reply = client.chat.completions.parse(
        **chat_body("Answer in JSON.", drawing("orange-star-and-blue-square"), max_tokens=100),  # type: ignore[arg-type]
        model="shapes",
        response_format=Drawing,
    )
    parsed = reply.choices[0].message.parsed
    assert parsed is not None
    assert [shape.model_dump() for shape in parsed.shapes] == seen("orange-star-and-blue-square")


@pytest.mark.parametrize("route", ["/generate", "/generate_stream"])
@pytest.mark.parametrize("kind", ["json", "json_object", "json_schema"])
def test_tgis_example_in_kind(server: LiveServer, route: str, kind: str) -> None:
    """An object with bounded integers and arrays. The model has not learnt to write this form: what it must say is
    in the schema, what it must know is the first shape."""
    value: Any = {"name": "drawing", "schema": COUNTED} if kind == "json_schema" else COUNTED
    inputs = f"<s><|user|>![]({data_url(drawing('red-circle'))})Answer in JSON.</s><|assistant|>"
    body = {
        "inputs": inputs,
        "parameters": {"grammar": {"type": kind, "value": value}, "max_new_tokens": 300, "details": True},
    }
    reply = server.http.post(route, json=body)
    assert reply.status_code == 200, reply.text
    if route == "/generate":
        whole = reply.json()
    else:
        lines = [line.removeprefix("data:") for line in reply.text.splitlines() if line.startswith("data:")]
        whole = json.loads(lines[-1])
        assert "".join(json.loads(line)["token"]["text"] for line in lines[:-1]) in (
            whole["generated_text"],
            whole["generated_text"] + "</s>",
        )
    answer = json.loads(whole["generated_text"])
    assert whole["details"]["finish_reason"] == "eos_token"
    jsonschema.validate(answer, COUNTED)
    assert answer["first"] == {"color": "red", "shape": "circle"}
    assert type(answer["count"]) is int


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        (
            {"structured_outputs": {"choice": ["a blue square", "a red circle", "a red square"]}},
            "a red circle",
        ),
        ({"guided_choice": ["a green circle", "a red circle"]}, "a red circle"),
        ({"structured_outputs": {"regex": "(a|an|one) [a-z]+ [a-z]{6}"}}, "a red circle"),
        ({"guided_regex": "[a-z]+ (green|red) circle"}, "a red circle"),
        ({"response_format": {"type": "regex", "value": "a (blue|red) (square|circle)"}}, "a red circle"),
        (
            {"guided_grammar": 'root ::= "a " color " " kind\ncolor ::= "blue" | "red"\nkind ::= "circle" | "star"'},
            "a red circle",
        ),
        ({"structured_outputs": {"grammar": 'start: "a " /blue|red/ " circle"'}}, "a red circle"),
        (
            {
                "structured_outputs": {"choice": ["one", "two", "three"]},
                "question": "How many shapes are there?",
            },
            "one",
        ),
    ],
)
def test_the_answer_is_the_right_one_among_those_allowed(server: LiveServer, fields: dict[str, Any], want: str) -> None:
    question = fields.pop("question", "What is this an image of?")
    assert choice(server.chat(question, drawing("red-circle"), **fields)) == (want, "stop")


def test_json_mode(server: LiveServer) -> None:
    for fields in (
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json_object": True}},
    ):
        text, finish = choice(server.chat("Answer in JSON.", drawing("red-circle"), max_tokens=60, **fields))
        assert (json.loads(text), finish) == ({"shapes": seen("red-circle")}, "stop")


def test_drawn_answers_validate_each(server: LiveServer) -> None:
    reply = server.chat(
        "What is this?", drawing("red-circle"), response_format=json_schema(COUNTED), temperature=1.5, n=6, seed=7,
        max_tokens=300,
    ).json()  # fmt: skip
    texts = [one["message"]["content"] for one in reply["choices"] if one["finish_reason"] == "stop"]
    assert len(set(texts)) > 1
    for text in texts:
        jsonschema.validate(json.loads(text), COUNTED)


def test_an_answer_cut_short_says_so(server: LiveServer) -> None:
    text, finish = choice(
        server.chat("Answer in JSON.", drawing("red-circle"), response_format=json_schema(DRAWING), max_tokens=6)
    )
    assert finish == "length"
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)


def test_a_stop_string_ends_a_constrained_answer(server: LiveServer) -> None:
    asked: dict[str, Any] = {"structured_outputs": {"regex": r"[abc]{2}@x\.com[0-9]{5}"}, "stop": [".com"]}
    text, finish = choice(server.chat("Hello!", **asked))
    assert (bool(re.fullmatch("[abc]{2}@x", text)), finish) == (True, "stop")
    text, finish = choice(server.chat("Hello!", **asked, include_stop_str_in_output=True))
    assert re.fullmatch(r"[abc]{2}@x\.com", text)


def test_log_probabilities_have_a_place_for_each_token(server: LiveServer) -> None:
    reply = server.chat("Hello!", structured_outputs={"regex": "[0-9]{3}"}, logprobs=True, top_logprobs=2).json()
    content = reply["choices"][0]["logprobs"]["content"]
    assert len(content) == reply["usage"]["completion_tokens"]
    assert re.fullmatch("[0-9]{3}", reply["choices"][0]["message"]["content"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "object", "properties": {"a": {"not": {}}}}, "not"),
        ({"$ref": "https://example.com/schema.json"}, "example.com"),
        ({"type": "string", "pattern": "(?<!x)y"}, "look"),
        (
            {"allOf": [{"type": "string", "pattern": f"(.*{chr(97 + i)}){{10}}"} for i in range(20)]},
            "compil",
        ),
    ],
)
def test_what_cannot_be_compiled_is_a_400_before_any_token(
    server: LiveServer, schema: dict[str, Any], says: str, stream: bool
) -> None:
    before = server.metrics()["process_resident_memory_bytes"]
    reply = server.chat("Hello!", response_format=json_schema(schema), stream=stream)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["param"], error["type"]) == ("response_format", "invalid_request_error")
    assert says in error["message"]
    assert server.metrics()["process_resident_memory_bytes"] - before < 100 << 20


def test_what_goes_wrong_later_is_the_clients_fault_too(server: LiveServer) -> None:
    """A condition beside the grammar that leaves it no token."""
    reply = server.chat("Hello!", structured_outputs={"regex": "[0-9]{3}"}, allowed_token_ids=[3, 4, 5])
    assert reply.status_code == 400, reply.text
    assert "no token" in reply.json()["error"]["message"]
    digits = [str(number) for number in range(10)]
    reply = server.chat("Hello!", structured_outputs={"regex": "[0-9]"}, bad_words=digits)
    assert reply.status_code == 400, reply.text
    repeating = {"structured_outputs": {"regex": "(ab){40}"}, "no_repeat_ngram_size": 1, "max_tokens": 100}
    assert server.chat("Hello!", **repeating).status_code == 400
    stream = server.chat("Hello!", **repeating, stream=True)
    assert stream.status_code == 200
    *_, last = stream.text.strip().split("\n\n")
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["type"], "no token" in error["message"]) == ("invalid_request_error", True)


def test_free_and_constrained_requests_share_the_batch(server: LiveServer) -> None:
    """Each gets what it gets alone, while hostile schemas are being refused."""
    hostile = {"allOf": [{"type": "string", "pattern": f"(.*{chr(97 + i)}){{11}}"} for i in range(20)]}
    asked: list[tuple[str, dict[str, Any]]] = [
        ("red-circle", {}),
        ("orange-star-and-blue-square", {"response_format": json_schema(DRAWING), "max_tokens": 100}),
        ("black-cross", {"structured_outputs": {"choice": ["a black cross", "a white cross"]}}),
        ("yellow-star", {}),
    ]
    want = [
        "a red circle", json.dumps({"shapes": seen("orange-star-and-blue-square")}), "a black cross", "a yellow star"
    ]  # fmt: skip

    def ask(number: int) -> tuple[str, str]:
        name, fields = asked[number % 4]
        question = "Answer in JSON." if "response_format" in fields else "What is this an image of?"
        return choice(server.chat(question, drawing(name), **fields))

    def attack(number: int) -> int:
        schema = {**hostile, "title": str(number)}
        return server.chat("Hello!", response_format=json_schema(schema)).status_code

    with ThreadPoolExecutor(18) as threads:
        attacks = [threads.submit(attack, number) for number in range(4)]
        answers = list(threads.map(ask, range(24)))
        assert {future.result() for future in attacks} == {400}
    assert answers == [(want[number % 4], "stop") for number in range(24)]
