"""TGI's /generate, /generate_stream and /: the bytes, the words and the meaning."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from engine.sampling_params import MAX_SEED
from handlers.deltas import Delta, PositionLogprobs, PromptStats
from handlers.errors import ContextExceeded, EngineFailed, InvalidRequest, Unavailable
from handlers.protocols.base import ServerContext, Task
from handlers.protocols.tgi.requests import read_tgi
from handlers.request import ImagePart, Reply, RequestSampling, TextPart, TextPrompt
from tests.support.live import LiveServer, data_url
from tests.support.scripted import (
    ScriptedBackend,
    ScriptedImages,
    Step,
    everything,
    incoming,
    said,
    service,
    token,
)

FAILED = "Request failed during generation: Server error:"
END = 2
"""The id of the end of a sequence in these scripts."""


def task(inputs: Any = "hi", route: str = "/generate", **parameters: Any) -> Task:
    context = ServerContext("shapes", {"temperature": 0.3, "top_k": 7}, max_model_len=64)
    return read_tgi({"inputs": inputs, "parameters": parameters}, context, incoming({}, route))


def sampling(**parameters: Any) -> RequestSampling:
    return task(**parameters).requests[0].sampling


def answer(body: Any, steps: Any = None, route: str = "/generate", **options: Any) -> Reply:
    """stats, headers and limits of the service may be named."""
    stats = options.pop("stats", lambda: PromptStats(7))
    headers = options.pop("headers", {})

    async def ask() -> Reply:
        backend = ScriptedBackend(
            steps or said("a", " b"),
            stats=stats,
            special_token_ids={END},
            structured_outputs=True,
            compute_type="1-nvidia-a10g",
        )
        server = service(backend, ScriptedImages(), **{"limit_mm_per_prompt": {"image": 9}, **options})
        reply = await server.answer(incoming(body, route, **headers))
        reply.body = await everything(reply)
        return reply

    return asyncio.run(ask())


def result(body: Any, steps: Any = None, route: str = "/generate", **options: Any) -> Any:
    reply = answer(body, steps, route, **options)
    assert (reply.status, reply.content_type) == (200, "application/json"), reply.body
    return json.loads(reply.body)


def events(body: Any, steps: Any = None, route: str = "/generate_stream", **options: Any) -> list[Any]:
    reply = answer(body, steps, route, **options)
    assert (reply.status, reply.content_type) == (200, "text/event-stream"), reply.body
    parts = reply.body.split(b"\n\n")
    assert parts.pop() == b""
    assert all(part.startswith(b"data: ") and b"\n" not in part for part in parts)
    return [json.loads(part[6:]) for part in parts]


def ended(*texts: str, text_at_end: str = "") -> list[Step]:
    """An answer that the model ends by itself: its last token is the end's."""
    steps = said(*texts, "")
    last = steps[-1]
    assert isinstance(last, Delta)
    last.token_ids, last.text, last.pieces, last.eos = [END], text_at_end, [text_at_end], True
    last.logprobs = [PositionLogprobs(token(END, "</s>", -0.25), ())]
    return steps


# Reading


def test_without_parameters_it_draws_and_with_an_empty_object_it_does_not() -> None:
    context = ServerContext("shapes", {"temperature": 0.3}, max_model_len=64)
    for body in ({"inputs": "x"}, {"inputs": "x", "parameters": None}):
        drawn = read_tgi(body, context, incoming({}, "/generate")).requests[0].sampling
        assert (drawn.temperature, drawn.max_tokens) == (1.0, None)
        assert drawn.seed is not None
    assert sampling() == RequestSampling(temperature=0.0)


@pytest.mark.parametrize(
    "parameters",
    [{"do_sample": True}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.9}, {"typical_p": 0.5}],
)
def test_a_value_that_changes_the_draw_asks_for_one(parameters: dict[str, Any]) -> None:
    asked = sampling(**parameters, seed=3)
    assert asked.temperature == parameters.get("temperature", 1.0)
    assert asked.seed == 3
    assert sampling(temperature=1.0, top_p=1.0, typical_p=1.0, seed=3).greedy


