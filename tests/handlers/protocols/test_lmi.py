"""The LMI body and its replies, as the LMI input and output schema documents them."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.deltas import Delta, PositionLogprobs, PromptStats
from handlers.errors import InvalidRequest
from handlers.protocols.base import MAX_PROMPTS, ServerContext, Task
from handlers.protocols.lmi.requests import read_lmi
from handlers.protocols.markdown_images import image_parts
from handlers.request import GenerationRequest, ImagePart, Reply, RequestSampling, TextPart, TextPrompt
from tests.support.pace import too_long
from tests.support.scripted import ScriptedBackend, Step, everything, incoming, said, service, token

CAT = "https://images.example/cat.png"


def task(inputs: Any = "hi", *, defaults: dict[str, Any] | None = None, **parameters: Any) -> Task:
    body = {"inputs": inputs, "parameters": parameters}
    return read_lmi(body, ServerContext("shapes", defaults or {}), incoming({}))


def sampling(defaults: dict[str, Any] | None = None, **parameters: Any) -> RequestSampling:
    return task(defaults=defaults, **parameters).requests[0].sampling


def answer(steps: list[Step], body: Any, route: str = "/invocations", **headers: str) -> Reply:
    async def ask() -> Reply:
        backend = ScriptedBackend(steps, stats=lambda: STATS)
        reply = await service(backend, limit_mm_per_prompt={"image": 9}).answer(incoming(body, route, **headers))
        reply.body = await everything(reply)
        return reply

    return asyncio.run(ask())


STATS = PromptStats(2, prompt_token_ids=[1, 5], prompt_logprobs=[None, PositionLogprobs(token(5, "hi", -1.25), ())])


def result(steps: list[Step], body: Any, **headers: str) -> Any:
    reply = answer(steps, body, **headers)
    assert (reply.status, reply.content_type) == (200, "application/json"), reply.body
    return json.loads(reply.body)


def lines(steps: list[Step], body: Any) -> list[Any]:
    reply = answer(steps, {**body, "stream": True})
    assert (reply.status, reply.content_type) == (200, "application/jsonlines"), reply.body
    assert reply.body.endswith(b"\n")
    return [json.loads(line) for line in reply.body.splitlines()]


# Reading


def test_defaults_are_thirty_tokens_and_greedy() -> None:
    assert sampling() == RequestSampling(max_tokens=30, temperature=0.0)
    assert sampling(do_sample=False, temperature=0.7).greedy
    assert sampling(seed=4, top_p=0.5).greedy
    assert sampling(do_sample=True).temperature == 1.0
    assert sampling(temperature=0.7).temperature == 0.7
    defaults = {"temperature": 0.3, "top_k": 20, "repetition_penalty": 1.05, "max_tokens": 500}
    assert sampling(defaults) == RequestSampling(max_tokens=30, temperature=0.0, top_k=20, repetition_penalty=1.05)
    assert sampling(defaults, do_sample=True).temperature == 0.3
    assert task().requests[0].max_tokens_is_default
    assert not task(max_new_tokens=30).requests[0].max_tokens_is_default


def test_every_parameter_reaches_the_engine() -> None:
    asked = task(
        max_new_tokens=5,
        min_new_tokens=1,
        do_sample=True,
        temperature=0.5,
        top_k=4,
        top_p=0.9,
        min_p=0.1,
        typical_p=0.8,
        repetition_penalty=1.2,
        presence_penalty=0.1,
        frequency_penalty=0.3,
        seed=7,
        stop_sequences=["END"],
        stop=["\n"],
        stop_token_ids=[9],
        ignore_eos_token=True,
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        details=True,
        decoder_input_details=True,
        top_n_tokens=3,
        truncate=100,
    ).requests[0]
    assert asked.truncate_prompt_tokens == 100
    assert asked.sampling == RequestSampling(
        max_tokens=5,
        min_tokens=1,
        temperature=0.5,
        top_k=4,
        top_p=0.9,
        min_p=0.1,
        typical_p=0.8,
        repetition_penalty=1.2,
        presence_penalty=0.1,
        frequency_penalty=0.3,
        seed=7,
        stop=("END", "\n"),
        stop_token_ids=(9,),
        ignore_eos=True,
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        logprobs=3,
        prompt_logprobs=0,
    )


def test_unknown_and_harmless_parameters_are_accepted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "handlers.protocols.known_names")
    harmless = {"watermark": True, "length_penalty": 2, "early_stopping": True, "num_beams": 1}
    assert sampling(best_of=1, n=1, whatever=[1], details=None, **harmless) == sampling()
    assert caplog.messages == ["unknown parameter ignored: whatever"]
    body = {"inputs": "x", "parameters": None, "stream": None, "unknown": 1}
    assert read_lmi(body, ServerContext("m"), incoming({})).requests[0].sampling.max_tokens == 30


def test_images_are_markdown_links_in_place() -> None:
    url = "https://en.wikipedia.org/wiki/File_(a).jpg"
    text = f'Look: ![a cat]({CAT}) and ![]({url})\n![](data:image/png;base64,QUJD "title") what?'
    assert image_parts(text) == [
        TextPart("Look: "),
        ImagePart(CAT),
        TextPart(" and "),
        ImagePart(url),
        TextPart("\n"),
        ImagePart("data:image/png;base64,QUJD"),
        TextPart(" what?"),
    ]
    foreign = ("![](ftp://x)", "![](file:///etc/passwd)", "![](s3://bucket/key.png)")
    for plain in ("", "![logo](logo.png)", "[a](https://x.example)", *foreign, "![](", f"! []({CAT})"):
        assert image_parts(plain) == [TextPart(plain)]


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet='![]() "\nhttps:data,', max_size=80))
def test_cutting_out_images_loses_no_text(text: str) -> None:
    parts = image_parts(text)
    for part in parts:
        piece = part.text if isinstance(part, TextPart) else part.url
        assert piece in text
    if not any(isinstance(part, ImagePart) for part in parts):
        assert parts == [TextPart(text)]


def test_hostile_text_is_searched_in_linear_time() -> None:
    for hostile in (
        "![" * 200_000,
        "![](https:" * 100_000,
        "![](https:(" * 100_000,
        "![]( " * 100_000,
        "(" * 10**6,
    ):
        started = time.process_time()
        image_parts(hostile)
        assert not too_long(time.process_time() - started, 10), "quadratic text took minutes"


def test_prompts_are_raw_text() -> None:
    (request,) = task("USER: hi").requests
    assert request.prompt == TextPrompt([TextPart("USER: hi")])
    assert request.prompt.add_special_tokens


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"inputs": None}, "inputs"),
        ({"inputs": 5}, "inputs"),
        ({"inputs": []}, "inputs"),
        ({"inputs": ["a", 1]}, "inputs[1]"),
        ({"inputs": [["a", "b"]]}, "inputs[0]"),
        ({"inputs": ["a"] * (MAX_PROMPTS + 1)}, "inputs"),
        ({"inputs": ["a", "b"], "stream": True}, "inputs"),
        ({"inputs": "x", "stream": "yes"}, "stream"),
        ({"inputs": "x", "parameters": []}, "parameters"),
        ({"inputs": "x", "parameters": {"max_new_tokens": 0}}, "parameters.max_new_tokens"),
        ({"inputs": "x", "parameters": {"max_new_tokens": "5"}}, "parameters.max_new_tokens"),
        ({"inputs": "x", "parameters": {"temperature": -1}}, "parameters.temperature"),
        ({"inputs": "x", "parameters": {"top_p": 0, "do_sample": True}}, "parameters.top_p"),
        ({"inputs": "x", "parameters": {"stop_sequences": [""]}}, "parameters.stop_sequences"),
        ({"inputs": "x", "parameters": {"stop_sequences": [1]}}, "parameters.stop_sequences[0]"),
        ({"inputs": "x", "parameters": {"truncate": 0}}, "parameters.truncate"),
        ({"inputs": "x", "parameters": {"top_n_tokens": 50}}, "parameters.top_n_tokens"),
        ({"inputs": "x", "parameters": {"best_of": 0}}, "parameters.best_of"),
        ({"inputs": "x", "parameters": {"n": 129}}, "parameters.n"),
        ({"inputs": "x", "parameters": {"n": 3, "best_of": 2}}, "parameters.n"),
        ({"inputs": "x", "parameters": {"n": 2}, "stream": True}, "parameters.n"),
        ({"inputs": "x", "parameters": {"best_of": 2}, "stream": True}, "parameters.best_of"),
        ({"inputs": "x", "parameters": {"logprobs": 21}}, "parameters.logprobs"),
        ({"inputs": "x", "parameters": {"logit_bias": {"x": 1}}}, "parameters.logit_bias"),
        ({"inputs": "x", "parameters": {"guided_regex": 5}}, "parameters.guided_regex"),
        ({"inputs": "x", "parameters": {"grammar": {"type": "poem"}}}, "parameters.grammar"),
        ({"inputs": "x", "parameters": {"guided_json": {}, "grammar": {}}}, "parameters.grammar"),
        ({"inputs": "x", "parameters": {"num_beams": 4}}, "parameters.num_beams"),
        ({"inputs": ["x", "y"], "adapters": ["a"]}, "adapters"),
    ],
)
def test_a_bad_value_is_named_with_its_path(body: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_lmi(body, ServerContext("m"), incoming({}))
    assert caught.value.param == path
    assert path in caught.value.message


def test_answers_must_look_as_any_of_the_backends_words_say() -> None:
    schema = {"type": "object", "properties": {"color": {"type": "string"}}}
    for words in (
        {"guided_json": schema},
        {"grammar": {"type": "json", "value": schema}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "c", "schema": schema}}},
        {"structured_outputs": {"json": schema}},
    ):
        (request,) = task(**words).requests
        assert request.constraint is not None
        assert request.constraint.kind == "json_schema"
        assert json.loads(request.constraint.value or "") == schema
    for words, kind in (
        ({"guided_regex": "[ab]"}, "regex"),
        ({"grammar": {"type": "regex", "value": "[ab]"}}, "regex"),
        ({"guided_grammar": 'root ::= "a"'}, "grammar"),
    ):
        (request,) = task(**words).requests
        assert request.constraint is not None
        assert request.constraint.kind == kind
    for request in task(["a", "b"], guided_choice=["red", "blue"]).requests:
        assert request.constraint is not None
        assert (request.constraint.kind, request.constraint.param) == ("choice", "parameters.guided_choice")
    assert task(guided_json=None, grammar=None).requests[0].constraint is None


def test_samplers_of_the_engine_that_lmi_has_no_name_for_are_taken_by_the_engines() -> None:
    asked = sampling(logit_bias={"7": -1.5}, max_tokens=9, min_tokens=2)
    assert (asked.logit_bias, asked.max_tokens, asked.min_tokens) == ({7: -1.5}, 9, 2)
    assert sampling(max_tokens=9, max_new_tokens=5).max_tokens == 5
    asked = sampling(xtc_probability=0.5, bad_words=["no"], bad_words_token_ids=[[1]])
    assert (asked.xtc_probability, asked.bad_words, asked.bad_words_token_ids) == (0.5, ("no",), ())


def test_adapters_go_to_their_prompts() -> None:
    body = {"inputs": ["x", "y", "z"], "adapters": ["a", "", "b"]}
    requests = read_lmi(body, ServerContext("m"), incoming({})).requests
    assert [request.adapter for request in requests] == ["a", None, "b"]
    requests = read_lmi(body, ServerContext("m"), incoming({}), adapter="h").requests
    assert [request.adapter for request in requests] == ["h"] * 3


# Writing


def test_a_plain_reply_is_the_text_alone() -> None:
    assert result(said("a ", "é"), {"inputs": "hi"}) == {"generated_text": "a é"}
    assert result(said("a"), {"inputs": "hi", "parameters": {"return_full_text": True}}) == {"generated_text": "hia"}
    assert result(said("a"), {"inputs": ["hi"]}) == [{"generated_text": "a"}]
    assert result(said("a"), b"what is \xc3\xa9?", content_type="text/plain") == {"generated_text": "a"}


def test_a_list_is_answered_by_a_list_in_order() -> None:
    async def ask() -> Any:
        def script(request: GenerationRequest) -> list[Step]:
            (part,) = request.prompt.parts  # type: ignore[union-attr]
            return [0.02 if part.text == "one" else 0.0, *said(f"to {part.text}")]  # type: ignore[union-attr]

        prompts = ["one", "two", "three"]
        reply = await service(ScriptedBackend(script)).answer(incoming({"inputs": prompts}, "/invocations"))
        return json.loads(reply.body)

    assert [one["generated_text"] for one in asyncio.run(ask())] == ["to one", "to two", "to three"]


def chosen(index: int, text: str, logprob: float) -> Delta:
    position = PositionLogprobs(token(20 + index, text, logprob), ())
    return Delta(index, [20 + index], text, [position], "stop")


def test_of_several_answers_the_most_likely_is_the_reply() -> None:
    steps: list[Step] = [chosen(0, "worst", -3.0), chosen(1, "best", -0.1), chosen(2, "middle", -1.0)]

    def asked(**parameters: Any) -> Any:
        return result(steps, {"inputs": "hi", "parameters": {"do_sample": True, **parameters}})

    assert asked(best_of=3) == {"generated_text": "best"}
    reply = asked(best_of=3, details=True, return_full_text=True)
    assert reply["generated_text"] == "hibest"
    others = reply["details"]["best_of_sequences"]
    assert [other["generated_text"] for other in others] == ["himiddle", "hiworst"]
    assert others[0]["finish_reason"] == "eos_token"
    assert others[0]["tokens"] == [{"id": 22, "text": "middle", "log_prob": -1.0}]
    reply = asked(best_of=3, n=2, details=True)
    assert [other["generated_text"] for other in reply["details"]["best_of_sequences"]] == ["middle"]
    assert "best_of_sequences" not in asked(best_of=3, n=1, details=True)["details"]
    assert len(asked(n=3, details=True)["details"]["best_of_sequences"]) == 2


def test_the_seed_that_is_none_is_not_told_as_one() -> None:
    for seed, told in ((-1, None), (0, 0)):
        body = {"inputs": "hi", "parameters": {"details": True, "seed": seed, "do_sample": True}}
        assert result(said("a"), body)["details"]["seed"] == told


def test_details() -> None:
    parameters = {"details": True, "decoder_input_details": True, "top_n_tokens": 2, "seed": 3}
    reply = result(said("a", "b", reason="length"), {"inputs": "hi", "parameters": parameters})
    details = reply["details"]
    assert details["finish_reason"] == "length"
    assert details["generated_tokens"] == 2
    assert details["inputs"] == "hi"
    assert details["seed"] == 3
    assert details["tokens"] == [
        {"id": 10, "text": "a", "log_prob": -0.5},
        {"id": 11, "text": "b", "log_prob": -0.5},
    ]
    assert details["prefill"] == [
        {"id": 1, "text": "", "log_prob": None},
        {"id": 5, "text": "hi", "log_prob": -1.25},
    ]
    assert [[t["text"] for t in position] for position in details["top_tokens"]] == [
        ["a", "other"],
        ["b", "other"],
    ]
    parameters = {"details": True, "logprobs": 2}
    assert (
        result(said("a", "b"), {"inputs": "hi", "parameters": parameters})["details"]["top_tokens"]
        == (details["top_tokens"])
    )


@pytest.mark.parametrize(
    ("last", "word"),
    [
        ({"reason": "length"}, "length"),
        ({"eos": True}, "eos_token"),
        ({}, "eos_token"),
        ({"stop_reason": "END"}, "stop_sequence"),
        ({"stop_reason": 17}, "stop_sequence"),
    ],
)
def test_finish_reasons_have_lmis_words(last: dict[str, Any], word: str) -> None:
    reply = result(said("a", **last), {"inputs": "hi", "parameters": {"details": True}})
    assert reply["details"]["finish_reason"] == word


def test_a_stream_is_a_line_for_each_token() -> None:
    found = lines(said("a", "b", eos=True), {"inputs": "hi"})
    assert found == [
        {"token": {"id": 10, "text": "a", "log_prob": -0.5}},
        {"token": {"id": 11, "text": "b", "log_prob": -0.5, "special_token": True}, "generated_text": "ab"},
    ]
    found = lines(said("a", "b"), {"inputs": "hi", "parameters": {"details": True, "return_full_text": True}})
    assert found[-1]["generated_text"] == "hiab"
    assert found[-1]["details"] == {
        "finish_reason": "eos_token",
        "generated_tokens": 2,
        "seed": None,
        "inputs": "hi",
    }
    assert "details" not in found[0]


def piece(token_id: int, text: str) -> PositionLogprobs:
    return PositionLogprobs(token(token_id, text), ())


def test_the_tokens_texts_add_up_to_the_answer() -> None:
    steps: list[Step] = [
        Delta(0, [1], "", [piece(1, "\ufffd")]),
        Delta(0, [2], "é", [piece(2, "\ufffd")]),
        Delta(0, [3, 4], "ab", [piece(3, "a"), piece(4, "b")], pieces=["a", "b"]),
        Delta(0, [5, 6], "c", [piece(5, "c"), piece(6, "STOP")], pieces=["", "c"]),
        Delta(0, [], "!", None, "stop", "STOP"),
    ]
    found = lines(steps, {"inputs": "hi"})
    assert [line["token"]["text"] for line in found] == ["", "é", "a", "b", "", "c", "!"]
    assert [line["token"]["id"] for line in found] == [1, 2, 3, 4, 5, 6, None]
    assert found[-1]["generated_text"] == "éabc!"


def test_clients_that_ask_for_events_get_events() -> None:
    body = {"inputs": "hi", "stream": True}
    reply = answer(said("a", "b"), body, accept="text/event-stream")
    assert reply.content_type.startswith("text/event-stream")
    events = reply.body.decode().split("\n\n")
    assert [json.loads(event.removeprefix("data: "))["token"]["text"] for event in events[:-1]] == ["a", "b"]
    assert answer(said("a"), body, accept="*/*").content_type == "application/jsonlines"


def test_the_same_body_is_answered_on_every_route() -> None:
    for route in ("/invocations", "/predictions/{model}", "/v1/chat/completions", "/models/{model}/invoke"):
        assert json.loads(answer(said("a"), {"inputs": "hi"}, route).body) == {"generated_text": "a"}


def test_errors_say_code_and_message_where_either_kind_of_client_looks() -> None:
    reply = answer(said("a"), {"inputs": "hi", "parameters": {"max_new_tokens": 0}}, "/v1/chat/completions")
    body = json.loads(reply.body)
    assert reply.status == body["code"] == 400
    assert body["type"] == "invalid_request"
    assert "max_new_tokens" in body["message"]
    assert body["error"] == body["message"]
    assert answer(said("a"), b"x", content_type="text/csv").status == 415
