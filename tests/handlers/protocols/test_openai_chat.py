"""Chat completions: what is read, what is refused and how, and replies that OpenAI's own types accept."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import suppress
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams

from handlers.deltas import Delta, PositionLogprobs, PromptStats
from handlers.errors import InvalidRequest, ServingError, UnsupportedMediaType
from handlers.protocols.base import ServerContext
from handlers.protocols.body import read_body
from handlers.protocols.openai.bodies import (
    FALSE_ONLY,
    IGNORED,
    READ_ELSEWHERE,
    UNSUPPORTED,
    ChatBody,
    CompletionBody,
)
from handlers.protocols.openai.chat import read_chat
from handlers.request import ChatPrompt, GenerationRequest, ImagePart, RequestSampling, TextPart
from tests.support.scripted import ScriptedBackend, Step, chat, everything, incoming, said, service, token

CAT = "https://images.example/cat.png"


def read(body: dict[str, Any], **defaults: Any) -> GenerationRequest:
    task = read_chat(body, ServerContext("shapes", defaults), incoming({}))
    (request,) = task.requests
    return request


def prompt(body: dict[str, Any]) -> ChatPrompt:
    found = read(body).prompt
    assert isinstance(found, ChatPrompt)
    return found


def refused(body: dict[str, Any]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        read(body)
    return caught.value


def answer(steps: list[Step], body: dict[str, Any], **backend: Any) -> bytes:
    async def ask() -> bytes:
        reply = await service(ScriptedBackend(steps, **backend), limit_mm_per_prompt={"image": 9}).answer(
            incoming(body)
        )
        assert reply.status == 200, reply.body
        expected = "text/event-stream; charset=utf-8" if body.get("stream") else "application/json"
        assert reply.content_type == expected
        return await everything(reply)

    return asyncio.run(ask())


def completion(steps: list[Step], body: dict[str, Any], **backend: Any) -> ChatCompletion:
    return ChatCompletion.model_validate(json.loads(answer(steps, body, **backend)), strict=True)


def chunks(steps: list[Step], body: dict[str, Any], **backend: Any) -> list[ChatCompletionChunk]:
    events = answer(steps, {**body, "stream": True}, **backend).decode().split("\n\n")
    assert events.pop() == ""
    assert events.pop() == "data: [DONE]"
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [ChatCompletionChunk.model_validate(json.loads(event[6:]), strict=True) for event in events]


# Reading


def test_several_images_over_several_turns_keep_their_order() -> None:
    urls = [f"https://images.example/{i}.png" for i in range(4)]
    body = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "first"},
                    {"type": "image_url", "image_url": {"url": urls[0], "detail": "high"}, "uuid": "mine"},
                    "and",
                    {"type": "image_url", "image_url": urls[1]},
                ],
            },
            {"role": "assistant", "content": "Two cats."},
            {
                "role": "user",
                "name": "ann",
                "content": [
                    {"image_url": {"url": urls[2]}},
                    {"type": "input_text", "text": "?"},
                    {"type": "input_image", "image_url": urls[3]},
                ],
            },
        ]
    }
    request = read(body)
    assert [part.url for part in request.images()] == urls
    turns = prompt(body).messages
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "user"]
    assert [turn.text_only for turn in turns] == [True, False, True, False]
    shapes = [[type(part) for part in turn.parts] for turn in turns]
    assert shapes[1] == [TextPart, ImagePart, TextPart, ImagePart]
    assert shapes[3] == [ImagePart, TextPart, ImagePart]
    assert turns[3].name == "ann"


def test_turns_of_tools_and_empty_contents_are_read() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = prompt(
        {
            "messages": [
                {"role": "user", "content": []},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "42", "tool_call_id": "c1"},
                {"role": "assistant", "content": None, "refusal": "I will not."},
                {"role": "developer", "content": [{"type": "text", "text": "x"}]},
            ]
        }
    ).messages
    assert turns[0].parts == []
    assert turns[1].tool_calls == [call]
    assert turns[2].tool_call_id == "c1"
    assert turns[3].parts == [TextPart("I will not.")]
    older = {"name": "f", "arguments": "{}"}
    turns = prompt(
        {
            "messages": [
                {"role": "assistant", "content": None, "function_call": older},
                {"role": "assistant", "content": "a", "reasoning": "hm"},
                {"role": "assistant", "content": "b", "reasoning_content": "hm"},
            ]
        }
    ).messages
    assert turns[0].tool_calls == [{"type": "function", "function": older}]
    assert [turn.reasoning for turn in turns] == [None, "hm", "hm"]
    roles = ("system", "developer", "user", "assistant", "tool", "ipython")
    for turn in (
        {},
        {"content": None},
        {"content": None, "refusal": None, "reasoning": "hm", "tool_calls": []},
    ):
        turns = prompt({"messages": [{"role": role, **turn} for role in roles]}).messages
        assert [(turn.role, turn.parts, turn.tool_calls) for turn in turns] == [(r, [], None) for r in roles]


def test_every_sampling_field_reaches_the_engine() -> None:
    fields: dict[str, Any] = {
        "max_tokens": 99,
        "max_completion_tokens": 12,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.05,
        "typical_p": 0.8,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.2,
        "logit_bias": {"50": -100, "7": 1.5},
        "seed": -3,
        "stop": ["\n", "END"],
        "stop_token_ids": [3, 4],
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "logprobs": True,
        "top_logprobs": 3,
        "prompt_logprobs": 1,
    }
    assert read(chat(**fields)).sampling == RequestSampling(
        max_tokens=12,
        min_tokens=2,
        temperature=0.5,
        top_k=40,
        top_p=0.9,
        min_p=0.05,
        typical_p=0.8,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=-0.2,
        logit_bias={50: -100.0, 7: 1.5},
        seed=2**63 - 3,
        stop=("\n", "END"),
        stop_token_ids=(3, 4),
        ignore_eos=True,
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        logprobs=3,
        prompt_logprobs=1,
    )


def test_defaults_are_the_models_then_openais() -> None:
    assert read(chat()).sampling == RequestSampling()
    assert read(chat()).sampling.max_tokens is None
    defaults = {"temperature": 0.2, "top_k": 50, "unknown": 1}
    assert read(chat(top_k=3, temperature=None), **defaults).sampling == RequestSampling(temperature=0.2, top_k=3)
    assert read(chat(stop="x")).sampling.stop == ("x",)
    assert read(chat(logprobs=True)).sampling.logprobs == 0
    assert read(chat(logprobs=False, top_logprobs=0)).sampling.logprobs is None


def test_null_means_absent_everywhere() -> None:
    names = set(read_chat.__globals__["ChatBody"].__struct_fields__) - {"messages"}
    assert read(chat(**dict.fromkeys(names))).sampling == RequestSampling()
    unsupported = UNSUPPORTED
    assert read(chat(**dict.fromkeys(unsupported))).sampling == RequestSampling()


_VLLM = (
    "messages", "prompt", "model", "frequency_penalty", "presence_penalty", "logit_bias", "logprobs",
    "top_logprobs", "max_tokens", "n", "seed", "stop", "max_completion_tokens", "stream", "stream_options",
    "temperature", "top_p", "user", "response_format", "tools", "tool_choice", "echo", "suffix",
    "parallel_tool_calls", "reasoning_effort", "include_reasoning", "add_generation_prompt",
    "add_special_tokens", "documents", "allowed_token_ids", "bad_words", "cache_salt", "chat_template",
    "chat_template_kwargs", "continue_final_message", "min_p", "min_tokens", "ec_transfer_params",
    "ignore_eos", "include_stop_str_in_output", "kv_transfer_params", "length_penalty",
    "logprob_token_ids", "media_io_kwargs", "mm_payload", "mm_processor_kwargs", "priority",
    "prompt_embeds", "prompt_logprobs", "repetition_detection", "repetition_penalty", "request_id",
    "return_mm_kwargs", "return_prompt_text", "return_token_ids", "return_token_offsets",
    "return_tokens_as_token_ids", "routed_experts_prompt_start", "session_id", "skip_special_tokens",
    "stop_token_ids", "top_k", "spaces_between_special_tokens", "stream_interval", "structured_outputs",
    "thinking_token_budget", "truncate_prompt_tokens", "truncation_side", "use_beam_search", "vllm_xargs",
    "watermarking", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "guided_decoding_backend", "guided_whitespace_pattern", "best_of", "early_stopping",
    "logits_processors",
)  # fmt: skip
"""Every field of vLLM's two bodies, version 0.32, and those that earlier versions and Aphrodite had."""


