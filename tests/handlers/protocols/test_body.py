"""A misspelt name in a body: the answer comes all the same, with a header and a line in the log."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.protocols.known_names import KnownNames, warning
from handlers.protocols.openai.bodies import ChatBody, known_names
from handlers.request import Reply
from tests.support.scripted import ScriptedBackend, chat, everything, incoming, said, service

LONGEST = 512
NAMES = known_names(ChatBody)


def answer(body: Any, route: str, **options: Any) -> Reply:
    async def ask() -> Reply:
        templates = {"default": {"messages", "enable_thinking"}, "tool_use": {"tools", "documents"}}
        served = service(ScriptedBackend(said("a", "b"), chat_templates=templates), **options)
        asked = incoming(body, route)
        tokens = route.endswith("tokenize")
        reply = await (served.call("tokenize", asked) if tokens else served.answer(asked))
        reply.body = await everything(reply)
        return reply

    return asyncio.run(ask())


def lmi(**parameters: Any) -> dict[str, Any]:
    return {"inputs": "hi", "parameters": parameters}


MISSPELT: list[tuple[str, dict[str, Any], str, str]] = [
    ("/v1/chat/completions", chat(max_token=5), "max_token", "max_tokens"),
    ("/v1/chat/completions", chat(temprature=0.5), "temprature", "temperature"),
    ("/v1/chat/completions", chat(max_new_token=5), "max_new_token", "max_tokens"),
    ("/v1/chat/completions", chat(Temperature=0.5), "Temperature", "temperature"),
    ("/v1/chat/completions", chat(maxTokens=5), "maxTokens", "max_tokens"),
    ("/v1/chat/completions", chat(max_output_tokens=5), "max_output_tokens", "max_tokens"),
    ("/v1/chat/completions", chat(stop_sequences=["x"]), "stop_sequences", "stop"),
    ("/v1/chat/completions", chat(repeat_penalty=1.1), "repeat_penalty", "repetition_penalty"),
    (
        "/v1/chat/completions",
        chat(response_fromat={"type": "json_object"}),
        "response_fromat",
        "response_format",
    ),
    ("/v1/chat/completions", chat(guided_jsn={}), "guided_jsn", "guided_json"),
    ("/invocations", chat(max_token=5), "max_token", "max_tokens"),
    (
        "/v1/chat/completions",
        chat(chat_template_kwargs={"enable_thinkin": False}),
        "chat_template_kwargs.enable_thinkin",
        "chat_template_kwargs.enable_thinking",
    ),
    *(
        ("/v1/chat/completions", chat(**{name: 1}), shown, known)
        for name, shown, known in [
            ("max-tokens", "max_tokens in that spelling", "max_tokens"),
            ("max tokens", "max_tokens in that spelling", "max_tokens"),
            ("max_tokens ", "max_tokens in that spelling", "max_tokens"),
            ("top-p", "top_p in that spelling", "top_p"),
            ("TopP", "TopP", "top_p"),
            ("maxOutputTokens", "maxOutputTokens", "max_tokens"),
            ("max-output-tokens", "max_output_tokens", "max_tokens"),
            ("max_tokens_to_sample", "max_tokens_to_sample", "max_tokens"),
            ("stopSequences", "stopSequences", "stop"),
            ("stop_sequence", "stop_sequence", "stop"),
            ("mirostat", "mirostat", "mirostat_mode"),
            ("rep_pen", "rep_pen", "repetition_penalty"),
        ]
    ),
    (
        "/v1/chat/completions",
        chat(
            **dict.fromkeys(["mood", "transforms", "plugins", "route", "samplers", "slot_id", "features", "files"], 1),
            max_token=5,
        ),
        "max_token",
        "max_tokens",
    ),
    *(
        ("/v1/chat/completions", {"messages": [turn]}, f"messages[0].{name}", f"messages[0].{known}")
        for turn, name, known in [
            ({"role": "user", "content": "", "contents": "hi"}, "contents", "content"),
            ({"role": "user", "content": [], "parts": ["hi"]}, "parts", "content"),
            ({"role": "assistant", "content": "hi", "toolCalls": []}, "toolCalls", "tool_calls"),
            ({"role": "assistant", "reasoning": "hm", "text": "hi"}, "text", "content"),
            ({"role": "tool", "content": "hi", "tool_call_ids": "x"}, "tool_call_ids", "tool_call_id"),
        ]
    ),
    ("/v1/completions", {"prompt": "hi", "top_pp": 0.5}, "top_pp", "top_p"),
    ("/invocations", {"prompt": "hi", "sede": 5}, "sede", "seed"),
    ("/invocations", lmi(max_new_token=5), "parameters.max_new_token", "parameters.max_new_tokens"),
    ("/invocations", lmi(temprature=0.5), "parameters.temprature", "parameters.temperature"),
    ("/invocations", {"inputs": "hi", "paramters": {}}, "paramters", "parameters"),
    ("/invocations", {"inputs": "hi", "max_new_tokens": 5}, "max_new_tokens", "parameters.max_new_tokens"),
    ("/generate", lmi(max_new_token=5), "parameters.max_new_token", "parameters.max_new_tokens"),
    ("/generate", lmi(max_length=5), "parameters.max_length", "parameters.max_new_tokens"),
    ("/", {"inputs": "hi", "top_k": 5}, "top_k", "parameters.top_k"),
    ("/tokenize", {"prompt": "hi", "add_special_token": False}, "add_special_token", "add_special_tokens"),
    ("/chat_tokenize", chat(add_generation_promt=False), "add_generation_promt", "add_generation_prompt"),
]


@pytest.mark.parametrize(("route", "body", "name", "known"), MISSPELT)
def test_it_is_told_with_the_nearest_name_and_the_answer_is_as_without_it(
    route: str, body: dict[str, Any], name: str, known: str, caplog: pytest.LogCaptureFixture
) -> None:
    reply = answer(body, route)
    assert reply.status == 200, reply.body
    told = f"{name} is not read; did you mean {known}?"
    assert reply.headers["warning"] == f'299 - "{told}"'
    if not route.endswith("tokenize"):
        (line,) = (record for record in caplog.records if "did you mean" in record.getMessage())
        assert (line.getMessage(), line.levelno) == (f"request req-1: {told}", logging.WARNING)


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/chat/completions", chat(max_token=5, stream=True)),
        ("/v1/completions", {"prompt": "hi", "max_token": 5, "stream": True}),
        ("/invocations", {**lmi(max_new_token=5), "stream": True}),
        ("/generate_stream", lmi(max_new_token=5)),
    ],
)
def test_a_stream_tells_it_before_its_first_token(route: str, body: dict[str, Any]) -> None:
    reply = answer(body, route)
    assert reply.chunks is not None
    assert "did you mean" in reply.headers["warning"]
    assert answer({**body, "stream": True}, route, limit_mm_per_prompt={}).status == 200


def test_tgis_answers_to_the_lmi_body_tell_it_too() -> None:
    assert "did you mean" in answer(lmi(max_new_token=5), "/invocations", tgi_compat=True).headers["warning"]


@pytest.mark.parametrize(
    ("route", "body", "path"),
    [
        ("/v1/chat/completions", chat(extra_body={"top_k": 1}), ""),
        ("/v1/completions", {"prompt": "hi", "extra_body": {"top_k": 1}}, ""),
        ("/invocations", lmi(extra_body={"top_k": 1}), "parameters."),
    ],
)
def test_a_clients_wrapper_sent_as_it_is_is_told(route: str, body: dict[str, Any], path: str) -> None:
    told = f"{path}extra_body is not read; put its keys into the body itself"
    assert answer(body, route).headers["warning"] == f'299 - "{told}"'


def test_a_message_that_brings_both_names_means_the_one_that_is_read() -> None:
    turn = {"role": "user", "content": "hi", "parts": [{"text": "hi"}], "text": "hi"}
    assert "warning" not in answer({"messages": [turn]}, "/v1/chat/completions").headers


@pytest.mark.parametrize(
    "extras",
    [
        # what other servers' clients send
        {"provider": {}, "transforms": [], "usage": {"include": True}, "route": "fallback", "plugins": []},
        {"cache_prompt": True, "slot_id": 1, "n_probs": 0, "t_max_predict_ms": 1, "samplers": "k"},
        {"chat_id": "x", "features": {}, "variables": {}, "model_item": {}, "background_tasks": {}},
        {"do_sample": True, "details": True, "return_full_text": False, "watermark": True, "truncate": 9},
        {"chat_template_kwargs": {"mood": "good", "enable_thinking": True}},
        # what is known and ignored, and what is null
        {"user": "u", "store": True, "metadata": {}, "length_penalty": 1.0, "session_id": "s", "best_of": 1},
        {"max_token": None},
        # what is no plain name
        {
            "max_tokens\r\nx-evil: 1": 1,
            'max_tokens"': 1,
            "mаx_tokens": 1,
            "": 1,
        },
        {"max_tokens" * 10: 1, "tp": 1},
    ],
)
def test_what_is_no_misspelling_is_not_told(extras: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    for route, body in (("/v1/chat/completions", chat(**extras)), ("/invocations", lmi(**extras))):
        reply = answer(body, route)
        assert reply.status == 200, reply.body
        assert "warning" not in reply.headers
    assert not any("did you mean" in message for message in caplog.messages)


def test_a_body_of_nothing_but_misspellings_costs_and_tells_little() -> None:
    compared = 0

    class Counted(KnownNames):
        def _find(self, name: str) -> str | None:
            nonlocal compared
            compared += 1
            return super()._find(name)

    names = Counted({"max_tokens"})
    for body in (
        {f"max_token{n}": 1 for n in range(100_000)},
        {f"x{n}y": 1 for n in range(100_000)},
        {f"max_token{n}": None for n in range(100_000)},
    ):
        compared = 0
        told = names.misspelt(body)
        assert (len(told), compared) in ((3, 3), (0, 8), (0, 0))
    reply = answer(chat(**{f"max_token_{n:020d}": 1 for n in range(4000)}), "/v1/chat/completions")
    assert reply.status == 200
    assert len(reply.headers.get("warning", "")) <= LONGEST


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=40) | st.sampled_from(["max_token", "temprature", "x" * 31]) | st.from_regex(r"max_tok\w{3}"),
        st.just(1),
        max_size=6,
    )
)
def test_no_name_whatever_breaks_a_header(body: dict[str, Any]) -> None:
    for value in warning(NAMES.misspelt(body, "parameters")).values():
        assert re.fullmatch(r'299 - "[\w.?; ]+"(, 299 - "[\w.?; ]+"){0,2}', value, re.ASCII)
        assert len(value) <= LONGEST
        json.dumps(value).encode("ascii")
