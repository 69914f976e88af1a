"""Text completions: what is read, what is refused, and replies that OpenAI's own types accept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from openai.types import Completion

from handlers.deltas import Delta, PositionLogprobs, PromptStats
from handlers.errors import EngineFailed, InvalidRequest
from handlers.protocols.base import MAX_PROMPTS, ServerContext, Task
from handlers.protocols.openai.chat import read_chat
from handlers.protocols.openai.completions import read_completion
from handlers.request import Constraint, GenerationRequest, ImagePart, RequestSampling, TextPart, TextPrompt
from tests.support.scripted import ScriptedBackend, Step, everything, incoming, said, service, token

CAT = "https://images.example/cat.png"
ROUTE = "/v1/completions"


def read(body: dict[str, Any], **defaults: Any) -> Task:
    return read_completion(body, ServerContext("shapes", defaults), incoming({}))


def only(body: dict[str, Any], **defaults: Any) -> GenerationRequest:
    (request,) = read(body, **defaults).requests
    return request


def parts(request: GenerationRequest) -> TextPrompt:
    assert isinstance(request.prompt, TextPrompt)
    return request.prompt


def answer(backend: ScriptedBackend, body: dict[str, Any], status: int = 200) -> bytes:
    async def ask() -> bytes:
        subject = service(backend, limit_mm_per_prompt={"image": 9})
        reply = await subject.answer(incoming(body, ROUTE))
        assert reply.status == status, reply.body
        expected = "text/event-stream; charset=utf-8" if body.get("stream") else "application/json"
        assert reply.content_type == (expected if status == 200 else "application/json")
        found = await everything(reply)
        assert subject.in_flight == backend.running == 0
        return found

    return asyncio.run(ask())


def completion(script: Any, body: dict[str, Any], **backend: Any) -> Completion:
    reply = json.loads(answer(ScriptedBackend(script, **backend), body))
    return Completion.model_validate(_typed(reply), strict=True)


def _typed(reply: Any) -> Any:
    """The client's types forget two nulls that OpenAI's server sends: no finish reason yet, and the
    probability of an echoed prompt's first token."""
    for choice in reply["choices"]:
        choice["finish_reason"] = choice["finish_reason"] or "stop"
        if choice["logprobs"] is not None:
            lists = choice["logprobs"]
            if lists["token_logprobs"][:1] == lists["top_logprobs"][:1] == [None]:
                lists["token_logprobs"][0], lists["top_logprobs"][0] = 0.0, {}
    return reply


def events(script: Any, body: dict[str, Any], **backend: Any) -> list[Any]:
    lines = answer(ScriptedBackend(script, **backend), {**body, "stream": True}).decode().split("\n\n")
    assert lines.pop() == ""
    assert lines.pop() == "data: [DONE]"
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [json.loads(line[6:]) for line in lines]


def chunks(script: Any, body: dict[str, Any], **backend: Any) -> list[Completion]:
    found = events(script, body, **backend)
    return [Completion.model_validate(_typed(event), strict=True) for event in found]