@pytest.mark.parametrize(
    ("shape", "published"),
    [
        (ChatBody, ChatParams),
        (CompletionBody, CompletionParams),
    ],
)
def test_every_published_field_is_read_or_ignored_or_refused_on_purpose(shape: Any, published: Any) -> None:
    """A new version of the client that knows another field fails here."""
    elsewhere = {"messages", "prompt", "suffix", "best_of", *ChatBody.__struct_fields__}
    known = {*shape.__struct_fields__, *IGNORED, *UNSUPPORTED, *FALSE_ONLY, *READ_ELSEWHERE}
    assert published.__annotations__.keys() <= known
    assert set(_VLLM) <= known | elsewhere
    for name in UNSUPPORTED:
        assert refused(chat(**{name: {"a": 1}})).param == name
    for name in FALSE_ONLY:
        assert refused(chat(**{name: True})).param == name
        read(chat(**{name: False}))
    for name in IGNORED:
        read(chat(**{name: {"a": [1]}}))


def test_what_real_clients_write_in_messages_and_parts_is_accepted() -> None:
    cached = {"cache_control": {"type": "ephemeral"}}
    url = {"url": CAT, "detail": "original", "format": "image/png"}
    text = {"type": "text", "text": "a", "id": "x", "annotations": [], "image_url": None, **cached}
    said = {
        "id": "1",
        "status": "done",
        "prefix": False,
        "images": [],
        "audio": None,
        "image_count": 1,
        **cached,
    }
    turns = [{"role": "user", "content": [text, {"type": "image_url", "image_url": url, **cached}], **said}]
    (turn,) = prompt({"messages": turns}).messages
    assert [type(part) for part in turn.parts] == [TextPart, ImagePart]


