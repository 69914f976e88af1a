"""Bodies that mean harm: numbers beyond all arrays, wrong types, too much of everything. Always a 4xx."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handlers.errors import ContextExceeded, InvalidParameter
from handlers.request import GenerationRequest, Reply
from tests.support.scripted import (
    ScriptedBackend,
    ScriptedGeneration,
    ScriptedImages,
    Watched,
    chat,
    everything,
    incoming,
    said,
    service,
)

HUGE = [2**63, -(2**63) - 1, 2**64 - 1, 2**70, -(2**70), 10**400]
ROUTES = {"messages": "/v1/chat/completions", "inputs": "/invocations"}


def answer(body: Any, backend: ScriptedBackend | None = None, **options: Any) -> Reply:
    async def ask() -> Reply:
        subject = service(backend or ScriptedBackend(said("a")), **options)
        reply = await subject.answer(incoming(body))
        reply.body = await everything(reply)
        assert subject.in_flight == 0
        return reply

    return asyncio.run(ask())


def refusal(body: Any) -> str:
    reply = answer(body)
    assert reply.status == 400, reply.body[:300]
    return reply.body.decode()


def lmi(**parameters: Any) -> dict[str, Any]:
    return {"inputs": "hi", "parameters": parameters}


@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize(
    "name",
    [
        *("top_k", "min_tokens", "priority", "seed", "n", "max_tokens", "max_completion_tokens"),
        *("top_logprobs", "prompt_logprobs", "truncate_prompt_tokens", "temperature", "frequency_penalty"),
    ],
)
def test_a_huge_number_in_a_chat_is_a_400_that_names_its_field(name: str, value: int) -> None:
    assert name in refusal(chat(logprobs=True, **{name: value}))


@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize(
    "name",
    ["max_new_tokens", "min_new_tokens", "top_k", "seed", "top_n_tokens", "truncate", "temperature", "n"],
)
def test_a_huge_number_among_lmi_parameters_is_a_400_that_names_its_field(name: str, value: int) -> None:
    assert f"parameters.{name}" in refusal(lmi(**{name: value}))


@pytest.mark.parametrize("value", HUGE)
def test_token_ids_are_bounded(value: int) -> None:
    assert "stop_token_ids" in refusal(chat(stop_token_ids=[value]))
    assert "parameters.stop_token_ids" in refusal(lmi(stop_token_ids=[1, value]))
    assert "logit_bias" in refusal(chat(logit_bias={str(value): 1}))
    assert "logit_bias" in refusal(chat(logit_bias={"1": value}))


def test_numbers_of_thousands_of_digits_are_named() -> None:
    digits = "1" + "0" * 5000
    for number in (digits, "-" + digits, "1e400", "-1e400"):
        for name in ("top_k", "seed", "n", "temperature"):
            body = f'{{"messages": [{{"role": "user", "content": "hi"}}], "{name}": {number}}}'
            assert f"{name} is a number out of range" in refusal(body.encode())
        body = f'{{"inputs": "hi", "parameters": {{"stop_token_ids": [1, {number}]}}}}'
        assert "stop_token_ids is a number out of range" in refusal(body.encode())
    assert "logit_bias" in refusal(chat(logit_bias={"9" * 5000: 1}))


def test_stops_are_bounded() -> None:
    assert answer(chat(stop=["x" * 1000] * 16, stop_token_ids=[2**31 - 1] * 1024)).status == 200
    assert "stop" in refusal(chat(stop=["x"] * 17))
    assert "stop" in refusal(chat(stop="x" * 1001))
    assert "stop_token_ids" in refusal(chat(stop_token_ids=[1] * 1025))
    assert "parameters.stop_sequences" in refusal(lmi(stop_sequences=["x"] * 9, stop=["y"] * 9))
    assert "parameters.stop_sequences" in refusal(lmi(stop_sequences=["x" * 1001]))


def test_negative_seeds_stand_for_positive_ones_but_for_the_one_that_is_none() -> None:
    backend = ScriptedBackend(said("a"))
    for seed in (-1, -2, -(2**63), 2**63 - 1, 0):
        assert answer(chat(seed=seed), backend).status == 200
    assert [r.sampling.seed for r in backend.requests] == [None, 2**63 - 2, 0, 2**63 - 1, 0]


def test_a_priority_is_ignored_unless_it_is_allowed() -> None:
    backend = ScriptedBackend(said("a"))
    for allowed, asked, expected in [
        (False, -5, 0),
        (True, -5, -5),
        (True, 10**9, 1000),
        (True, -(10**9), -1000),
    ]:
        assert answer(chat(priority=asked), backend, request_priorities=allowed).status == 200
        assert backend.requests[-1].priority == expected


def test_every_answer_takes_a_place() -> None:
    backend = ScriptedBackend(said("a", pause=0.1))
    places: dict[str, Any] = {"job_queue_size": 2, "max_rolling_batch_size": 2}
    reply = answer(chat(n=5), **places)
    assert reply.status == 400
    assert b"asks for 5 answers" in reply.body
    assert b"at most 4" in reply.body

    async def together() -> list[int]:
        subject = service(ScriptedBackend(two), **places)
        asked = [asyncio.create_task(subject.answer(incoming(chat(n=2)))) for _ in range(3)]
        return [reply.status for reply in await asyncio.gather(*asked)]

    two = [*said("a", pause=0.05), *said("b", index=1)]
    assert sorted(asyncio.run(together())) == [200, 200, 429]
    assert backend.running == 0


def test_openais_128_answers_may_be_asked_for() -> None:
    backend = ScriptedBackend(said("a"))
    answer(chat(n=128), backend, job_queue_size=128)
    assert backend.requests[0].n == 128
    assert "n is 129" in refusal(chat(n=129))


def test_a_json_object_may_come_as_a_form() -> None:
    """`curl -d` calls everything a form."""
    form = "application/x-www-form-urlencoded"

    async def ask(body: bytes) -> int:
        request = incoming(body, "/invocations", content_type=form)
        return (await service(ScriptedBackend(said("a"))).answer(request)).status

    assert asyncio.run(ask(b' \n{"inputs": "hi"}')) == 200
    assert asyncio.run(ask(b"inputs=hi")) == 415
    assert asyncio.run(ask(b"")) == 415
    assert asyncio.run(ask(b'{"inputs": ')) == 400


def test_limits_are_called_as_the_client_calls_them() -> None:
    exceeded = (
        "the prompt has 9 tokens and max_tokens is 99, together more than this model's context of 12 tokens: "
        "ask for at most 3"
    )

    class Full(ScriptedBackend):
        async def generate(self, request: GenerationRequest) -> ScriptedGeneration:
            raise ContextExceeded(prompt_tokens=9, max_tokens=99, context=12)

    class Limited(ScriptedBackend):
        async def generate(self, request: GenerationRequest) -> ScriptedGeneration:
            raise InvalidParameter("max_tokens", "is too much")

    for body, name, backend, text in (
        (chat(max_tokens=99), "max_tokens", Full([]), exceeded),
        (chat(max_completion_tokens=99), "max_completion_tokens", Full([]), exceeded),
        (lmi(max_new_tokens=99), "parameters.max_new_tokens", Full([]), exceeded),
        (chat(max_completion_tokens=99), "max_completion_tokens", Limited([]), "max_tokens is too much"),
        (lmi(max_new_tokens=99), "parameters.max_new_tokens", Limited([]), "max_tokens is too much"),
    ):
        reply = answer(body, backend)
        assert reply.status == 400
        told = json.loads(reply.body)
        told = told["error"] if "messages" in body else told
        assert told["message"] == text.replace("max_tokens", name)
        if "messages" in body:
            assert told["param"] == name


_LMI_LEAST, _LMI_MOST = "parameters.min_new_tokens", "parameters.max_new_tokens"


@pytest.mark.parametrize(
    ("body", "name", "problem"),
    [
        (chat(min_tokens=9, max_tokens=8), "min_tokens", "is 9; allowed: at most max_tokens, which is 8"),
        (
            chat(min_tokens=9, max_tokens=99, max_completion_tokens=8),
            "min_tokens",
            "is 9; allowed: at most max_completion_tokens, which is 8",
        ),
        (
            {"prompt": "hi", "min_tokens": 9, "max_tokens": 8},
            "min_tokens",
            "is 9; allowed: at most max_tokens, which is 8",
        ),
        (
            {"prompt": "hi", "min_tokens": 17},
            "min_tokens",
            "is 17; allowed: at most max_tokens, which is 16 unless the request sets it",
        ),
        (
            lmi(min_new_tokens=9, max_new_tokens=8),
            _LMI_LEAST,
            f"is 9; allowed: at most {_LMI_MOST}, which is 8",
        ),
        (
            lmi(min_tokens=9, max_tokens=8),
            "parameters.min_tokens",
            "is 9; allowed: at most parameters.max_tokens, which is 8",
        ),
        (
            lmi(min_tokens=9, max_new_tokens=8),
            "parameters.min_tokens",
            f"is 9; allowed: at most {_LMI_MOST}, which is 8",
        ),
        (
            lmi(min_new_tokens=31),
            _LMI_LEAST,
            f"is 31; allowed: at most {_LMI_MOST}, which is 30 unless the request sets it",
        ),
    ],
)
def test_min_tokens_above_max_tokens_is_refused(body: dict[str, Any], name: str, problem: str) -> None:
    told = json.loads(refusal(body))
    told = told.get("error") if "inputs" not in body else told
    assert told["message"] == f"{name} {problem}"
    assert told.get("param", name) == name


def test_min_tokens_up_to_max_tokens_is_accepted() -> None:
    for body in (chat(min_tokens=8, max_tokens=8), chat(min_tokens=99), lmi(min_new_tokens=30)):
        assert answer(body).status == 200


def test_a_limit_that_the_client_did_not_send_is_marked() -> None:
    backend = ScriptedBackend(said("a"))
    for body in (lmi(), lmi(max_new_tokens=30), chat(), chat(max_tokens=3)):
        assert answer(body, backend).status == 200
    assert [r.max_tokens_is_default for r in backend.requests] == [True, False, False, False]


def test_the_text_of_a_body_is_counted_without_its_images() -> None:
    backend = ScriptedBackend(said("a"))
    url = "data:image/png;base64," + "A" * 100_000
    image = [{"type": "image_url", "image_url": {"url": url}}]
    documents = [{"text": "x" * 3000}]
    for body, least, most in (
        (chat(), 30, 100),
        (chat(image), 50, 200),
        (chat(documents=documents), 3000, 3200),
        ({"inputs": f"![]({url})" + "y" * 50}, 60, 100),
        (chat("z" * 2**21), 2**21, 2**21 + 100),
    ):
        assert answer(body, backend).status == 200
        assert least <= backend.requests[-1].text_bytes <= most


class Whole(ScriptedBackend):
    """Says one word in every answer, however many are asked for."""

    async def generate(self, request: GenerationRequest) -> ScriptedGeneration:
        self.requests.append(request)
        steps = [step for index in range(request.n) for step in said("a", index=index)]
        return ScriptedGeneration(self, steps, self._stats())


CHAT = [
    "model",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "max_tokens",
]
CHAT += ["max_completion_tokens", "n", "seed", "stop", "stream", "stream_options", "temperature", "top_p"]
CHAT += [
    "tools",
    "tool_choice",
    "functions",
    "function_call",
    "response_format",
    "modalities",
    "top_k",
    "min_p",
]
CHAT += ["typical_p", "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos", "prompt_logprobs"]
CHAT += ["truncate_prompt_tokens", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"]
CHAT += [
    "documents",
    "priority",
    "request_id",
    "adapters",
    "best_of",
    "user",
    "reasoning_effort",
    "unheard_of",
]
LMI = ["max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"]
LMI += [
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop_sequences",
    "stop",
    "details",
]
LMI += ["stop_token_ids", "ignore_eos_token", "return_full_text", "decoder_input_details", "top_n_tokens"]
LMI += [
    "truncate",
    "n",
    "best_of",
    "num_beams",
    "watermark",
    "grammar",
    "unheard_of",
    "logprobs",
    "logit_bias",
]
LMI += ["guided_json", "guided_regex", "guided_choice", "response_format", "structured_outputs", "bad_words"]
LMI += ["prompt_logprobs", "max_tokens", "allowed_token_ids", "sampler_priority", "mirostat_mode", "dry_base"]

plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([*HUGE, 2**31, 2**31 - 1, -(2**31), 1e300, -1e-300, 0.5, 2.0]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["", "a", "none", "\0", "\ufffd", "𝄞", "x" * 2000, "9" * 5000, "https://a.example/x.png"]),
)
value = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["a", "1", "-1", "9" * 5000, "type", "text"]), inner, max_size=3)
    ),
    max_leaves=6,
)
part = st.one_of(
    value,
    st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url", "video", 7])}, optional={
        "text": value, "image_url": value,
    }),
)  # fmt: skip
message = st.one_of(
    value,
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "x"])},
        optional={"content": value | st.lists(part, max_size=3), "name": value, "tool_calls": value},
    ),
)


numbers = st.one_of(
    st.integers(-1, 2),
    st.integers(-200, 200),
    st.sampled_from([*HUGE, 2**31, 2**31 - 1, -(2**31), 0.5, 1e300, -1e300]),
)
likely = {
    "logit_bias": st.dictionaries(st.sampled_from(["1", "-1", "9" * 5000, "x"]), numbers, max_size=2),
    "stop_token_ids": st.lists(numbers, max_size=3) | st.just([1] * 2000),
    "stop": st.lists(st.sampled_from(["", "a", "x" * 2000]), max_size=3) | st.just(["a"] * 20),
    "stream": st.booleans(),
    "logprobs": st.booleans(),
    "details": st.booleans(),
    "do_sample": st.booleans(),
}
NUMBERS = [
    "top_k",
    "min_tokens",
    "max_tokens",
    "max_completion_tokens",
    "n",
    "seed",
    "priority",
    "temperature",
]
NUMBERS += ["top_logprobs", "prompt_logprobs", "truncate_prompt_tokens", "top_p", "presence_penalty"]
NUMBERS += ["max_new_tokens", "min_new_tokens", "top_n_tokens", "truncate", "best_of", *likely]


def plausible(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    """Up to three fields with values of the kind that they take."""
    known = [st.tuples(st.just(name), likely.get(name, numbers)) for name in names if name in NUMBERS]
    return st.lists(st.one_of(known), max_size=3).map(dict)


def any_of(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(names), value, max_size=3)


hello = st.just([{"role": "user", "content": "hi"}])
messages = st.one_of(hello, st.lists(message, max_size=3), value)
chats = st.one_of(
    st.builds(lambda fields, turns: {**fields, "messages": turns}, plausible(CHAT), hello),
    st.builds(lambda fields, turns: {**fields, "messages": turns}, any_of(CHAT), messages),
)
prompts = st.one_of(
    st.builds(
        lambda stream, fields: {"inputs": "hi", "stream": stream, "parameters": fields},
        st.booleans(),
        plausible(LMI),
    ),
    st.builds(
        lambda asked, fields, top: {**top, "inputs": asked, "parameters": fields},
        st.one_of(st.just("hi"), st.just(["a", "b"]), value),
        any_of(LMI) | value,
        any_of(["stream", "adapters", "model", "unheard_of"]),
    ),
)


def whole_numbers(request: GenerationRequest) -> list[int]:
    """All that the engine is handed, but for the seed."""
    sampling = request.sampling
    single = [sampling.max_tokens, sampling.min_tokens, sampling.top_k, request.truncate_prompt_tokens]
    return [number for number in single if number is not None] + [
        *sampling.stop_token_ids,
        *(sampling.logit_bias or ()),
        request.priority,
    ]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(body=st.one_of(chats, chats, chats, prompts, prompts, value))
def test_whatever_is_sent_is_answered_or_refused(body: Any) -> None:
    async def ask() -> None:
        backend, watched = Whole([]), Watched()
        subject = service(backend, ScriptedImages(), observer=watched, limit_mm_per_prompt={"image": 2})
        route = ROUTES["messages" if isinstance(body, dict) and "messages" in body else "inputs"]
        reply = await subject.answer(incoming(body, route))
        data = await everything(reply)
        assert 200 <= reply.status < 500, data[:500]
        assert b"internal error" not in data
        assert (subject.in_flight, backend.running) == (0, 0)
        assert watched.admitted == len(watched.finished)
        for request in backend.requests:
            request.sampling.validate()
            assert max(map(abs, whole_numbers(request)), default=0) < 2**31

    asyncio.run(ask())


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    body=st.one_of(prompts, prompts, chats, value),
    route=st.sampled_from(["/", "/generate", "/generate_stream"]),
)
def test_whatever_is_sent_to_tgis_routes_is_answered_or_refused(body: Any, route: str) -> None:
    async def ask() -> None:
        backend = Whole([])
        subject = service(backend, ScriptedImages(), limit_mm_per_prompt={"image": 2})
        reply = await subject.answer(incoming(body, route))
        data = await everything(reply)
        assert 200 <= reply.status < 500, data[:500]
        assert b"internal error" not in data
        assert (subject.in_flight, backend.running) == (0, 0)
        if reply.status != 200:
            assert set(json.loads(data)) == {"error", "error_type"}
        for request in backend.requests:
            request.sampling.validate()
            assert max(map(abs, whole_numbers(request)), default=0) < 2**31

    asyncio.run(ask())


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    body=st.one_of(
        st.dictionaries(
            st.sampled_from(["inputs", "prompt", "tokens", "parameters", "add_special_tokens", "return_token_strs"]),
            value | st.lists(numbers, max_size=3),
            max_size=3,
        ),
        chats,
        value,
    ),
    route=st.sampled_from(["/tokenize", "/chat_tokenize", "/detokenize"]),
)
def test_whatever_is_to_be_counted_is_counted_or_refused(body: Any, route: str) -> None:
    async def ask() -> None:
        subject = service(ScriptedBackend([]), ScriptedImages(), limit_mm_per_prompt={"image": 2})
        action = "detokenize" if route == "/detokenize" else "tokenize"
        reply = await subject.call(action, incoming(body, route))
        assert 200 <= reply.status < 500, reply.body[:500]
        assert json.loads(reply.body) is not None
        assert subject.in_flight == 0

    asyncio.run(ask())