def test_every_parameter_reaches_the_engine() -> None:
    asked = task(
        adapter_id="cats",
        best_of=1,
        decoder_input_details=True,
        details=True,
        do_sample=True,
        frequency_penalty=0.3,
        grammar={"type": "regex", "value": "a+"},
        max_new_tokens=5,
        repetition_penalty=1.2,
        return_full_text=True,
        seed=2**64 - 1,
        stop=["END"],
        stop_sequences=["\n"],
        temperature=0.5,
        top_k=4,
        top_n_tokens=3,
        top_p=0.9,
        truncate=10,
        typical_p=0.8,
        watermark=True,
        unknown=[1],
    ).requests[0]
    assert asked.adapter == "cats"
    assert asked.truncate_prompt_tokens == 10
    assert asked.constraint is not None
    assert asked.constraint.value == "a+"
    assert asked.sampling == RequestSampling(
        max_tokens=5,
        temperature=0.5,
        top_k=4,
        top_p=0.9,
        typical_p=0.8,
        repetition_penalty=1.2,
        frequency_penalty=0.3,
        seed=MAX_SEED,
        stop=("END", "\n"),
        include_stop_str_in_output=True,
        logprobs=3,
        prompt_logprobs=0,
    )


def test_null_is_as_good_as_nothing() -> None:
    names = "best_of decoder_input_details details do_sample grammar stop seed top_k truncate watermark"
    assert sampling(**dict.fromkeys(names.split())) == RequestSampling(temperature=0.0)


def test_stops_under_both_names_as_one_text_or_several() -> None:
    assert sampling(stop="a").stop == ("a",)
    assert sampling(stop=["a"] * 16).stop == ("a",) * 16
    assert sampling(stop="a", stop_sequences=["b", "c"]).stop == ("a", "b", "c")


def test_an_adapter_that_is_not_there() -> None:
    reply = answer({"inputs": "x", "parameters": {"adapter_id": "cats"}})
    assert (reply.status, json.loads(reply.body)["error_type"]) == (404, "not_found")
    assert result({"inputs": "x", "parameters": {"adapter_id": ""}})["generated_text"] == "a b"