def test_types_are_told_as_json_has_them() -> None:
    for body in (
        chat(temperature="hot"), chat(temperature=True), chat(stream=1), chat(stop=5), chat(logit_bias=[]),
        chat(max_tokens=1.5), chat(model=None, tools={}), chat(response_format=[]), chat(stop=["a", None]),
        chat(response_format={}), chat(tool_choice={}), chat(tools=[{"type": 5}]), chat(tools=[{"type": []}]),
        {"messages": [{"role": ["user"], "content": "hi"}]}, {"messages": [{"role": "user", "content": {}}]},
        chat(stream_options={"include_usage": "yes"}), chat(functions=5), chat(structured_outputs={"json": 5}),
    ):  # fmt: skip
        told = refused(body).message
        assert not re.search(r"NoneType|\b(dict|str|int|float|bool|None|True|False|tuple|msgspec)\b|\[\'", told), told
    assert refused(chat(temperature="hot")).message == "temperature: expected `number | null`, got `string`"


def test_harmless_and_unknown_fields_are_accepted() -> None:
    read(
        chat(
            model="whatever you like",
            user="u",
            store=True,
            metadata={"a": "b"},
            service_tier="auto",
            tools=[],
            tool_choice="none",
            parallel_tool_calls=True,
            response_format={"type": "text"},
            modalities=["text"],
            best_of=1,
            echo=False,
            something_new={"x": [1]},
            stream=True,
            stream_options={"include_obfuscation": True},
            stream_interval=8,
        )
    )
    tool = {"type": "function", "function": {"name": "f"}}
    assert prompt(chat(tools=[tool], tool_choice="none")).tools is None


def test_template_switches_reach_the_prompt() -> None:
    asked = prompt(chat(chat_template_kwargs={"thinking": False}, reasoning_effort="low", documents=[{"text": "t"}]))
    assert asked.template_kwargs == {
        "thinking": False,
        "reasoning_effort": "low",
        "documents": [{"text": "t"}],
    }
    assert asked.add_generation_prompt
    resumed = prompt(chat(continue_final_message=True))
    assert (resumed.add_generation_prompt, resumed.continue_final_message) == (False, True)
    assert not prompt(chat(add_generation_prompt=False)).add_generation_prompt