def joined(found: Sequence[Completion]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for chunk in found:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    return texts


# Reading


def test_a_prompt_is_a_text_several_texts_token_ids_or_several_of_them() -> None:
    assert [parts(r).parts for r in read({"prompt": "a"}).requests] == [[TextPart("a")]]
    assert [parts(r).parts for r in read({"prompt": ["a", "b"]}).requests] == [
        [TextPart("a")],
        [TextPart("b")],
    ]
    assert [parts(r).token_ids for r in read({"prompt": [1, 2]}).requests] == [[1, 2]]
    several = read({"prompt": [[1, 2], [3]]}).requests
    assert [parts(r).token_ids for r in several] == [[1, 2], [3]]
    assert [r.request_id for r in several] == ["req-1-0", "req-1-1"]


def test_images_stand_in_the_prompt() -> None:
    request = only({"prompt": f"What is ![a cat]({CAT}) and [this](x)?"})
    assert parts(request).parts == [TextPart("What is "), ImagePart(CAT), TextPart(" and [this](x)?")]


def test_sixteen_tokens_unless_the_body_says_otherwise() -> None:
    request = only({"prompt": "a"})
    assert request.sampling == RequestSampling(max_tokens=16)
    assert request.max_tokens_is_default
    request = only({"prompt": "a", "max_tokens": None})
    assert request.sampling.max_tokens is None
    request = only({"prompt": "a", "max_tokens": 5}, temperature=0.5)
    assert not request.max_tokens_is_default
    assert (request.sampling.max_tokens, request.sampling.temperature) == (5, 0.5)


def test_every_field_reaches_the_engine() -> None:
    fields: dict[str, Any] = {
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "logit_bias": {"7": -100},
        "seed": 3,
        "stop": ["x", "y"],
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "min_tokens": 2,
        "stop_token_ids": [4],
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "logprobs": 3,
        "prompt_logprobs": 2,
    }
    request = only({"prompt": "a", "n": 2, "priority": 4, "truncate_prompt_tokens": -1, **fields})
    for name, value in fields.items():
        expected = {"stop": ("x", "y"), "stop_token_ids": (4,), "logit_bias": {7: -100.0}}.get(name, value)
        assert getattr(request.sampling, name) == expected, name
    assert (request.n, request.priority, request.truncate_prompt_tokens) == (2, 4, -1)
    assert request.truncation_side == "left"
    assert only({"prompt": "a", "truncation_side": "right"}).truncation_side == "right"
    assert not parts(only({"prompt": "a", "add_special_tokens": False})).add_special_tokens
    assert parts(only({"prompt": "a"})).add_special_tokens


def test_null_means_absent_and_unknown_fields_are_dropped() -> None:
    names = set(read_completion.__globals__["CompletionBody"].__struct_fields__) - {"prompt", "max_tokens"}
    assert only({"prompt": "a", **dict.fromkeys(names)}).sampling == RequestSampling(max_tokens=16)
    only({"prompt": "a", "user": "u", "return_full_text": True, "best_of": 1, "wait_for_model": True, "x": {}})


def test_answers_can_be_constrained() -> None:
    assert only({"prompt": "a", "guided_regex": "[ab]"}).constraint == Constraint("regex", "[ab]", "guided_regex")
    body = {"prompt": "a", "response_format": {"type": "json_object"}}
    assert only(body).constraint == Constraint("json_object", None, "response_format")
    body = {"prompt": ["a", "b"], "structured_outputs": {"choice": ["x"]}}
    assert [r.constraint for r in read(body).requests] == [Constraint("choice", '["x"]', "structured_outputs")] * 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [["a"]]}, "prompt[0][0]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [2**40]}, "prompt[0]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": ["a"] * (MAX_PROMPTS + 1)}, "prompt"),
        ({"prompt": [[1]] * (MAX_PROMPTS + 1)}, "prompt"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"n": 0}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stop": ""}, "stop"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncation_side": "middle"}, "truncation_side"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
        ({"use_beam_search": True}, "use_beam_search"),
    ],
)
def test_a_bad_value_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read({"prompt": "a", **fields})
    assert caught.value.param == param


def test_the_prompt_of_a_route_of_its_own_is_missed_by_name() -> None:
    reply = json.loads(answer(ScriptedBackend(said("x")), {"messages": []}, status=400))
    assert "prompt" in reply["error"]["message"]


def test_a_whole_number_may_be_written_with_a_point() -> None:
    """As JSON does not tell them apart, and clients in Java write all their numbers so."""
    request = only({"prompt": [[1.0, 2.0]], "max_tokens": 5.0, "seed": -3.0, "logit_bias": {"7": 1}, "n": 2.0})
    assert (parts(request).token_ids, request.sampling.max_tokens, request.n) == ([1, 2], 5, 2)
    with pytest.raises(InvalidRequest, match="max_tokens: expected"):
        read({"prompt": "a", "max_tokens": 5.5, "n": 2.0})


# Writing


def by_prompt(request: GenerationRequest) -> list[Step]:
    """Every answer says its own prompt twice and its number."""
    said_so = parts(request).parts[0]
    assert isinstance(said_so, TextPart)
    steps: list[Step] = []
    for i in range(request.n):
        steps += said(said_so.text, said_so.text, str(i), index=i)
    return steps


def test_a_reply_is_a_completion() -> None:
    reply = completion(said("Hello", " you"), {"prompt": "hi", "model": "mine", "request_id": "q"})
    assert (reply.object, reply.model, reply.id) == ("text_completion", "mine", "cmpl-q")
    (choice,) = reply.choices
    assert (choice.index, choice.text, choice.logprobs, choice.finish_reason) == (
        0,
        "Hello you",
        None,
        "stop",
    )
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (7, 2, 9)
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 2


def test_choices_are_numbered_over_all_prompts() -> None:
    reply = completion(by_prompt, {"prompt": ["a", "b", "c"], "n": 2})
    assert [(c.index, c.text) for c in reply.choices] == [
        (0, "aa0"), (1, "aa1"), (2, "bb0"), (3, "bb1"), (4, "cc0"), (5, "cc1"),
    ]  # fmt: skip
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (21, 18)


