"""Samplers that vLLM does not have, asked of a server with vLLM: what the embedded engine answers, it answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.support.live import LiveServer, chat_body
from tests.support.shapes import SHAPES, circle, square

WHAT = "What is this an image of?"
LONG: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True}
"""Long enough for a greedy answer to say things again."""

HOT: dict[str, Any] = {**LONG, "temperature": 1.5, "seed": 7}


def chat(*content: Any, **fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", chat_body(*(content or (circle("red"), WHAT)), **fields)


GREEDY: dict[str, tuple[str, dict[str, Any]]] = {
    "dry": chat(dry_multiplier=4.0, dry_allowed_length=1, **LONG),
    "dry with breakers of its own": chat(
        dry_multiplier=4.0, dry_allowed_length=1, dry_sequence_breakers=[" circle"], **LONG
    ),
    "dry and penalties": chat(
        "hello", dry_multiplier=1.0, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.4, **LONG
    ),
    "no_repeat_ngram_size": chat(no_repeat_ngram_size=2, **LONG),
    "no_repeat_ngram_size 1": chat(square("blue"), WHAT, no_repeat_ngram_size=1, **LONG),
    "bad_words_token_ids": chat(custom_token_bans=list(range(300, 400)), **LONG),
    "log probabilities": chat(no_repeat_ngram_size=2, logprobs=True, top_logprobs=3, **LONG),
    "minimum": chat(no_repeat_ngram_size=3, min_tokens=20, max_tokens=30),
    "n": chat(no_repeat_ngram_size=2, n=2, **LONG),
}  # fmt: skip
RANDOM: dict[str, tuple[str, dict[str, Any]]] = {
    "typical_p": chat(typical_p=0.6, **HOT),
    "typical_p after top_p": chat(typical_p=0.6, top_p=0.9, top_k=50, **HOT),
    "top_a": chat(top_a=0.1, **HOT),
    "tfs": chat(tfs=0.95, **HOT),
    "eta_cutoff": chat(eta_cutoff=300.0, **HOT),
    "epsilon_cutoff": chat(epsilon_cutoff=90.0, **HOT),
    "nsigma": chat(nsigma=1.5, **HOT),
    "smoothing": chat(smoothing_factor=0.3, smoothing_curve=1.5, **HOT),
    "dynatemp": chat(dynatemp_min=0.5, dynatemp_max=2.0, dynatemp_exponent=1.2, **HOT),
    "temperature_last": chat(temperature_last=True, top_p=0.9, **HOT),
    "xtc": chat(xtc_probability=0.6, xtc_threshold=0.05, **HOT),
    "mirostat": chat(mirostat_mode=2, mirostat_tau=3.0, mirostat_eta=0.3, **HOT),
    "skew": chat(skew=-0.4, **HOT),
    "sampler_priority": chat(
        sampler_priority=[6, 7, 8, 5, 4, 3, 2, 1, 0, 9, 10, 11, 12, 13], tfs=0.97, min_p=0.01, **HOT
    ),
    "all penalties": chat(
        xtc_probability=0.3, dry_multiplier=0.8, repetition_penalty=1.2, logit_bias={"40": -100.0}, **HOT
    ),
    "a temperature above vLLM's": chat(temperature=3.5, top_k=20, seed=11, max_tokens=30),
    "n": chat("hello", top_a=0.05, n=3, logprobs=True, **HOT),
    "completions": ("/v1/completions", {"prompt": "a red circle and", "typical_p": 0.7, "top_a": 0.05, **HOT}),
    "LMI": (
        "/invocations",
        {
            "inputs": "What is",
            "parameters": {"typical_p": 0.5, "do_sample": True, "seed": 3, "temperature": 1.5, "max_new_tokens": 30},
        },
    ),
    "TGI": (
        "/generate",
        {
            "inputs": "What is",
            "parameters": {"typical_p": 0.5, "seed": 3, "temperature": 1.5, "max_new_tokens": 30, "details": True},
        },
    ),
}  # fmt: skip
ONE_LEFT: list[dict[str, Any]] = [
    {"top_a": 100.0}, {"tfs": 1e-6}, {"eta_cutoff": 1e9}, {"nsigma": 1e-6}, {"smoothing_factor": 1000.0},
    {"dynatemp_min": 1e-6, "dynatemp_max": 1e-6}, {"mirostat_mode": 2, "mirostat_tau": 0.0, "mirostat_eta": 0.0},
    {"temperature_last": True, "top_k": 1},
]  # fmt: skip
"""Settings with which nothing but the likeliest token can be drawn."""


def ask(server: LiveServer, asked: tuple[str, dict[str, Any]]) -> httpx.Response:
    return server.http.post(asked[0], json=asked[1])


def ask_all(server: LiveServer, asked: list[tuple[str, dict[str, Any]]], together: int) -> list[httpx.Response]:
    with ThreadPoolExecutor(together) as pool:
        return list(pool.map(lambda one: ask(server, one), asked))


@pytest.fixture(scope="module")
def rolling() -> dict[str, Any]:
    """What the embedded engine says, its server gone again."""
    named = {**{f"greedy {k}": v for k, v in GREEDY.items()}, **{f"random {k}": v for k, v in RANDOM.items()}}
    with LiveServer(SHAPES, "rolling_batch=rolling", "dtype=float32") as server:
        replies = ask_all(server, list(named.values()), 4)
    assert all(reply.status_code == 200 for reply in replies), [r.text for r in replies]
    return {name: said(reply) for name, reply in zip(named, replies, strict=True)}


@pytest.fixture(scope="module")
def server(rolling: Any) -> Iterator[LiveServer]:
    with LiveServer(SHAPES, "dtype=float32") as live:
        yield live


def said(reply: httpx.Response) -> Any:
    """Texts and why they ended; tokens' log probabilities, rounded to what float32 leaves equal."""
    assert reply.status_code == 200, reply.text
    body = reply.json()
    if isinstance(body, dict) and "choices" in body:
        return [
            (
                choice["message"]["content"] if "message" in choice else choice["text"],
                choice["finish_reason"],
                [
                    (one["token"], [round(other["logprob"], 2) for other in one["top_logprobs"]])
                    for one in (choice.get("logprobs") or {}).get("content") or ()
                ],
            )
            for choice in body["choices"]
        ]
    return body["generated_text"]


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_answers_are_the_embedded_engines(server: LiveServer, rolling: dict[str, Any], name: str) -> None:
    assert said(ask(server, GREEDY[name])) == rolling[f"greedy {name}"]