def user(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": list(parts)}]}


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "the king", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "assistant", "refusal": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": {"type": "text"}}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "name": 1}]}, "messages[0].name"),
        ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "messages[0].tool_calls"),
        (user(1), "messages[1].content[0]"),
        (user({}), "messages[1].content[0].type"),
        (user({"type": 3}), "messages[1].content[0].type"),
        (user({"type": "input_audio", "input_audio": {}}), "messages[1].content[0].type"),
        (user({"type": "video_url", "video_url": {"url": CAT}}), "messages[1].content[0].type"),
        (user({"type": "audio_embeds", "audio_embeds": "AAAA"}), "messages[1].content[0].type"),
        (user({"type": "image_embeds", "image_embeds": "AAAA"}), "image_embeds"),
        (user({"type": "file", "file": {"file_id": "f"}}), "messages[1].content[0].type"),
        (user({"type": "image_url", "uuid": "mine"}), "messages[1].content[0].image_url"),
        (user({"type": "image_url", "image_url": None, "uuid": "mine"}), "messages[1].content[0].image_url"),
        (user({"type": "text"}), "messages[1].content[0].text"),
        (user({"type": "text", "text": "a"}, {"type": "text", "text": []}), "messages[1].content[1].text"),
        (user({"type": "image_url"}), "messages[1].content[0].image_url"),
        (user({"type": "image_url", "image_url": {}}), "messages[1].content[0].image_url.url"),
        (user({"type": "image_url", "image_url": {"url": 7}}), "messages[1].content[0].image_url.url"),
        (user({"type": "image_url", "image_url": {"url": ""}}), "messages[1].content[0].image_url.url"),
        (user({"type": "image_url", "image_url": ["a"]}), "messages[1].content[0].image_url"),
        (chat(model=4), "model"),
        (chat(model="m" * 1000), "model"),
        (chat(temperature=-1), "temperature"),
        (chat(temperature="hot"), "temperature"),
        (chat(temperature=True), "temperature"),
        (chat(top_p=0), "top_p"),
        (chat(top_p=1.1), "top_p"),
        (chat(top_k=-2), "top_k"),
        (chat(presence_penalty=3), "presence_penalty"),
        (chat(max_tokens=0), "max_tokens"),
        (chat(max_tokens=5, max_completion_tokens=0), "max_completion_tokens"),
        (chat(max_tokens=1.5), "max_tokens"),
        (chat(n=0), "n"),
        (chat(n=129), "n"),
        (chat(temperature=100.1), "temperature"),
        (chat(top_logprobs=2), "top_logprobs"),
        (chat(logprobs=True, top_logprobs=21), "top_logprobs"),
        (chat(logprobs=5), "logprobs"),
        (chat(stop=[""]), "stop"),
        (chat(stop=["a", 1]), "stop[1]"),
        (chat(seed=2**64), "seed"),
        (chat(seed=10**30), "seed"),
        (chat(logit_bias={"x": 1}), "logit_bias"),
        (chat(logit_bias={"1": 1000}), "logit_bias[...]"),
        (chat(stream_options={"include_usage": True}), "stream_options"),
        (chat(stream=True, stream_options={"include_usages": True}), "stream_options"),
        (chat(response_format={"type": "json_object", "shema": {}}), "response_format"),
        (user({"type": "text", "text": "a", "image_url": {"url": CAT}}), "messages[1].content[0]"),
        (user({"type": "image_url", "image_url": {"url": CAT}, "text": "a"}), "messages[1].content[0]"),
        (user({"type": "image_url", "image_url": {"url": CAT}, "min_pixels": 9}), "messages[1].content[0]"),
        (
            user({"type": "image_url", "image_url": {"url": CAT, "size": 9}}),
            "messages[1].content[0].image_url",
        ),
        (
            user({"type": "image_url", "image_url": {"url": CAT, "detail": "ultra"}}),
            "messages[1].content[0].image_url.detail",
        ),
        (user({"type": "input_image", "image_url": CAT, "detail": 1}), "messages[1].content[0].detail"),
        ({"messages": [{"role": "user", "content": "hi", "images": [CAT]}]}, "messages[0].images"),
        *(
            ({"messages": [{"role": "user", "content": "hi", key: value}]}, f"messages[0].{key}")
            for key, value in [
                ("image_urls", [CAT]),
                ("imageUrl", CAT),
                ("attachments", [{"url": CAT}]),
                ("experimental_attachments", [{"url": CAT}]),
                ("video_url", {"url": CAT}),
                ("input_audio", {"data": "AA"}),
            ]
        ),
        *(
            (user({"type": "text", "text": "a", key: CAT}), "messages[1].content[0]")
            for key in ("image", "imageUrl", "images", "image_embeds", "input_image", "picture")
        ),
        (user({"text": "a", "image": CAT}), "messages[1].content[0]"),
        *(
            ({"messages": [{"role": role, key: "hi"}]}, "messages[0].content")
            for role in ("system", "user", "assistant")
            for key in ("contents", "Content", "content ", "text", "parts", "conten")
        ),
        ({"messages": [{"role": "user", "content": None, "parts": [{"text": "hi"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": "hi", "prefix": True}]}, "messages[0].prefix"),
        (chat(stream="yes"), "stream"),
        (chat(stream=True, prompt_logprobs=1), "prompt_logprobs"),
        (chat(prompt_logprobs=99), "prompt_logprobs"),
        (chat(truncate_prompt_tokens=0), "truncate_prompt_tokens"),
        (chat(continue_final_message=True, add_generation_prompt=True), "continue_final_message"),
        (chat(tools=[{"type": "function"}]), "tools[0].function"),
        (chat(tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="auto"), "tool_choice"),
        (chat(tool_choice="required"), "tool_choice"),
        (chat(functions=[{"name": "f"}]), "function_call"),
        (chat(response_format={}), "response_format"),
        (chat(modalities=["text", "audio"]), "modalities"),
        (chat(audio={"voice": "x"}), "audio"),
        (chat(guided_json=1), "guided_json"),
        (chat(chat_template="{{ x }}"), "chat_template"),
        (chat(best_of=2), "best_of"),
        (chat(use_beam_search=True), "use_beam_search"),
    ],
)
def test_a_bad_value_is_named_with_its_path(body: dict[str, Any], path: str) -> None:
    error = refused(body)
    assert error.status == 400
    assert error.param == path
    assert path in error.message
    assert len(error.message) < 300


@pytest.mark.parametrize("part", [{"type": "image", "image": CAT}, {"type": "image", "source": {"data": "AA"}}])
def test_an_image_in_the_shape_of_another_api_is_told_the_one_that_is_read(part: dict[str, Any]) -> None:
    assert '{"type": "image_url", "image_url": {"url": "..."}}' in refused(user(part)).message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from(
    [
        *read_chat.__globals__["ChatBody"].__struct_fields__,
        "role",
        "content",
        "type",
        "text",
        "image_url",
        "url",
    ]
)


@settings(max_examples=300, deadline=None)
@given(
    body=st.dictionaries(fields, json_values, max_size=5),
    message=st.dictionaries(fields, json_values, max_size=4),
    part=st.dictionaries(fields, json_values, max_size=3),
)
def test_no_body_whatever_crashes_the_reader(
    body: dict[str, Any], message: dict[str, Any], part: dict[str, Any]
) -> None:
    for messages in ([message], [{"role": "user", **message}], [{"role": "user", "content": [part]}]):
        for candidate in ({**body, "messages": messages}, body):
            with suppress(InvalidRequest):
                read(candidate)


# Bodies


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b"", "empty"),
        (b"[]", "object"),
        (b'"x"', "object"),
        (b"null", "object"),
        (b'{"a": 1', "byte"),
        (b'{"a": 1} x', "byte 10"),
        (b'{"a": NaN}', "byte 6"),
        (b'{"a": -Infinity}', "byte"),
        (b'{"a": 1e999}', "out of range"),
        (b"{'a': 1}", "byte 1"),
        (b'{"a": 1,}', "byte"),
        (b'\xff{"a": 1}', "byte 0"),
        (b'{"a": "\xed\xa0\x80"}', "byte 7"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"a": "\\ud800 x"}', "surrogate"),
        (b'{"a": "\\udc00\\ud800"}', "surrogate"),
        (b"[" * 50_000, "deep"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "deep"),
    ],
)
def test_what_is_no_json_object_is_refused_with_where(data: bytes, where: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_body(data, {})
    assert where in caught.value.message


def test_of_a_key_that_is_given_twice_the_last_counts() -> None:
    assert read_body(b'{"a": 1, "b": {"c": 1, "c": 2}, "a": 3}', {}) == {"a": 3, "b": {"c": 2}}


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:\\ud8tfn01.e-', max_size=30).map(str.encode))
def test_no_bytes_whatever_crash_the_body_reader(data: bytes) -> None:
    with suppress(InvalidRequest):
        assert isinstance(read_body(data, {}), dict)


@pytest.mark.parametrize(
    ("content_type", "result"),
    [
        ("application/json", {"a": 1}),
        ("application/json; charset=utf-8", {"a": 1}),
        ("Application/JSON;Charset=UTF-8", {"a": 1}),
        ("application/vnd.x+json", {"a": 1}),
        ("", {"a": 1}),
        ("text/plain", {"inputs": '{"a": 1}'}),
        ("text/csv", 415),
        ("application/octet-stream", 415),
        ("multipart/form-data; boundary=x", 415),
        ("application/json; charset=utf-16", 415),
    ],
)
def test_content_types(content_type: str, result: Any) -> None:
    headers = {"content-type": content_type} if content_type else {}
    if result == 415:
        with pytest.raises(UnsupportedMediaType):
            read_body(b'{"a": 1}', headers)
    else:
        assert read_body(b'{"a": 1}', headers) == result


def test_errors_have_openais_shape_on_its_route_and_for_its_body() -> None:
    async def ask() -> None:
        subject = service(ScriptedBackend(said("x")))
        for body, route in ((b"{", "/v1/chat/completions"), ({"messages": []}, "/invocations")):
            error = json.loads((await subject.answer(incoming(body, route))).body)["error"]
            assert error.keys() == {"message", "type", "param", "code"}
            assert error["type"] == "invalid_request_error"
        assert (await subject.answer(incoming({}))).status == 400

    asyncio.run(ask())


# Writing


def test_a_whole_reply_is_a_chat_completion() -> None:
    image = {"type": "image_url", "image_url": {"url": CAT}}
    reply = completion(said("A ", 'cat "é" \u2028', "."), chat([image], model="my model"))
    assert reply.object == "chat.completion"
    assert reply.id.startswith("chatcmpl-")
    assert reply.model == "my model"
    (choice,) = reply.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == 'A cat "é" \u2028.'
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("stop", 0, None)
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (7, 3, 10)
    details = reply.usage.prompt_tokens_details
    assert details is not None
    assert (details.cached_tokens, details.image_tokens) == (2, 4)
    assert completion(said("x"), chat()).model == "shapes"


def test_a_streamed_reply_is_chunks_and_the_role_comes_with_the_first_token() -> None:
    pieces = ["A", ' "cat"\n', " é🙂\u2028", "."]
    found = chunks(said(*pieces, reason="length"), chat())
    assert [chunk.choices[0].delta.content for chunk in found] == pieces
    assert [chunk.choices[0].delta.role for chunk in found] == ["assistant", None, None, None]
    assert [chunk.choices[0].finish_reason for chunk in found] == [None, None, None, "length"]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in found}) == 1
    assert all(chunk.usage is None for chunk in found)