def test_images_stand_in_the_text() -> None:
    prompt = task("a ![](https://p.example/1.png) b").requests[0].prompt
    assert prompt == TextPrompt([TextPart("a "), ImagePart("https://p.example/1.png"), TextPart(" b")])


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"best_of": 0}, "`best_of` must be > 0 and <= 128. Given: 0"),
        ({"best_of": 129}, "`best_of` must be > 0 and <= 128. Given: 129"),
        ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
        ({"best_of": 2, "top_k": 3, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
        ({"temperature": 0}, "`temperature` must be strictly positive"),
        ({"temperature": -0.1}, "`temperature` must be strictly positive"),
        ({"repetition_penalty": 0}, "`repetition_penalty` must be strictly positive"),
        ({"frequency_penalty": 2.5}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        ({"top_k": 0}, "`top_k` must be strictly positive"),
        ({"top_p": 0}, "`top_p` must be > 0.0 and <= 1.0"),
        ({"top_p": 1.01}, "`top_p` must be > 0.0 and <= 1.0"),
        ({"typical_p": 0}, "`typical_p` must be > 0.0 and <= 1.0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
        ({"stop": ["a"] * 17}, "`stop` supports up to 16 stop sequences. Given: 17"),
        ({"truncate": 0}, "`truncate` must be strictly positive and less than 64. Given: 0"),
        ({"truncate": 65}, "`truncate` must be strictly positive and less than 64. Given: 65"),
        ({"top_n_tokens": 21}, "`top_n_tokens` must be >= 0 and <= 20. Given: 21"),
        ({"seed": -1}, "`seed` must be >= 0 and < 2^64"),
        ({"seed": 2**64}, "`seed` must be >= 0 and < 2^64"),
        ({"max_new_tokens": "5"}, "parameters.max_new_tokens: expected `integer | null`, got `string`"),
        ({"grammar": {"type": "regex"}}, "grammar.value must be a text that is not empty"),
    ],
)
@pytest.mark.parametrize("route", ["/generate", "/generate_stream", "/"])
def test_what_is_wrong_is_said_in_tgis_words_before_any_stream(
    parameters: dict[str, Any], words: str, route: str
) -> None:
    reply = answer({"inputs": "x", "parameters": parameters, "stream": True}, route=route)
    assert (reply.status, reply.content_type) == (422, "application/json")
    error = {"error": f"Input validation error: {words}", "error_type": "validation"}
    assert json.loads(reply.body) == error


def test_what_a_stream_cannot_have() -> None:
    for parameters, words in (
        ({"best_of": 2, "do_sample": True}, "`best_of` != 1 is not supported when streaming tokens"),
        (
            {"decoder_input_details": True},
            "`decoder_input_details` == true is not supported when streaming tokens",
        ),
    ):
        task(**parameters)
        with pytest.raises(InvalidRequest) as caught:
            task(route="/generate_stream", **parameters)
        assert caught.value.message == words


def test_empty_inputs_and_no_inputs() -> None:
    reply = answer({"inputs": ""})
    assert json.loads(reply.body)["error"] == "Input validation error: `inputs` cannot be empty"
    reply = answer({"parameters": {}})
    assert (reply.status, json.loads(reply.body)["error_type"]) == (422, "validation")


# Whole replies


def test_a_bare_object_or_a_list_as_the_route_has_it() -> None:
    body = {"inputs": "x", "parameters": {}}
    assert answer(body).body == b'{"generated_text":"a b"}'
    assert answer(body, route="/").body == b'[{"generated_text":"a b"}]'
    assert answer({**body, "stream": True}).body == b'{"generated_text":"a b"}'
    assert answer(body, route="/generate_stream").content_type == "text/event-stream"
    assert answer({**body, "stream": True}, route="/").content_type == "text/event-stream"


def test_details_byte_for_byte() -> None:
    reply = answer({"inputs": "x", "parameters": {"details": True, "do_sample": True, "seed": 9}}, ended("a"))
    assert reply.body == (
        b'{"generated_text":"a","details":{"finish_reason":"eos_token","generated_tokens":2,"seed":9,'
        b'"prefill":[],"tokens":[{"id":10,"text":"a","logprob":-0.5,"special":false},'
        b'{"id":2,"text":"</s>","logprob":-0.25,"special":true}]}}'
    )


def test_numbers_of_32_bits_are_printed_as_the_same_numbers_of_64() -> None:
    steps = said("a", logprobs=[PositionLogprobs(token(10, "a", float(np.float32(-0.1))), ())])
    reply = answer({"inputs": "x", "parameters": {"details": True}}, steps)
    assert b'"logprob":-0.10000000149011612,' in reply.body


def test_why_an_answer_ended() -> None:
    body = {"inputs": "x", "parameters": {"details": True}}
    for steps, reason in (
        (said("a", reason="length"), "length"),
        (said("a", stop_reason="a"), "stop_sequence"),
        (ended("a"), "eos_token"),
    ):
        assert result(body, steps)["details"]["finish_reason"] == reason
        assert events(body, steps)[-1]["details"]["finish_reason"] == reason


def test_the_seed_is_told_where_one_was_drawn_from() -> None:
    def seed(**parameters: Any) -> Any:
        return result({"inputs": "x", "parameters": {"details": True, **parameters}})["details"]["seed"]

    assert seed(seed=5) is None
    assert seed(seed=5, do_sample=True) == 5
    assert seed(seed=2**64 - 1, do_sample=True) == 2**64 - 1
    drawn = {seed(do_sample=True) for _ in range(3)}
    assert len(drawn) == 3
    assert all(0 <= one < 2**53 for one in drawn)


def test_the_prompt_itself_in_the_reply() -> None:
    stats = PromptStats(
        2,
        prompt_token_ids=[1, 5],
        prompt_logprobs=[None, PositionLogprobs(token(5, "x", -1.25), ())],
        first_token_text="<s>",
    )
    body = {"inputs": "x", "parameters": {"decoder_input_details": True, "return_full_text": True}}
    reply = result(body, stats=lambda: stats)
    assert reply["generated_text"] == "xa b"
    assert reply["details"]["prefill"] == [
        {"id": 1, "text": "<s>", "logprob": None},
        {"id": 5, "text": "x", "logprob": -1.25},
    ]


def test_the_best_of_several_by_the_mean_of_their_logprobs() -> None:
    steps = [*said("likely"), *said("unlikely", index=1), *said("x", "y", index=2)]
    for number, logprob in ((1, -3.0), (2, -0.6), (3, -0.6)):
        step = steps[number]
        assert isinstance(step, Delta)
        step.logprobs = [PositionLogprobs(token(10, "z", logprob), ())]
    body = {
        "inputs": "in ",
        "parameters": {"best_of": 3, "do_sample": True, "details": True, "return_full_text": True},
    }
    reply = result(body, steps)
    assert reply["generated_text"] == "in likely"
    details = reply["details"]
    others = details["best_of_sequences"]
    assert [other["generated_text"] for other in others] == ["in xy", "in unlikely"]
    assert [len(other["tokens"]) for other in others] == [2, 1]
    seeds = [details["seed"], *(other["seed"] for other in others)]
    assert [seed - seeds[0] for seed in seeds] == [0, 2, 1]
    assert list(others[0]) == [
        "generated_text",
        "finish_reason",
        "generated_tokens",
        "seed",
        "prefill",
        "tokens",
    ]


def test_top_tokens() -> None:
    body = {"inputs": "x", "parameters": {"details": True, "top_n_tokens": 2}}
    shown = [
        {"id": 10, "text": "a", "logprob": -0.5, "special": False},
        {"id": 99, "text": "other", "logprob": -2.0, "special": False},
    ]
    assert result(body, said("a"))["details"]["top_tokens"] == [shown]
    assert events(body, said("a"))[0]["top_tokens"] == shown
    assert "top_tokens" not in events({"inputs": "x"}, said("a"))[0]


# Streams


def test_a_stream_byte_for_byte() -> None:
    reply = answer({"inputs": "x", "parameters": {"details": True}}, ended(" Ä"), "/generate_stream")
    assert reply.body.decode() == (
        'data: {"index":1,"token":{"id":10,"text":" Ä","logprob":-0.5,"special":false},'
        '"generated_text":null,"details":null}\n\n'
        'data: {"index":2,"token":{"id":2,"text":"","logprob":-0.25,"special":true},'
        '"generated_text":" Ä","details":{"finish_reason":"eos_token","generated_tokens":2,"seed":null,'
        '"input_length":7}}\n\n'
    )


def test_texts_of_tokens_that_are_no_special_ones_add_up() -> None:
    """Also where text was held back, several tokens came together, or the end brought some text with it."""
    split = Delta(0, [30, 31], "ö!", [PositionLogprobs(token(n, "\ufffd"), ()) for n in (30, 31)])
    steps = [Delta(0, [29], ""), split, *ended("b", text_at_end="tail")]
    seen = events({"inputs": "p ", "parameters": {"return_full_text": True}}, steps)
    assert [event["index"] for event in seen] == [1, 2, 3, 4, 5]
    text = "".join(event["token"]["text"] for event in seen if not event["token"]["special"])
    assert text == "ö!btail"
    assert [event["generated_text"] for event in seen] == [None] * 4 + ["p ö!btail"]
    assert [event["details"] for event in seen] == [None] * 5


def test_tokens_that_came_together_with_the_end() -> None:
    positions = [PositionLogprobs(token(30, "a"), ()), PositionLogprobs(token(END, "</s>"), ())]
    for text in ("a", " a"):
        last = Delta(0, [30, END], text, positions, finish_reason="stop", eos=True, pieces=[text, ""])
        shown = [event["token"] for event in events({"inputs": "x"}, [last])]
        assert [(one["text"], one["special"]) for one in shown] == [(text, False), ("", True)]


def test_silence_is_filled_with_an_empty_comment() -> None:
    reply = answer({"inputs": "x"}, said("a", "b", pause=0.05), "/generate_stream", keep_alive=0.01)
    assert b"}\n\n:\n\n" in reply.body
    assert b"[DONE]" not in reply.body


# Errors


def test_an_error_after_the_first_token_is_an_event() -> None:
    reply = answer({"inputs": "x"}, [*said("a", reason=None), EngineFailed("the engine died")], "/generate_stream")
    assert reply.status == 200
    *_, last = reply.body.split(b"\n\n")[:-1]
    assert json.loads(last.removeprefix(b"data: ")) == {
        "error": "Request failed during generation: Server error: the engine died",
        "error_type": "generation",
    }


@pytest.mark.parametrize(
    ("error", "status", "words", "kind"),
    [
        (EngineFailed("it died"), 424, "Request failed during generation: Server error: it died", "generation"),
        (RuntimeError("/secret/path"), 500, f"{FAILED} internal error", "generation"),
        (Unavailable("it restarts", retry_after=5), 429, "it restarts", "overloaded"),
        (
            ContextExceeded(prompt_tokens=60, max_tokens=10, context=64),
            422,
            "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 64. "
            "Given: 60 `inputs` tokens and 10 `max_new_tokens`",
            "validation",
        ),
        (
            ContextExceeded(prompt_tokens=70, max_tokens=None, context=64),
            422,
            "Input validation error: `inputs` must have less than 63 tokens. Given: 70",
            "validation",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("route", ["/generate", "/generate_stream"])
def test_an_error_before_the_first_token_has_a_status(
    error: Exception, status: int, words: str, kind: str, route: str
) -> None:
    reply = answer({"inputs": "x"}, [error], route)
    told = json.loads(reply.body)
    assert (reply.status, told["error_type"]) == (status, kind)
    assert told["error"].startswith(words)
    assert "secret" not in told["error"]
    assert ("Retry-After" in reply.headers) == (status == 429)


def test_overload_and_time() -> None:
    async def crowd() -> list[Reply]:
        server = service(ScriptedBackend(said("a", pause=0.2)), job_queue_size=1, max_rolling_batch_size=1)
        return list(await asyncio.gather(*(server.answer(incoming({"inputs": "x"}, "/generate")) for _ in range(3))))

    *_, refused = asyncio.run(crowd())
    assert (refused.status, json.loads(refused.body)) == (
        429,
        {"error": "Model is overloaded", "error_type": "overloaded"},
    )
    late = answer({"inputs": "x"}, said("a", pause=0.2), predict_timeout=0.01)
    assert (late.status, json.loads(late.body)["error_type"]) == (408, "incomplete_generation")


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"", "application/json", 400),
        (b'{"inputs":"\xff"}', "application/json", 400),
        (b"<xml/>", "text/xml", 415),
    ],
)
def test_bodies_that_are_none(body: bytes, content_type: str, status: int) -> None:
    reply = answer(body, headers={"content-type": content_type})
    assert reply.status == status
    assert set(json.loads(reply.body)) == {"error", "error_type"}


def test_hugging_faces_javascript_client_gets_errors_that_it_can_show() -> None:
    agent = {"user-agent": "@huggingface/inference/4.13.30 (node)"}
    body = {"messages": [{"role": "user", "content": "x"}]}
    route = "/v1/chat/completions"
    reply = answer(body, [Unavailable("restarting", retry_after=5)], route, headers=agent)
    assert (reply.status, json.loads(reply.body)["error"]) == (429, "restarting")
    assert answer(body, [Unavailable("restarting")], route).status == 503


# Headers


def test_what_the_headers_say() -> None:
    body = {"inputs": "hello ![](https://p.example/1.png)", "parameters": {}}
    headers = answer(body, said("a", "b", "c", pause=0.02), stats=lambda: PromptStats(7, queued=0.01)).headers
    times = {
        name: int(headers[f"x-{name}"])
        for name in ("total-time", "validation-time", "queue-time", "inference-time", "time-per-token")
    }
    assert times["total-time"] >= 60
    assert times["queue-time"] == 10
    assert (
        times["total-time"] - 3
        <= sum(times[name] for name in ("validation-time", "queue-time", "inference-time"))
        <= times["total-time"]
    )
    assert abs(times["time-per-token"] - times["inference-time"] / 3) <= 1
    assert float(headers["x-compute-time"]) * 1000 - times["total-time"] < 1
    counted = [headers[f"x-{name}"] for name in ("prompt-tokens", "generated-tokens", "compute-characters")]
    assert counted == ["7", "3", str(len(body["inputs"]))]
    assert headers["x-compute-type"] == "1-nvidia-a10g"


def test_a_stream_says_what_is_known_when_it_begins() -> None:
    headers = answer({"inputs": "hello"}, route="/generate_stream").headers
    assert headers == {
        "x-compute-type": "1-nvidia-a10g",
        "x-compute-characters": "5",
        "x-accel-buffering": "no",
    }


# What TGI's users send to OpenAI's routes


def test_a_chat_as_tgis_clients_send_it() -> None:
    text = {"type": "text", "text": "hi", "image_url": None}
    image = {"type": "image_url", "image_url": {"url": "https://p.example/1.png"}, "text": None}
    turn = {"role": "user", "content": [text, image], "name": None, "tool_calls": None}
    nulls = ("logit_bias", "logprobs", "n", "seed", "stop", "stream_options", "temperature", "tool_choice")
    body = {
        **dict.fromkeys((*nulls, "tools", "tool_prompt", "top_logprobs", "frequency_penalty")),
        "model": "tgi",
        "messages": [turn],
        "top_p": 1.0,
        "presence_penalty": 0.0,
        "stream": False,
        "response_format": {"type": "json", "value": {"type": "object", "properties": {"a": {}}}},
    }
    reply = result(body, said("a", "END", stop_reason="END"), "/v1/chat/completions")
    assert reply["model"] == "tgi"
    assert isinstance(reply["system_fingerprint"], str)
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["total_tokens"] == 9
    headers = answer(body, route="/v1/chat/completions").headers
    assert headers["x-prompt-tokens"] == "7"


def test_a_completion_as_hugging_faces_javascript_client_sends_it() -> None:
    flattened = {
        "max_new_tokens": 5,
        "return_full_text": False,
        "do_sample": True,
        "details": True,
        "truncate": 9,
    }
    body = {
        "model": "http://host:8080",
        "prompt": "a ![](https://p.example/1.png)",
        "max_tokens": 5,
        **flattened,
    }
    reply = result(body, route="/v1/completions")
    assert reply["choices"][0]["text"] == "a b"
    assert reply["model"] == "http://host:8080"
    seen = answer({**body, "stream": True}, route="/v1/completions")
    assert seen.content_type.startswith("text/event-stream")
    assert seen.body.endswith(b"data: [DONE]\n\n")


# The real model


@pytest.fixture(scope="module")
def server(shapes_server: LiveServer) -> LiveServer:
    return shapes_server


def circle(color: str) -> Image.Image:
    image = Image.new("RGB", (320, 240), "white")
    ImageDraw.Draw(image).ellipse((90, 50, 230, 190), fill=color)
    return image


def prompt(*colors: str, question: str = "What is this an image of?") -> str:
    images = "".join(f"![]({data_url(circle(color))})" for color in colors)
    return f"<s><|user|>{images}{question}</s><|assistant|>"


def stream_of(server: LiveServer, path: str, body: dict[str, Any]) -> list[Any]:
    with server.http.stream("POST", path, json=body) as reply:
        assert reply.headers["content-type"] == "text/event-stream"
        assert reply.headers["x-compute-type"] == "cpu"
        lines = [line for line in reply.iter_lines() if line and not line.startswith(":")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.mark.parametrize("color", ["red", "blue"])
def test_an_image_in_and_the_right_answer_out(server: LiveServer, color: str) -> None:
    body = {"inputs": prompt(color), "parameters": {"max_new_tokens": 20, "details": True}}
    reply = server.http.post("/generate", json=body)
    whole = reply.json()
    assert whole["generated_text"] == f"a {color} circle"
    assert whole["details"]["finish_reason"] == "eos_token"
    tokens = whole["details"]["tokens"]
    assert "".join(one["text"] for one in tokens if not one["special"]) == whole["generated_text"]
    assert (tokens[-1]["text"], tokens[-1]["special"]) == ("</s>", True)
    assert reply.headers["x-generated-tokens"] == str(len(tokens))
    assert int(reply.headers["x-prompt-tokens"]) > 64
    seen = stream_of(server, "/generate_stream", body)
    assert "".join(event["token"]["text"] for event in seen) == whole["generated_text"]
    assert seen[-1]["generated_text"] == whole["generated_text"]
    assert seen[-1]["details"]["input_length"] == int(reply.headers["x-prompt-tokens"])
    assert [event["token"]["id"] for event in seen] == [one["id"] for one in tokens]


def test_the_root_answers_with_a_list_or_a_stream_as_the_body_says(server: LiveServer) -> None:
    body = {"inputs": prompt("red"), "parameters": {}}
    for path in ("/", "/v1"):
        assert server.http.post(path, json=body).json() == [{"generated_text": "a red circle"}]
        seen = stream_of(server, path, {**body, "stream": True})
        assert seen[-1]["generated_text"] == "a red circle"
        assert [event["index"] for event in seen] == list(range(1, len(seen) + 1))


def test_two_images_and_which_comes_first(server: LiveServer) -> None:
    question = "What is in the second image?"
    for colors in (("red", "blue"), ("blue", "red")):
        body = {"inputs": prompt(*colors, question=question), "parameters": {}}
        assert server.http.post("/generate", json=body).json()["generated_text"] == f"a {colors[1]} circle"


def test_a_stop_string_is_kept(server: LiveServer) -> None:
    parameters = {"stop": [" red"], "details": True}
    body = {"inputs": prompt("red"), "parameters": parameters}
    reply = server.http.post("/generate", json=body).json()
    assert reply["generated_text"] == "a red"
    assert reply["details"]["finish_reason"] == "stop_sequence"
    assert stream_of(server, "/generate_stream", body)[-1]["generated_text"] == "a red"


def test_the_documentations_all_parameters_example(server: LiveServer) -> None:
    parameters = {
        "max_new_tokens": 10,
        "repetition_penalty": 1.2,
        "return_full_text": True,
        "stop": ["test"],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 10,
        "truncate": 5,
        "typical_p": 0.9,
        "watermark": True,
        "decoder_input_details": True,
        "details": True,
        "seed": 0,
    }
    reply = server.http.post("/generate", json={"inputs": "Test request", "parameters": parameters}).json()
    details = reply["details"]
    assert reply["generated_text"].startswith("Test request")
    assert details["seed"] == 0
    assert len(details["tokens"]) == details["generated_tokens"] <= 10
    assert 0 < len(details["prefill"]) <= 5
    assert details["prefill"][0]["logprob"] is None
    assert all(one["logprob"] < 0 for one in details["prefill"][1:])
    again = server.http.post("/generate", json={"inputs": "Test request", "parameters": parameters}).json()
    assert again == reply


def test_the_best_of_two_draws(server: LiveServer) -> None:
    parameters = {"best_of": 2, "do_sample": True, "temperature": 2.0, "details": True, "max_new_tokens": 8}
    reply = server.http.post("/generate", json={"inputs": prompt("red"), "parameters": parameters}).json()
    (other,) = reply["details"]["best_of_sequences"]
    means = [sum(one["logprob"] for one in each["tokens"]) / len(each["tokens"]) for each in (reply["details"], other)]
    assert means[0] >= means[1]
    assert other["seed"] != reply["details"]["seed"]


def test_an_answer_in_a_grammar(server: LiveServer) -> None:
    grammar = {
        "type": "json",
        "value": {
            "type": "object",
            "properties": {"color": {"enum": ["red", "blue"]}},
            "required": ["color"],
            "additionalProperties": False,
        },
    }
    body = {"inputs": prompt("red"), "parameters": {"grammar": grammar, "max_new_tokens": 40}}
    assert json.loads(server.http.post("/generate", json=body).json()["generated_text"]) == {"color": "red"}
    body["parameters"]["grammar"] = {"type": "regex", "value": "a (green|red) (square|circle)"}
    seen = stream_of(server, "/generate_stream", body)
    assert seen[-1]["generated_text"] == "a red circle"


def test_a_grammar_that_is_none_is_a_422_also_for_a_stream(server: LiveServer) -> None:
    for path in ("/generate", "/generate_stream"):
        for grammar in ({"type": "regex", "value": "(("}, {"type": "json", "value": {"type": "nonsense"}}):
            reply = server.http.post(path, json={"inputs": "x", "parameters": {"grammar": grammar}})
            assert reply.status_code == 422, reply.text
            assert reply.json()["error_type"] == "validation"


def test_lengths_in_tgis_words(server: LiveServer) -> None:
    body = {"inputs": "hi", "parameters": {"max_new_tokens": 5000}}
    for path in ("/generate", "/generate_stream"):
        reply = server.http.post(path, json=body)
        assert reply.status_code == 422
        assert reply.json()["error"].startswith(
            "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: "
        )
    reply = server.http.post("/generate", json={"inputs": "? " * 5000})
    assert reply.json()["error"].startswith("Input validation error: `inputs` must have less than 4095 tokens")


def test_more_than_1024_tokens_come_in_one_go(server: LiveServer) -> None:
    """TGI would queue the rest again, and fetch the image again."""
    before = server.metrics()["lmi_images_total"]
    grammar = {"type": "regex", "value": "([a-z]{1,8}[ ]){2000}"}
    parameters = {"max_new_tokens": 1030, "grammar": grammar, "details": True}
    reply = server.http.post("/generate", json={"inputs": prompt("red"), "parameters": parameters}).json()
    assert reply["details"]["generated_tokens"] == len(reply["details"]["tokens"]) == 1030
    assert reply["details"]["finish_reason"] == "length"
    assert server.metrics()["lmi_images_total"] - before == 1


def test_an_image_that_is_none_names_itself(server: LiveServer) -> None:
    body = {"inputs": "![](data:image/png;base64,QUJD) what?"}
    for path in ("/generate", "/generate_stream", "/"):
        reply = server.http.post(path, json=body)
        assert (reply.status_code, reply.json()["error_type"]) == (422, "validation")
        assert "image 0" in reply.json()["error"]
        assert "QUJD" not in reply.json()["error"]


def test_an_image_of_a_refused_request_can_be_asked_about_again(server: LiveServer) -> None:
    """vLLM would hold that its engine has it already."""
    body = {"inputs": prompt("green"), "parameters": {"max_new_tokens": 4060}}
    refused = server.http.post("/generate", json=body)
    assert (refused.status_code, refused.json()["error_type"]) == (422, "validation")
    body["parameters"] = {"max_new_tokens": 20}
    assert server.http.post("/generate", json=body).json()["generated_text"] == "a green circle"


def test_four_at_once_answer_alike(server: LiveServer) -> None:
    from concurrent.futures import ThreadPoolExecutor

    body = {"inputs": prompt("red"), "parameters": {"max_new_tokens": 10, "details": True}}
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda _: server.http.post("/generate", json=body).json(), range(4)))
    assert all(reply["generated_text"] == replies[0]["generated_text"] for reply in replies)