def test_streams_of_several_prompts_come_together() -> None:
    """Each prompt waits for the other's first words, so that they can only come interleaved."""

    def script(request: GenerationRequest) -> list[Step]:
        steps = by_prompt(request)
        return [step for one in steps for step in (0.002, one)]

    body = {"prompt": ["a", "b"], "n": 2, "stream_options": {"include_usage": True}}
    found = chunks(script, body)
    assert joined(found) == {0: "aa0", 1: "aa1", 2: "bb0", 3: "bb1"}
    order = [chunk.choices[0].index // 2 for chunk in found[:-1]]
    assert order.index(1) < len(order) - 1 - order[::-1].index(0)
    last = found[-1]
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (14, 12)
    assert all(chunk.usage is None for chunk in found[:-1])


def test_continuous_usage_counts_each_choice_by_itself() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    found = chunks(by_prompt, {"prompt": ["a", "b"], "stream_options": options})
    counts: dict[int, list[int]] = {0: [], 1: []}
    for chunk in found[:-1]:
        assert chunk.usage is not None
        assert chunk.usage.prompt_tokens == 7
        counts[chunk.choices[0].index].append(chunk.usage.completion_tokens)
    assert counts == {0: [1, 2, 3], 1: [1, 2, 3]}


def test_one_bad_prompt_of_several_is_a_status_before_the_stream() -> None:
    def script(request: GenerationRequest) -> list[Step]:
        return by_prompt(request)

    class Refusing(ScriptedBackend):
        async def generate(self, request: GenerationRequest) -> Any:
            if parts(request).parts == [TextPart("bad")]:
                raise InvalidRequest("the prompt is bad")
            return await super().generate(request)

    for stream in (False, True):
        body = {"prompt": ["a", "bad", "c"], "stream": stream}
        reply = json.loads(answer(Refusing(script), body, status=400))
        assert reply["error"]["message"] == "the prompt is bad"


def test_a_prompt_that_fails_on_its_way_ends_the_stream_with_an_error() -> None:
    def script(request: GenerationRequest) -> list[Step]:
        if parts(request).parts == [TextPart("b")]:
            return [0.01, EngineFailed("the engine died")]
        return [*said("x"), *(Delta(0, [1], "") for _ in range(3)), 10.0]

    reply = answer(ScriptedBackend(script), {"prompt": ["a", "b"], "stream": True}).decode()
    *_, last, nothing = reply.split("\n\n")
    assert nothing == ""
    assert json.loads(last[6:])["error"]["message"] == "the engine died"


def test_a_client_that_leaves_a_stream_of_several_prompts_ends_them_all() -> None:
    backend = ScriptedBackend(lambda _: [*said("x", "y")[:1], 60.0])

    async def ask() -> None:
        subject = service(backend)
        reply = await subject.answer(incoming({"prompt": ["a", "b", "c"], "stream": True}, ROUTE))
        assert reply.chunks is not None
        await anext(reply.chunks)
        assert backend.running == 3
        await reply.chunks.aclose()  # type: ignore[attr-defined]
        assert subject.in_flight == backend.running == 0
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=5)
        assert all(task.done() for task in others)

    asyncio.run(ask())


def test_the_most_likely_of_several_answers_are_shown() -> None:
    def script(request: GenerationRequest) -> list[Step]:
        assert request.n == 4
        assert request.sampling.logprobs == 0
        steps: list[Step] = []
        for i, logprob in enumerate((-3.0, -1.0, -9.0, -2.0)):
            chosen = PositionLogprobs(token(i, f"t{i}", logprob), ())
            steps.append(Delta(i, [i], f"t{i}", [chosen], finish_reason="stop"))
        return steps

    reply = completion(script, {"prompt": "a", "n": 2, "best_of": 4})
    assert [(c.index, c.text) for c in reply.choices] == [(0, "t1"), (1, "t3")]
    assert [c.logprobs for c in reply.choices] == [None, None]
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 4


# Log-probabilities


def position(text: str, token_id: int = 5, logprob: float = -0.5) -> PositionLogprobs:
    chosen = token(token_id, text, logprob)
    return PositionLogprobs(chosen, (chosen, token(99, "other", -2.0, 2), token(98, "third", -3.0, 3)))


def spoken(*texts: str) -> list[Step]:
    steps: list[Step] = [Delta(0, [5], text, [position(text)]) for text in texts]
    steps[-1].finish_reason = "length"  # type: ignore[union-attr]
    return steps