def test_usage_comes_last_or_with_every_chunk_when_asked_for() -> None:
    found = chunks(said("a", "b"), chat(stream_options={"include_usage": True}))
    assert [bool(chunk.choices) for chunk in found] == [True, True, False]
    assert [chunk.usage is not None for chunk in found] == [False, False, True]
    assert found[-1].usage is not None
    assert found[-1].usage.completion_tokens == 2
    found = chunks(said("a", "b"), chat(stream_options={"include_usage": True, "continuous_usage_stats": True}))
    assert [chunk.usage and chunk.usage.completion_tokens for chunk in found] == [1, 2, 2]


def test_logprobs_whole_and_streamed() -> None:
    body = chat(logprobs=True, top_logprobs=2)
    reply = completion(said("a", "é"), body)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [(t.token, t.logprob, t.bytes) for t in logprobs.content] == [
        ("a", -0.5, [97]),
        ("é", -0.5, [195, 169]),
    ]
    assert [t.token for t in logprobs.content[0].top_logprobs] == ["a", "other"]
    streamed = chunks(said("a", "é"), body)
    contents = [chunk.choices[0].logprobs.content for chunk in streamed]  # type: ignore[union-attr]
    assert [content[0].token for content in contents if content] == ["a", "é"]
    reply = completion(said("a"), chat(logprobs=True))
    assert reply.choices[0].logprobs.content[0].top_logprobs == []  # type: ignore[union-attr,index]


