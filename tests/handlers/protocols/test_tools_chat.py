"""Chat with tools and reasoning: what clients send, the exact bytes that they get, and calls forced by grammar."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from container.check import describe
from engine.machine import Device, Machine
from handlers.build import build_engine
from handlers.deltas import Delta
from handlers.errors import InvalidRequest
from handlers.parsers.base import AnswerFormats
from handlers.parsers.select import answer_formats
from handlers.prompts.renderer import PromptRenderer
from handlers.request import ChatPrompt
from properties.configuration import resolve
from properties.problem import ConfigurationError
from tests.support.backend import VLLM
from tests.support.live import LiveServer
from tests.support.models import make_tokenizer
from tests.support.scripted import ScriptedBackend, Step, chat, incoming, said, service
from tests.support.scripted_server import ServerProcess
from tests.support.shapes import SHAPES
from tests.support.tools import DRAW, HERMES, TOOLS, added_up, answered, events, read, tool, whole

POINT = {**DRAW, "$defs": {"point": {"enum": ["here", "there"]}}, "$id": "https://example.org/x"}
CALL = '<tool_call>{"name": "draw", "arguments": {"color": "red"}}</tool_call>'


# What is asked for.


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [1]}, "tools[0]"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [tool("")]}, "tools[0].function.name"),
        ({"tools": [tool("two words")]}, "tools[0].function.name"),
        ({"tools": [tool("x" * 129)]}, "tools[0].function.name"),
        ({"tools": [tool("f"), {"function": {"name": 1}}]}, "tools[1].function.name"),
        ({"tools": [tool("f", description=1)]}, "tools[0].function.description"),
        ({"tools": [tool("f", {"type": "array"})]}, "tools[0].function.parameters"),
        ({"tools": [tool("f", [])]}, "tools[0].function.parameters"),  # type: ignore[arg-type]
        ({"tools": [tool("f"), tool("f")]}, "tools"),
        ({"tools": [tool(f"f{i}") for i in range(129)]}, "tools"),
        ({"tools": [tool("f", description="x" * 2**18)]}, "tools"),
        ({"tools": [tool("f", json.loads('{"a":' * 101 + "1" + "}" * 101))]}, "tools[0].function"),
        ({"tools": "f"}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "draw"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "paint"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "paint"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom", "custom": {"name": "draw"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
        ({"tools": TOOLS, "tool_choice": 1}, "tool_choice"),
        ({"tools": [{**tool("f"), "parameters": {}}]}, "tools[0]"),
        ({"tools": [tool("f", input_schema={})]}, "tools[0].function"),
        ({"functions": [{"name": "f", "paramters": {}}]}, "functions[0]"),
        ({"tools": TOOLS, "tool_choice": {"name": "draw", "disable_parallel_tool_use": True}}, "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": {"function": {"name": "draw", "arguments_": {}}}},
            "tool_choice",
        ),
        (
            {
                "tools": TOOLS,
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "auto", "tools": [{"name": "draw"}], "parallel": False},
                },
            },
            "tool_choice.allowed_tools",
        ),
        ({"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"functions": [{"name": "f", "parameters": 1}]}, "functions[0].parameters"),
        ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
         "response_format"),
        ({"tools": TOOLS, "tool_choice": "draw", "guided_regex": "a"}, "guided_regex"),
    ],
)  # fmt: skip
def test_a_bad_tool_or_choice_is_named_with_its_path(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(chat(**fields))
    assert (caught.value.status, caught.value.param) == (400, param)


def test_what_clients_write_beside_a_functions_own_fields_is_taken() -> None:
    extras = {"strict": True, "cache_control": {"type": "ephemeral"}}
    own = tool("f", {}, strict=False, **{"return": {"type": "string"}})
    for given in ({**own, **extras}, {**own, "type": None}, {**own, "unknown": None}):
        body = chat(tools=[given], tool_choice={"type": "function", "function": own["function"]})
        assert read(body).constraint is not None


def test_a_functions_own_keys_reach_the_template_and_only_near_misses_are_refused() -> None:
    extras = {
        "title": "F",
        "examples": [1],
        "returns": {"type": "string"},
        "outputSchema": {},
        "inputSchema": {},
    }
    offered = tool("f", DRAW, **extras)
    request = read(chat(tools=[{**offered, "id": "t1"}]))
    assert isinstance(request.prompt, ChatPrompt)
    assert request.prompt.tools == [offered]
    for key in ("paramters", "params", "Parameters", "inputSchema", "input_schema", "descripton", "argument"):
        with pytest.raises(InvalidRequest, match=rf"tools\[0\]\.function has the key '{key}'; did you mean") as caught:
            read(chat(tools=[tool("f", **{key: {}})]))
        assert caught.value.param == "tools[0].function"


def test_the_models_own_choice_needs_the_options_and_says_so() -> None:
    for formats in (AnswerFormats(), answer_formats("hermes"), answer_formats(None, auto=True)):
        for choice in ({}, {"tool_choice": "auto"}, {"tool_choice": None}):
            with pytest.raises(
                InvalidRequest, match=r"option\.enable_auto_tool_choice=true and option\.tool_call_parser"
            ):
                read(chat(tools=TOOLS, **choice), formats)
        assert read(chat(tools=TOOLS, tool_choice="required"), formats).constraint is not None
        assert read(chat(tools=TOOLS, tool_choice="none"), formats).constraint is None


def test_the_template_gets_the_tools_unless_none_is_to_be_called() -> None:
    def given(**fields: Any) -> Any:
        prompt = read(chat(**fields)).prompt
        assert isinstance(prompt, ChatPrompt)
        return prompt.tools

    assert given(tools=TOOLS) == TOOLS
    assert given(tools=TOOLS, tool_choice="now") == TOOLS
    strict = [tool("geo.locate_2-a", DRAW, strict=True)]
    assert given(tools=strict) == strict
    assert given(tools=TOOLS, tool_choice="none") is None
    assert given(tools=[], tool_choice="auto") is None
    assert given(tools=[{"function": {"name": "f", "arguments": DRAW, "description": None}}]) == [tool("f", DRAW)]
    assert given(functions=[{"name": "f"}], function_call="auto") == [tool("f")]


def schema_of(**fields: Any) -> Any:
    constraint = read(chat(**fields)).constraint
    assert constraint is not None
    assert (constraint.kind, constraint.param) == ("json_schema", "tools")
    return json.loads(constraint.value or "")


def test_forced_calls_have_a_schema_whose_references_still_lead_to_their_definitions() -> None:
    schema = schema_of(tools=[tool("a", DRAW), tool("b", POINT), tool("now")], tool_choice="required")
    inner = {"color": "red", "count": 1, "at": [1, 2], "inside": {"color": "red", "count": 2, "at": [0, 0]}}
    for good in (
        [{"name": "a", "parameters": inner}],
        [
            {"name": "b", "parameters": {**inner, "at": "here", "inside": None}},
            {"name": "now", "parameters": {}},
        ],
    ):
        jsonschema.validate(good, schema)
    for bad in (
        [],
        [{"name": "a", "parameters": {**inner, "at": "here"}}],
        [{"name": "a", "parameters": {**inner, "inside": {"color": "red"}}}],
        [{"name": "b", "parameters": inner}],
        [{"name": "now", "parameters": {"x": 1}}],
        [{"name": "c", "parameters": {}}],
        [{"name": "now"}],
        {"name": "now", "parameters": {}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema)
    one = schema_of(tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate([{"name": "now", "parameters": {}}] * 2, one)
    assert schema_of(tools=TOOLS, tool_choice="draw") == DRAW
    only = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [tool("now")]}}
    allowed = schema_of(tools=TOOLS, tool_choice=only)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate([{"name": "draw", "parameters": inner}], allowed)


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_earlier_reasoning_reaches_the_template_under_both_names(name: str) -> None:
    earlier = {"role": "assistant", "content": "Hi.", name: "Hm."}
    prompt = read({"messages": [earlier, {"role": "user", "content": "And?"}]}).prompt
    template = "{% for m in messages %}<{{ m.reasoning }}|{{ m.reasoning_content }}>{{ m.content }}{% endfor %}"
    text = PromptRenderer(make_tokenizer(), template).render(prompt).text
    assert text == "<Hm.|Hm.>Hi.<|>And?"


def test_special_tokens_that_mark_calls_are_not_skipped() -> None:
    special = frozenset({"<tool_call>", "<s>"})
    assert not read(chat(tools=TOOLS), special_tokens=special).sampling.skip_special_tokens
    assert read(chat(tools=TOOLS), special_tokens=frozenset({"<s>"})).sampling.skip_special_tokens
    assert read(chat(), special_tokens=special).sampling.skip_special_tokens
    thinks = answer_formats(reasoning="mistral")
    assert not read(chat(), thinks, special_tokens=frozenset({"[THINK]"})).sampling.skip_special_tokens


def test_a_parser_that_does_not_exist_is_an_error_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    options = ["tool_call_parser=hermés", "reasoning_parser=deepthought", "enable_auto_tool_choice=true"]
    configuration = resolve(model=str(tmp_path), environ={}, options=options)
    with pytest.raises(ConfigurationError) as caught:
        build_engine(configuration, tmp_path)
    first, second = (str(problem) for problem in caught.value.problems)
    assert "option.tool_call_parser = 'hermés'" in first
    assert "allowed: hermes, llama3_json, " in first
    assert "option.reasoning_parser = 'deepthought'" in second
    machine = Machine((), Device("host memory", 2**30))
    assert describe(configuration, machine)["errors"][:2] == [first, second]


# What comes back.


def letters(text: str) -> list[Step]:
    return said(*text)


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    calls = [{"function": call["function"]} for call in message.get("tool_calls") or []]
    rest = {k: v for k, v in message.items() if k not in ("tool_calls", "refusal") and v is not None}
    return {**rest, **({"tool_calls": calls} if calls else {})}


THINKS = answer_formats("hermes", auto=True, reasoning="deepseek_r1")
CASES: list[tuple[str, AnswerFormats, dict[str, Any], dict[str, Any], str]] = [
    ("Hello.", HERMES, {"tools": TOOLS}, {"content": "Hello."}, "stop"),
    (CALL, HERMES, {"tools": TOOLS}, {"tool_calls": [("draw", '{"color": "red"}')]}, "tool_calls"),
    (
        f"Well:\n{CALL}\n{CALL} Ok.",
        HERMES,
        {"tools": TOOLS},
        {"content": "Well:\n Ok.", "tool_calls": [("draw", '{"color": "red"}')] * 2},
        "tool_calls",
    ),
    (
        CALL + CALL,
        HERMES,
        {"tools": TOOLS, "parallel_tool_calls": False},
        {"tool_calls": [("draw", '{"color": "red"}')]},
        "tool_calls",
    ),
    (CALL, HERMES, {"tools": TOOLS, "tool_choice": "none"}, {"content": CALL}, "stop"),
    (CALL, HERMES, {}, {"content": CALL}, "stop"),
    (CALL, HERMES, {"tools": TOOLS, "response_format": {"type": "json_object"}}, {"content": CALL}, "stop"),
    (
        f" \n{CALL} \n ",
        HERMES,
        {"tools": [tool("draw", DRAW, strict=True)]},
        {"tool_calls": [("draw", '{"color": "red"}')]},
        "tool_calls",
    ),
    ("Hm.</think>Hi", THINKS, {}, {"reasoning": "Hm.", "reasoning_content": "Hm.", "content": "Hi"}, "stop"),
    ("Hm.</think>Hi", THINKS, {"include_reasoning": False}, {"content": "Hi"}, "stop"),
    ("Hm.", THINKS, {}, {"reasoning": "Hm.", "reasoning_content": "Hm."}, "stop"),
    (
        f"<think>Hm.</think>\n\n{CALL}",
        THINKS,
        {"tools": TOOLS},
        {"reasoning": "Hm.", "reasoning_content": "Hm.", "tool_calls": [("draw", '{"color": "red"}')]},
        "tool_calls",
    ),
    ('{"a": 1}', THINKS, {"response_format": {"type": "json_object"}}, {"content": '{"a": 1}'}, "stop"),
    (
        '[{"name": "now", "parameters": {}}, {"name": "draw", "parameters": {"count": 2}}]',
        THINKS,
        {"tools": TOOLS, "tool_choice": "required"},
        {"tool_calls": [("now", "{}"), ("draw", '{"count": 2}')]},
        "tool_calls",
    ),
    (
        '{"count": 2}',
        AnswerFormats(),
        {"tools": TOOLS, "tool_choice": "draw"},
        {"tool_calls": [("draw", '{"count": 2}')]},
        "stop",
    ),
    (
        CALL,
        HERMES,
        {"functions": [{"name": "draw"}]},
        {"function_call": {"name": "draw", "arguments": '{"color": "red"}'}},
        "function_call",
    ),
    (
        '{"count": 2}',
        HERMES,
        {"functions": [{"name": "draw"}], "function_call": {"name": "draw"}},
        {"function_call": {"name": "draw", "arguments": '{"count": 2}'}},
        "stop",
    ),
]


@pytest.mark.parametrize(("text", "formats", "fields", "message", "reason"), CASES)
def test_whole_and_streamed_answers_agree(
    text: str, formats: AnswerFormats, fields: dict[str, Any], message: dict[str, Any], reason: str
) -> None:
    expected = {"role": "assistant", **message}
    if "tool_calls" in expected:
        calls = [{"function": {"name": n, "arguments": a}} for n, a in expected["tool_calls"]]
        expected["tool_calls"] = calls
    for cut in (list(text), [text], [text[:7], text[7:]]):
        completion = whole(said(*cut), formats, **fields)
        (choice,) = completion.choices
        assert (without_ids(choice.message.to_dict()), choice.finish_reason) == (expected, reason)
        streamed, streamed_reason = added_up(events(said(*cut), formats, **fields))
        assert (without_ids(streamed), streamed_reason) == (expected, reason)


def test_a_call_alone_has_null_content_and_an_id_of_its_own() -> None:
    (choice,) = whole(letters(CALL + CALL), tools=TOOLS).choices
    assert choice.message.content is None
    first, second = choice.message.tool_calls or []
    assert first.type == "function"
    assert first.id.startswith("call_")
    assert first.id != second.id
    mistral = answer_formats("mistral", auto=True)
    for text, fields in (("[TOOL_CALLS]now{}", {}), ("{}", {"tool_choice": "now"})):
        (choice,) = whole(letters(text), mistral, tools=TOOLS, **fields).choices
        (call,) = choice.message.tool_calls or []
        assert len(call.id) == 9
        assert call.id.isalnum()


def test_the_deltas_of_a_call_are_those_of_openai() -> None:
    steps = said("Ok ", "<tool", '_call>{"name": "draw", "argu', 'ments": {"a', '": 1}', "}</tool_call>", "")
    found = events(steps, tools=TOOLS, stream_options={"include_usage": True})
    call_id = found[1]["choices"][0]["delta"]["tool_calls"][0]["id"]
    function = {"name": "draw", "arguments": ""}
    assert [event["choices"][0]["delta"] for event in found[:-1]] == [
        {"role": "assistant", "content": "Ok "},
        {"tool_calls": [{"index": 0, "id": call_id, "type": "function", "function": function}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '": 1}'}}]},
        {},
    ]
    assert [event["choices"][0]["finish_reason"] for event in found[:-1]] == [None] * 4 + ["tool_calls"]
    assert [event["usage"] for event in found[:-1]] == [None] * 5
    assert found[-1]["usage"]["completion_tokens"] == 7


def test_an_answer_cut_short_says_length_and_a_broken_call_is_content_in_a_whole_reply() -> None:
    cut = said('<tool_call>{"name": "draw", "arguments": {"a', reason="length")
    (choice,) = whole(cut, tools=TOOLS).choices
    assert choice.finish_reason == "length"
    (call,) = choice.message.tool_calls or []
    assert call.function.arguments == '{"a'  # type: ignore[union-attr]
    broken = '<tool_call>{"name": "draw", "arguments": {"a": oops}}</tool_call>'
    (choice,) = whole(letters(broken), tools=TOOLS).choices
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (broken, None, "stop")
    streamed, reason = added_up(events(letters(broken), tools=TOOLS))
    assert reason == "stop"
    assert streamed["content"] == "oops}}</tool_call>"


def test_every_token_has_its_logprob_whatever_the_deltas_show() -> None:
    text = f"Hm {CALL} ok"
    found = events(letters(text), tools=TOOLS, logprobs=True)
    streamed = [
        entry["token"] for event in found for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == list(text)
    (choice,) = whole(letters(text), tools=TOOLS, logprobs=True).choices
    assert choice.logprobs is not None
    assert [entry.token for entry in choice.logprobs.content or []] == list(text)


def test_hidden_reasoning_does_not_show_in_logprobs_or_token_ids() -> None:
    fields = {"include_reasoning": False, "logprobs": True, "return_token_ids": True}
    found = events(letters("secret</think>Hi"), THINKS, **fields)
    assert not any(letter in json.dumps(found[0]) for letter in ("secret", "token_ids"))
    assert all(event["choices"][0]["logprobs"] is None for event in found)
    (choice,) = whole(letters("secret</think>Hi"), THINKS, **fields).choices
    assert choice.logprobs is None


def test_answers_that_take_turns_are_parsed_apart() -> None:
    def one(index: int) -> list[Step]:
        return [Delta(index, [i], letter) for i, letter in enumerate(CALL if index else "plain <tool_cal")]

    steps = [step for pair in zip(one(0), one(1), strict=False) for step in pair] + one(1)[len(one(0)) :]
    steps += [Delta(index, [0], "", finish_reason="stop") for index in (0, 1)]
    found = events(steps, tools=TOOLS, n=2)
    for index, key in ((0, "content"), (1, "tool_calls")):
        mine = [event for event in found if event["choices"][0]["index"] == index]
        message, reason = added_up(mine)
        assert key in message
        assert message["role"] == "assistant"
        assert reason == ("tool_calls" if index else "stop")


def test_a_forced_call_needs_a_backend_that_constrains() -> None:
    body = incoming(chat(tools=TOOLS, tool_choice="now"))
    reply = asyncio.run(service(ScriptedBackend(letters("{}"))).answer(body))
    assert reply.status == 400
    assert json.loads(reply.body)["error"]["param"] == "tools"


def test_lmis_route_speaks_the_same_and_json_lines() -> None:
    body = chat(tools=TOOLS, stream=True)
    status, reply = answered(letters(CALL), HERMES, body, "/invocations", accept="application/jsonlines")
    assert status == 200
    message, reason = added_up([json.loads(line) for line in reply.splitlines()])
    assert (message["tool_calls"][0]["function"]["name"], reason) == ("draw", "tool_calls")


# Over sockets, with the real client.


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    options = ("tool_call_parser=hermes", "enable_auto_tool_choice=true", "reasoning_parser=think")
    arguments = [part for option in options for part in ("--option", option)]
    with ServerProcess(tmp_path_factory.mktemp("tools") / "model", *arguments) as process:
        process.ready()
        yield openai.OpenAI(base_url=f"{process.url}/v1", api_key="unused", max_retries=0)


def test_the_openai_client_adds_the_stream_up(scripted: openai.OpenAI) -> None:
    text = f"<think>Hm é😀</think>Sure.\n{CALL}\n" + CALL.replace('"red"', '"gr\\u00fcn \\"{x}\\""')
    order = json.dumps({"say": list(text)})
    with scripted.chat.completions.stream(
        model="m", messages=[{"role": "user", "content": order}], tools=TOOLS  # type: ignore[arg-type]
    ) as stream:  # fmt: skip
        seen = [event.arguments_delta for event in stream if event.type == "tool_calls.function.arguments.delta"]
        (choice,) = stream.get_final_completion().choices
    assert len(seen) > 20, "the arguments come piece by piece"
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Sure.\n"
    assert choice.message.to_dict()["reasoning"] == "Hm é😀"
    functions = [call.function for call in choice.message.tool_calls or []]
    assert [f.name for f in functions] == ["draw", "draw"]
    assert [json.loads(f.arguments) for f in functions] == [{"color": "red"}, {"color": 'grün "{x}"'}]


# With the real engine, whose answers a grammar forces into calls.


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The mark of a call is a special token: the one that the model would be padded with."""
    model = tmp_path_factory.mktemp("models") / "shapes"
    shutil.copytree(SHAPES, model, ignore=shutil.ignore_patterns("*.py", "pictures", "__pycache__"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (model / name).read_text().replace("<pad>", "<tool_call>")
        (model / name).write_text(text)
    with LiveServer(model, "tool_call_parser=hermes", "enable_auto_tool_choice=true") as live:
        yield live


@pytest.fixture(scope="module")
def terse() -> dict[str, Any]:
    """Sampling without tokens of white space alone, of which this model makes whole answers where vLLM lets it."""
    vocabulary = json.loads((SHAPES / "tokenizer.json").read_text())["model"]["vocab"]
    blank = [number for text, number in vocabulary.items() if set(text) <= set("ĠĊĉč")]
    return {"logit_bias": {str(number): -100 for number in blank}}


def called(reply: dict[str, Any]) -> list[tuple[str, Any]]:
    calls = reply["choices"][0]["message"]["tool_calls"]
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.5, "seed": 7, "n": 2}])
def test_forced_calls_parse_and_match_their_schema(
    shapes: LiveServer, sampling: dict[str, Any], terse: dict[str, Any]
) -> None:
    properties: dict[str, Any] = {**DRAW["properties"], "inside": {"type": "null"}}  # type: ignore[dict-item]
    bounded = {**DRAW, "properties": properties}
    schemas: dict[str, Any] = {"draw": bounded, "now": {"type": "object", "maxProperties": 0}}
    tools = [tool("draw", bounded), tool("now")]
    for choice in ("required", "draw", {"type": "function", "function": {"name": "now"}}):
        forced = {"tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 200}
        answer = shapes.chat("how many shapes?", tools=tools, **forced, **sampling, **terse)
        assert answer.status_code == 200, answer.text
        reply = answer.json()
        for one in reply["choices"]:
            assert one["finish_reason"] == ("tool_calls" if choice == "required" else "stop")
            ((name, arguments),) = called({"choices": [one]})
            assert choice == "required" or name == (choice if choice == "draw" else "now")
            jsonschema.validate(arguments, schemas[name])
            assert one["message"]["content"] is None


def test_a_forced_call_streams_and_says_when_it_is_cut_short(shapes: LiveServer, terse: dict[str, Any]) -> None:
    client = openai.OpenAI(base_url=f"{shapes.url}/v1", api_key="unused", max_retries=0)
    body: dict[str, Any] = {
        "model": "shapes",
        "messages": [{"role": "user", "content": "draw"}],
        "tools": [tool("draw", DRAW)],
        "temperature": 0,
        "stream": True,
        **terse,
    }
    forced = {"type": "function", "function": {"name": "draw"}}
    for most, choice in ((300, "required"), (6, forced)):
        stream = client.chat.completions.create(**body, tool_choice=choice, parallel_tool_calls=False, max_tokens=most)
        message, reason = added_up([chunk.to_dict() for chunk in stream])
        (call,) = message["tool_calls"]
        if choice == forced:
            assert reason == "length"
            assert call["function"]["arguments"].startswith("{")
        else:
            assert reason in ("tool_calls", "length")
            assert list(accumulate(call["function"]["arguments"]))
            if reason == "tool_calls":
                jsonschema.validate(json.loads(call["function"]["arguments"]), DRAW)


@pytest.mark.skipif(VLLM, reason="about what the embedded engine can compile")
def test_a_function_whose_schema_cannot_be_compiled_is_refused_before_any_token(shapes: LiveServer) -> None:
    tools = [tool("f", {"properties": {"a": {"not": {"type": "string"}}}})]
    for stream in (False, True):
        reply = shapes.chat("hi", tools=tools, tool_choice="required", stream=stream)
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "tools"
    assert shapes.chat("hi", tools=tools).status_code == 200


def test_tools_that_the_model_may_call_do_not_change_a_plain_answer(shapes: LiveServer) -> None:
    plain = shapes.chat("how many shapes?").json()["choices"][0]["message"]["content"]
    offered = shapes.chat("how many shapes?", tools=TOOLS).json()["choices"][0]
    assert (offered["message"]["content"], offered["finish_reason"]) == (plain, "stop")
    assert "tool_calls" not in offered["message"]


def test_a_mark_that_is_a_special_token_reaches_the_parser(shapes: LiveServer) -> None:
    def said_with(token: int, **fields: Any) -> Any:
        reply = shapes.chat("hi", logit_bias={str(token): 100}, max_tokens=1, **fields)
        return reply.json()["choices"][0]["message"]["content"]

    mark, user = 0, 5
    assert said_with(mark) == ""
    assert said_with(mark, tools=TOOLS) == "<tool_call>"
    assert said_with(mark, tools=TOOLS, tool_choice="none") == ""
    assert said_with(user) == ""


def test_a_history_of_calls_and_their_results_is_taken(shapes: LiveServer) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "x"}'}}
    messages = [
        {"role": "user", "content": "how many shapes?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Hm."},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
        {"role": "assistant", "content": "It is noon."},
        {"role": "user", "content": "how many shapes?"},
    ]
    reply = shapes.http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 5})
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["prompt_tokens"] > len(messages)
    assert reply.json()["choices"][0]["message"]["content"]
