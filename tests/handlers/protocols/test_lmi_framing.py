"""How replies on LMI's routes are framed: by the body, the Accept header and `option.output_formatter`."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.deltas import Delta, PositionLogprobs
from handlers.errors import EngineFailed
from tests.support.scripted import ScriptedBackend, Step, chat, everything, incoming, said, service, token

LMI = {"inputs": "hi"}
Framing = Literal["whole", "lines", "events"]
TYPES = {
    "whole": "application/json",
    "lines": "application/jsonlines",
    "events": "text/event-stream",
}


def ask(
    body: Any,
    *,
    formatter: str | None = None,
    accept: str | None = None,
    route: str = "/invocations",
    steps: list[Step] | None = None,
    tgi_compat: bool = False,
) -> tuple[Framing, list[dict[str, Any]]]:
    """The framing of the reply, and its objects; checks that bytes and content type agree."""

    async def answer() -> tuple[str, bytes]:
        backend = ScriptedBackend(steps or said("a ", "b\n\ndata: c"))
        headers = {} if accept is None else {"accept": accept}
        server = service(backend, output_formatter=formatter, tgi_compat=tgi_compat)
        reply = await server.answer(incoming(body, route, **headers))
        assert reply.status == 200, reply.body
        return reply.content_type, await everything(reply)

    content_type, data = asyncio.run(answer())
    (framing,) = [name for name, known in TYPES.items() if known == content_type.partition(";")[0]]
    if framing == "whole":
        return "whole", [json.loads(data)]
    if framing == "lines":
        assert data.endswith(b"}\n")
        return "lines", [json.loads(line) for line in data.splitlines()]
    assert data.endswith(b"\n\n")
    events = [event.removeprefix(b"data: ") for event in data.split(b"\n\n")[:-1]]
    return "events", [json.loads(event) for event in events if event != b"[DONE]"]


def text_of(objects: list[dict[str, Any]]) -> str:
    """What the objects of either schema say."""
    text = ""
    for item in objects:
        if "token" in item:
            text += item["token"]["text"]
        elif "choices" in item:
            for choice in item["choices"]:
                text += choice.get("delta", choice.get("message"))["content"] or ""
        else:
            text += item["generated_text"]
    return text


@given(
    st.lists(st.sampled_from(["", "a", " bc", "\u00e9\ufffd"]), min_size=1, max_size=8),
    st.sets(st.integers(1, 7)),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_how_many_tokens_come_at_once_is_not_to_be_seen(pieces: list[str], cuts: set[int], eos: bool) -> None:
    """A busy server gets several at once from its engine; LMI's lines and TGI's events are one for each token."""
    if eos:
        pieces[-1] = ""

    def deltas(bounds: list[int]) -> list[Step]:
        made: list[Step] = []
        for start, end in itertools.pairwise(bounds):
            own = [PositionLogprobs(token(10 + at, f"<{at}>"), ()) for at in range(start, end)]
            ids, mine = [10 + at for at in range(start, end)], pieces[start:end]
            made.append(Delta(0, ids, "".join(mine), own, pieces=mine))
        last = made[-1]
        assert isinstance(last, Delta)
        last.finish_reason, last.eos = "stop", eos
        return made

    one_by_one = deltas(list(range(len(pieces) + 1)))
    together = deltas([0, *sorted(cut for cut in cuts if cut < len(pieces)), len(pieces)])
    for body, route in (
        (LMI | {"stream": True, "parameters": {"details": True}}, "/invocations"),
        (LMI | {"parameters": {"details": True}}, "/generate_stream"),
        (LMI | {"parameters": {"details": True}}, "/generate"),
    ):
        found = [ask(body, route=route, steps=steps) for steps in (one_by_one, together)]
        assert found[0] == found[1]


@pytest.mark.parametrize(
    ("formatter", "lmi", "lmi_stream", "messages", "messages_stream"),
    [
        (None, "whole", "lines", "whole", "events"),
        ("none", "whole", "lines", "whole", "events"),
        ("json", "whole", "lines", "whole", "events"),
        ("jsonlines", "lines", "lines", "whole", "events"),
        ("sse", "events", "events", "whole", "events"),
        ("json_chat", "whole", "lines", "whole", "events"),
        ("jsonlines_chat", "whole", "lines", "lines", "lines"),
        ("sse_chat", "whole", "lines", "events", "events"),
    ],
)
def test_the_formatter_frames_its_own_schema(
    formatter: str | None, lmi: Framing, lmi_stream: Framing, messages: Framing, messages_stream: Framing
) -> None:
    for body, silent, streamed in ((LMI, lmi, lmi_stream), (chat(), messages, messages_stream)):
        for stream, framing in ((None, silent), (True, streamed), (False, "whole")):
            body = {**body, "stream": stream}
            found, objects = ask(body, formatter=formatter)
            assert found == framing, (formatter, body)
            assert text_of(objects) == "a b\n\ndata: c"


@pytest.mark.parametrize("formatter", [None, "jsonlines", "sse", "jsonlines_chat", "sse_chat"])
@pytest.mark.parametrize("body", [LMI, chat()])
def test_the_clients_accept_header_wins_over_the_formatter(formatter: str | None, body: Any) -> None:
    body = {**body, "stream": True}
    assert ask(body, formatter=formatter, accept="text/event-stream")[0] == "events"
    assert ask(body, formatter=formatter, accept="Application/JsonLines")[0] == "lines"
    assert ask(body, formatter=formatter, accept="application/jsonlines, text/event-stream")[0] == "events"
    undecided = ask(body, formatter=formatter)[0]
    for accept in ("*/*", "application/json", "application/json, */*;q=0.5", ""):
        assert ask(body, formatter=formatter, accept=accept)[0] == undecided


def test_an_accept_header_alone_asks_for_no_stream() -> None:
    for accept in ("text/event-stream", "application/jsonlines"):
        for body in (LMI, chat()):
            assert ask(body, accept=accept)[0] == "whole"


def test_openais_route_streams_events_to_everyone() -> None:
    for formatter in (None, "jsonlines_chat", "sse_chat", "json_chat"):
        for accept in (None, "*/*", "application/jsonlines"):
            route = "/v1/chat/completions"
            assert ask(chat(stream=True), formatter=formatter, accept=accept, route=route)[0] == "events"
            assert ask(chat(), formatter=formatter, accept=accept, route=route)[0] == "whole"


def test_a_formatter_that_streams_leaves_lists_and_several_answers_whole() -> None:
    for formatter in ("jsonlines", "sse"):
        assert ask({"inputs": ["a", "b"]}, formatter=formatter)[0] == "whole"
        steps = [*said("a"), *said("b", index=1)]
        body = {"inputs": "a", "parameters": {"n": 2}}
        assert ask(body, formatter=formatter, steps=steps)[0] == "whole"


@pytest.mark.parametrize("formatter", ["jsonlines", "sse", "jsonlines_chat", "sse_chat"])
@pytest.mark.parametrize("body", [LMI, chat()])
def test_an_error_in_a_stream_has_its_framing(formatter: str, body: Any) -> None:
    steps: list[Step] = [Delta(0, [1], "a"), EngineFailed("the engine died")]
    _, objects = ask({**body, "stream": True}, formatter=formatter, steps=steps)
    error = objects[-1]["error"]
    assert "the engine died" in (error if isinstance(error, str) else error["message"])
    if body is LMI:
        assert objects[-1]["code"] == 500
        assert objects[-1]["generated_text"] is None
        assert objects[-1]["details"] == {"finish_reason": "error"}


def test_tgi_compat_answers_as_tgi_does() -> None:
    steps = said("a ", "b", reason="length")
    framing, (reply,) = ask(LMI, tgi_compat=True, steps=steps)
    assert framing == "whole"
    assert reply == [
        {
            "generated_text": "a b",
            "details": {
                "finish_reason": "length",
                "generated_tokens": 2,
                "seed": None,
                "prefill": [],
                "tokens": [
                    {"id": 10, "text": "a ", "logprob": -0.5, "special": False},
                    {"id": 11, "text": "b", "logprob": -0.5, "special": False},
                ],
            },
        }
    ]
    declined = {**LMI, "parameters": {"details": False}}
    assert ask(declined, tgi_compat=True)[1] == [[{"generated_text": "a b\n\ndata: c"}]]
    framing, (reply,) = ask({"inputs": ["x", "y"], "parameters": {"return_full_text": True}}, tgi_compat=True)
    assert [one["generated_text"] for one in reply] == ["xa b\n\ndata: c", "ya b\n\ndata: c"]
    assert ask(chat(), tgi_compat=True)[1][0]["object"] == "chat.completion"


def test_tgi_compat_tells_the_seed_it_drew() -> None:
    drawing = {**LMI, "parameters": {"do_sample": True}}
    seeds = {ask(drawing, tgi_compat=True)[1][0][0]["details"]["seed"] for _ in range(3)}
    assert len(seeds) == 3
    drawing["parameters"]["seed"] = 7
    assert ask(drawing, tgi_compat=True)[1][0][0]["details"]["seed"] == 7
    several = {**LMI, "parameters": {"best_of": 2, "do_sample": True, "seed": 7}}
    steps = [*said("a", index=0), *said("b", index=1)]
    details = ask(several, tgi_compat=True, steps=steps)[1][0][0]["details"]
    assert {details["seed"], details["best_of_sequences"][0]["seed"]} == {7, 8}


def test_tgi_compat_streams_tgis_events() -> None:
    body = {**LMI, "stream": True}
    framing, events = ask(body, tgi_compat=True)
    assert framing == "events"
    assert [event["index"] for event in events] == [1, 2]
    assert events[0]["token"] == {"id": 10, "text": "a ", "logprob": -0.5, "special": False}
    assert (events[0]["generated_text"], events[0]["details"]) == (None, None)
    assert events[-1]["generated_text"] == "a b\n\ndata: c"
    assert events[-1]["details"]["generated_tokens"] == 2
    assert ask(body, tgi_compat=True, accept="application/jsonlines") == ("lines", events)