def test_pieces_of_characters_have_no_bytes() -> None:
    chosen = token(1, "\ufffd", -1.5)
    steps: list[Step] = [Delta(0, [1], "x", [PositionLogprobs(chosen, (chosen, token(2, "b", -2.5)))], "stop")]
    logprobs = completion(steps, chat(logprobs=True, top_logprobs=5)).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert (logprobs.content[0].logprob, logprobs.content[0].bytes) == (-1.5, None)
    assert logprobs.content[0].top_logprobs[1].bytes == [ord("b")]


def test_prompt_logprobs_have_vllms_shape() -> None:
    positions = [None, PositionLogprobs(token(5, "hi", -1.0, 2), (token(6, "ho", -0.5, 1),))]
    stats = PromptStats(2, prompt_logprobs=positions)
    reply = completion(said("x"), chat(prompt_logprobs=1), stats=lambda: stats)
    assert reply.model_extra is not None
    assert reply.model_extra["prompt_logprobs"] == [
        None,
        {
            "5": {"logprob": -1.0, "rank": 2, "decoded_token": "hi"},
            "6": {"logprob": -0.5, "rank": 1, "decoded_token": "ho"},
        },
    ]


def test_what_stopped_the_answer_is_told() -> None:
    reply = completion(said("x", stop_reason="END"), chat(stop="END"))
    assert reply.choices[0].model_extra == {"stop_reason": "END"}


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=("Cs",))), min_size=1, max_size=5))
def test_any_text_survives_both_ways(texts: list[str]) -> None:
    assert completion(said(*texts), chat()).choices[0].message.content == "".join(texts)
    found = chunks(said(*texts), chat())
    assert "".join(chunk.choices[0].delta.content or "" for chunk in found) == "".join(texts)