def test_they_change_greedy_answers(server: LiveServer) -> None:
    plain = said(ask(server, chat(**LONG)))[0][0]
    for name in ("dry", "no_repeat_ngram_size", "bad_words_token_ids"):
        assert said(ask(server, GREEDY[name]))[0][0] != plain, name


def test_seeded_answers_are_the_embedded_engines(server: LiveServer, rolling: dict[str, Any]) -> None:
    """All at once, beside plain requests: a draw depends on its own request alone."""
    plain = [chat("hello", **HOT, top_p=0.9), chat(**LONG)]
    alone = [said(ask(server, one)) for one in plain]
    replies = ask_all(server, [*RANDOM.values(), *plain], 16)
    got = [said(reply) for reply in replies]
    assert got[len(RANDOM) :] == alone
    different = {
        name: (one, rolling[f"random {name}"])
        for name, one in zip(RANDOM, got, strict=False)
        if one != rolling[f"random {name}"]
    }
    assert not different
    assert len({str(one) for one in got}) > len(RANDOM) // 2


@pytest.mark.parametrize("fields", ONE_LEFT, ids=lambda fields: next(iter(fields)))
def test_what_leaves_one_token_is_greedy(server: LiveServer, fields: dict[str, Any]) -> None:
    greedy = said(ask(server, chat(square("green"), WHAT, **LONG)))
    hot = {**LONG, "temperature": 1.7}
    assert said(ask(server, chat(square("green"), WHAT, **hot, **fields))) == greedy


def test_answers_without_a_seed_differ(server: LiveServer) -> None:
    fields = {**LONG, "temperature": 2.0, "top_a": 1e-6, "n": 4}
    texts = [text for _ in range(2) for text, *_ in said(ask(server, chat("hello", **fields)))]
    assert len(set(texts)) == 8