def test_logprobs_are_four_lists() -> None:
    for stream in (False, True):
        body = {"prompt": "a", "logprobs": 2}
        found = chunks(spoken("He", "y", " you"), body) if stream else [completion(spoken("He", "y", " you"), body)]
        lists: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for choice in (chunk.choices[0] for chunk in found):
            assert choice.logprobs is not None
            for name, values in lists.items():
                values += getattr(choice.logprobs, name)
        assert lists == {
            "tokens": ["He", "y", " you"],
            "token_logprobs": [-0.5] * 3,
            "top_logprobs": [{text: -0.5, "other": -2.0} for text in ("He", "y", " you")],
            "text_offset": [0, 2, 3],
        }


def test_no_alternatives_still_show_the_token_itself() -> None:
    reply = completion(spoken("He"), {"prompt": "a", "logprobs": 0})
    assert reply.choices[0].logprobs is not None
    assert reply.choices[0].logprobs.top_logprobs == [{"He": -0.5}]


def test_offsets_point_into_the_text_where_tokens_are_pieces_of_characters() -> None:
    """A bear of four byte tokens, a token whose text lacks its blank, an end that is not shown."""
    texts = [("", "\ufffd")] * 3 + [("\U0001f43b", "\ufffd"), (" he", "he"), ("y", "y"), ("", "</s>")]
    steps: list[Step] = [Delta(0, [5], text, [position(alone)]) for text, alone in texts]
    steps[-1].finish_reason = "stop"  # type: ignore[union-attr]
    reply = completion(steps, {"prompt": "a", "logprobs": 0})
    assert reply.choices[0].logprobs is not None
    assert reply.choices[0].text == "\U0001f43b hey"
    assert reply.choices[0].logprobs.text_offset == [0, 0, 0, 0, 2, 4, 5]


def test_tokens_can_be_shown_as_ids() -> None:
    body = {"prompt": "a", "logprobs": 1, "return_tokens_as_token_ids": True}
    reply = completion(spoken("He"), body)
    assert reply.choices[0].logprobs is not None
    assert reply.choices[0].logprobs.tokens == ["token_id:5"]
    assert reply.choices[0].logprobs.top_logprobs == [{"token_id:5": -0.5}]


def seen() -> PromptStats:
    asked = [None, position("at", 8, -1.0)]
    return PromptStats(2, prompt_token_ids=[7, 8], prompt_text="cat", prompt_logprobs=asked, first_token_text="c")


def test_echo_shows_the_prompt_and_its_tokens() -> None:
    for stream in (False, True):
        body = {"prompt": f"![]({CAT})cat", "echo": True, "logprobs": 2}
        script = spoken(" sat", ".")
        found = chunks(script, body, stats=seen) if stream else [completion(script, body, stats=seen)]
        assert joined(found) == {0: f"![]({CAT})cat sat."}
        rows = [chunk.choices[0].logprobs for chunk in found]
        assert [text for row in rows for text in row.tokens or ()] == ["c", "at", " sat", "."]  # type: ignore[union-attr]
        assert [p for row in rows for p in row.token_logprobs or ()] == [0.0, -1.0, -0.5, -0.5]  # type: ignore[union-attr]
        first = rows[0]
        assert first is not None
        assert first.top_logprobs is not None
        assert first.top_logprobs[:2] == [{}, {"at": -1.0, "other": -2.0}]


def test_echo_of_token_ids_shows_their_text() -> None:
    assert completion(spoken("!"), {"prompt": [7, 8], "echo": True}, stats=seen).choices[0].text == "cat!"


def test_echo_without_tokens_scores_the_prompt() -> None:
    """How evaluation harnesses ask for the probability of a text."""
    for stream in (False, True):
        body = {"prompt": ["cat", "cat"], "echo": True, "max_tokens": 0, "logprobs": 1}
        assert [request.sampling.max_tokens for request in read(body).requests] == [1, 1]
        script = spoken("x")
        found = chunks(script, body, stats=seen) if stream else [completion(script, body, stats=seen)]
        assert joined(found) == {0: "cat", 1: "cat"}
        for choice in (choice for chunk in found for choice in chunk.choices):
            assert choice.finish_reason == "length"
            assert choice.logprobs is not None
            assert choice.logprobs.tokens == ["c", "at"]
            assert choice.logprobs.text_offset == [0, 1]
        usage = found[0].usage
        assert stream or (usage is not None and usage.completion_tokens == 0)