def test_the_reply_id_is_the_clients_request_id() -> None:
    assert completion(said("x"), chat(request_id="mine")).id == "chatcmpl-mine"
    assert completion(said("x"), chat()).id == "chatcmpl-req-1"


def test_the_openai_client_raises_a_stream_error() -> None:
    """An error event is what the client library takes for one."""

    async def ask() -> bytes:
        backend = ScriptedBackend([*said("a", "b")[:1], ServingError("boom")])
        return await everything(await service(backend).answer(incoming(chat(stream=True))))

    data = asyncio.run(ask())

    transport = httpx.MockTransport(
        lambda _: httpx.Response(200, headers={"content-type": "text/event-stream"}, content=data)
    )
    client = openai.OpenAI(base_url="http://x/v1", api_key="x", http_client=httpx.Client(transport=transport))
    stream = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}], stream=True)
    with pytest.raises(openai.APIError, match="boom"):
        list(stream)


# vLLM's fields about the prompt and its tokens


def test_any_role_and_parts_that_say_nothing() -> None:
    turns = prompt(
        {
            "messages": [
                {"role": "function", "name": "f", "content": "42"},
                {
                    "role": "critic-2",
                    "content": [{"type": "text", "text": None}, {"type": "text", "text": "a"}],
                },
                {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}]},
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
                {"role": "assistant", "content": [{"type": "output_text", "text": "yes"}]},
            ]
        }
    ).messages
    assert [(turn.role, turn.parts) for turn in turns] == [
        ("function", [TextPart("42")]),
        ("critic-2", [TextPart("a")]),
        ("assistant", [TextPart("hm")]),
        ("assistant", [TextPart("no")]),
        ("assistant", [TextPart("yes")]),
    ]