def test_a_grammar_holds(server: LiveServer) -> None:
    pattern = "[ab]{24}"
    for fields in ({"dry_multiplier": 2.0, "dry_allowed_length": 1}, {"temperature": 2.0, "top_a": 0.01}):
        ((text, *_),) = said(ask(server, chat("hi", max_tokens=60, structured_outputs={"regex": pattern}, **fields)))
        assert re.fullmatch(pattern, text)


def test_streams(server: LiveServer, rolling: dict[str, Any]) -> None:
    path, body = RANDOM["mirostat"]
    with server.http.stream("POST", path, json={**body, "stream": True}) as reply:
        events = [line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: {")]
    deltas = [choice["delta"] for event in events for choice in json.loads(event)["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == rolling["random mirostat"][0][0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"typical_p": 0.0}, "typical_p"),
        ({"top_a": -1.0}, "top_a"),
        ({"dry_multiplier": 1e9}, "dry_multiplier"),
        ({"mirostat_mode": 1}, "mirostat_mode"),
        ({"no_repeat_ngram_size": 9999}, "no_repeat_ngram_size"),
        ({"custom_token_bans": [10**7]}, "custom_token_bans"),
        ({"sampler_priority": ["TFS"]}, "sampler_priority"),
    ],
)
def test_a_bad_value_is_a_400_before_anything_is_generated(
    server: LiveServer, fields: dict[str, Any], named: str, stream: bool
) -> None:
    before = server.metrics()["lmi_generation_tokens_total"]
    reply = ask(server, chat("hello", temperature=1.0, stream=stream, **fields))
    assert reply.status_code == 400, reply.text
    assert named in reply.json()["error"]["message"]
    assert "vllm" not in reply.json()["error"]["message"].lower()
    assert server.metrics()["lmi_generation_tokens_total"] == before


def test_with_speculative_decoding_they_are_refused_and_others_answered() -> None:
    draft = 'speculative_config={"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}'
    with LiveServer(SHAPES, "dtype=float32", draft) as server:
        assert said(ask(server, chat()))[0][0] == "a red circle"
        for name, fields in (
            ("top_a", {"temperature": 1.0, "top_a": 0.5}),
            ("dry_multiplier", {"dry_multiplier": 1.0}),
            ("temperature", {"temperature": 2.5}),
        ):
            reply = ask(server, chat(**fields))
            assert reply.status_code == 400, reply.text
            assert reply.json()["error"]["param"] == name
            assert "speculative decoding" in reply.json()["error"]["message"]


@pytest.fixture(scope="module")
def small() -> Iterator[LiveServer]:
    """A cache for four or five answers at a time."""
    cache = ("num_gpu_blocks_override=24", "block_size=32", "max_model_len=512")
    with LiveServer(SHAPES, "dtype=float32", "logprobs_mode=processed_logprobs", *cache) as live:
        yield live


def test_preempted_answers_go_on_as_they_would_have(small: LiveServer) -> None:
    """Mirostat's memory among what they keep."""
    kinds: list[dict[str, Any]] = [
        {"mirostat_mode": 2, "mirostat_tau": 3.0, "mirostat_eta": 0.5},
        {"dry_multiplier": 1.0, "top_a": 0.02},
        {"no_repeat_ngram_size": 3, "temperature": 0.0},
    ]
    asked = [
        chat(f"hello {number}", **{**HOT, "max_tokens": 150, "seed": number, **kinds[number % 3]})
        for number in range(12)
    ]
    alone = [said(ask(small, one)) for one in asked]
    together = [said(reply) for reply in ask_all(small, asked, 12)]
    assert together == alone
    assert small.metrics()["lmi_preemptions_total"] > 0


def test_log_probabilities_after_the_samplers_are_refused(small: LiveServer) -> None:
    """With `processed_logprobs` vLLM would say that each token was certain."""
    reply = ask(small, chat(dry_multiplier=1.0, logprobs=True))
    assert reply.status_code == 400, reply.text
    assert "logprobs_mode" in reply.json()["error"]["message"]
    assert ask(small, chat(dry_multiplier=1.0)).status_code == 200
    assert ask(small, chat(logprobs=True)).status_code == 200