def test_ids_of_tokens_are_shown_where_they_are_asked_for() -> None:
    body = {"prompt": "a", "return_token_ids": True, "prompt_logprobs": 1}
    reply = json.loads(answer(ScriptedBackend(spoken("He", "y"), stats=seen), body))
    (choice,) = reply["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([7, 8], [5, 5])
    assert choice["prompt_logprobs"] == [
        None,
        {
            "8": {"logprob": -1.0, "rank": 1, "decoded_token": "at"},
        },
    ]
    del body["prompt_logprobs"]
    found = [event["choices"][0] for event in events(spoken("He", "y"), body, stats=seen)]
    assert [choice["token_ids"] for choice in found] == [[5], [5]]
    assert [choice.get("prompt_token_ids") for choice in found] == [[7, 8], None]


SAMPLERS: dict[str, Any] = {
    "allowed_token_ids": [3, 4],
    "bad_words": ["no", "never"],
    "top_a": 0.2,
    "tfs": 0.9,
    "eta_cutoff": 3.0,
    "epsilon_cutoff": 4.0,
    "smoothing_factor": 0.3,
    "smoothing_curve": 2.0,
    "dynatemp_min": 0.5,
    "dynatemp_max": 1.5,
    "dynatemp_exponent": 1.2,
    "temperature_last": True,
    "xtc_threshold": 0.2,
    "xtc_probability": 0.5,
    "nsigma": 1.5,
    "dry_multiplier": 0.8,
    "dry_base": 2.0,
    "dry_allowed_length": 3,
    "dry_range": 100,
    "dry_sequence_breakers": ["\n", ":"],
    "mirostat_mode": 2,
    "mirostat_tau": 5.0,
    "mirostat_eta": 0.1,
    "no_repeat_ngram_size": 4,
    "skew": 0.5,
    "typical_p": 0.8,
    "sampler_priority": [6, 7, 8, 0, 1, 2, 3, 4, "temperature", 9, 10, 11, 12, 13],
}


def test_aphrodites_samplers_have_their_names_in_both_bodies() -> None:
    expected = {name: tuple(v) if isinstance(v, list) else v for name, v in SAMPLERS.items()}
    chat = read_chat({"messages": [{"role": "user", "content": "a"}], **SAMPLERS}, ServerContext("m"), incoming({}))
    for request in (only({"prompt": "a", **SAMPLERS}), *chat.requests):
        assert {name: getattr(request.sampling, name) for name in SAMPLERS} == expected
    assert only({"prompt": "a", "dry_penalty_last_n": 9}).sampling.dry_range == 9


@pytest.mark.parametrize("name", sorted(SAMPLERS.keys() - {"temperature_last"}))
def test_a_sampler_out_of_range_is_named(name: str) -> None:
    bad = [""] * 5000 if isinstance(SAMPLERS[name], list) else -1e9
    with pytest.raises(InvalidRequest) as caught:
        read({"prompt": "a", name: bad})
    assert (caught.value.param or "").partition("[")[0] == name


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"dynatemp_low": 0.5, "dynatemp_high": 2.0}, {"dynatemp_min": 0.5, "dynatemp_max": 2.0}),
        ({"dry_range": 4, "dry_penalty_last_n": 9}, {"dry_range": 4}),
        ({"dry_sequence_breakers": '["\\n", ":"]'}, {"dry_sequence_breakers": ("\n", ":")}),
        ({"dry_sequence_breakers": '"\\n", "*"'}, {"dry_sequence_breakers": ("\n", "*")}),
        ({"dry_sequence_breakers": ""}, {"dry_sequence_breakers": ()}),
        ({"custom_token_bans": [4, 9]}, {"bad_words_token_ids": ((4,), (9,))}),
        ({"custom_token_bans": [7] * 1024}, {"bad_words_token_ids": ((7,),) * 1024}),
        (
            {
                "dry_multiplier": 0.8,
                "dry_max_ngram": 3,
                "dry_max_occurrences": 1,
                "dry_early_exit_match_len": 2,
            },
            {"dry_multiplier": 0.8, "dry_allowed_length": 2, "dry_range": 0},
        ),
    ],
)
def test_other_spellings_of_samplers(given: dict[str, Any], expected: dict[str, Any]) -> None:
    sampling = only({"prompt": "a", **given}).sampling
    assert {name: getattr(sampling, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dynatemp_high", -1.0),
        ("dry_penalty_last_n", -2),
        ("dry_sequence_breakers", "\\n"),
        ("dry_sequence_breakers", '[["a"]]'),
        ("custom_token_bans", [-1]),
        ("custom_token_bans", [1] * 1025),
    ],
)
def test_another_spelling_out_of_range_is_named_as_it_was_sent(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read({"prompt": "a", name: value})
    assert (caught.value.param or "").partition("[")[0] == name