def test_a_template_of_the_request_needs_the_operators_trust() -> None:
    body = chat(chat_template="{{ messages }}")
    assert "trust_request_chat_template" in refused(body).message
    trusting = ServerContext("shapes", trust_chat_templates=True)
    asked = read_chat(body, trusting, incoming({})).requests[0].prompt
    assert isinstance(asked, ChatPrompt)
    assert asked.template == "{{ messages }}"


def test_a_template_may_be_chosen_by_its_name() -> None:
    own = ServerContext("shapes", chat_templates={"default": set(), "tool_use": set()})
    task = read_chat(chat(chat_template="tool_use"), own, incoming({}))
    assert isinstance(task.requests[0].prompt, ChatPrompt)
    assert task.requests[0].prompt.template == "tool_use"
    with pytest.raises(InvalidRequest, match="by name: default, tool_use") as caught:
        read_chat(chat(chat_template="rag"), own, incoming({}))
    assert caught.value.param == "chat_template"


def test_the_prompts_cut_and_its_special_tokens() -> None:
    request = read(chat(truncate_prompt_tokens=4, truncation_side="right", add_special_tokens=False))
    assert (request.truncate_prompt_tokens, request.truncation_side) == (4, "right")
    assert isinstance(request.prompt, ChatPrompt)
    assert request.prompt.add_special_tokens is False
    assert prompt(chat()).add_special_tokens is None


def test_ids_of_tokens_are_shown_where_they_are_asked_for() -> None:
    def seen() -> PromptStats:
        return PromptStats(2, prompt_token_ids=[7, 8])

    body = chat(return_token_ids=True)
    reply = json.loads(answer(said("a", "b"), body, stats=seen))
    assert (reply["prompt_token_ids"], reply["choices"][0]["token_ids"]) == ([7, 8], [10, 11])
    lines = answer(said("a", "b"), {**body, "stream": True}, stats=seen).decode().split("\n\n")[:-2]
    events = [json.loads(line[6:]) for line in lines]
    assert [event.get("prompt_token_ids") for event in events] == [[7, 8], None]
    assert [event["choices"][0]["token_ids"] for event in events] == [[10], [11]]
    assert "token_ids" not in json.loads(answer(said("a"), chat(), stats=seen))["choices"][0]


def test_the_prompts_text_is_shown_where_it_is_asked_for() -> None:
    def seen() -> PromptStats:
        return PromptStats(2, prompt_text="<s>hi")

    body = chat(return_prompt_text=True)
    assert json.loads(answer(said("a"), body, stats=seen))["prompt_text"] == "<s>hi"
    lines = answer(said("a", "b"), {**body, "stream": True}, stats=seen).decode().split("\n\n")[:-2]
    assert [json.loads(line[6:]).get("prompt_text") for line in lines] == ["<s>hi", None]


def test_tokens_can_be_shown_as_ids() -> None:
    body = chat(logprobs=True, top_logprobs=2, return_tokens_as_token_ids=True)
    reply = completion(said("a"), body)
    assert reply.choices[0].logprobs is not None
    (shown,) = reply.choices[0].logprobs.content or ()
    assert shown.token == "token_id:10"
    assert shown.bytes == [97]
    assert [other.token for other in shown.top_logprobs] == ["token_id:10", "token_id:99"]


def test_echo_begins_with_the_text_that_the_answer_goes_on_from() -> None:
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I am"}]
    body = {"messages": turns, "continue_final_message": True, "echo": True}
    assert completion(said(" me", "."), body).choices[0].message.content == "I am me."
    found = [chunk.choices[0].delta.content for chunk in chunks(said(" me", "."), body)]
    assert found == ["I am me", "."]
    assert completion(said("Me."), chat("Who?", echo=True)).choices[0].message.content == "Me."
