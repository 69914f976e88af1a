"""The service around a backend: places, deadlines, disconnects, errors before and after the first token."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from handlers.deltas import Delta, PositionLogprobs, PromptStats
from handlers.errors import EngineFailed, ImageFetchFailed, ImagesLost, InvalidRequest, Unavailable
from handlers.protocols.openai.chat_writer import ChatWriter
from handlers.request import GenerationRequest, Reply
from handlers.service import KEEP_ALIVE_SECONDS
from tests.support.coroutines import run
from tests.support.scripted import (
    ScriptedBackend,
    ScriptedImages,
    Step,
    Watched,
    chat,
    everything,
    incoming,
    said,
    service,
    token,
)

IMAGE = [{"type": "image_url", "image_url": {"url": "https://images.example/cat.png"}}]


@contextmanager
def logged() -> Iterator[list[logging.LogRecord]]:
    """What the handlers log meanwhile."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("handlers").addHandler(handler)
    logging.getLogger("handlers").setLevel(logging.INFO)
    try:
        yield records
    finally:
        logging.getLogger("handlers").removeHandler(handler)
        logging.getLogger("handlers").setLevel(logging.NOTSET)


def error_of(reply: Reply) -> dict[str, Any]:
    body = json.loads(reply.body)
    return body.get("error", body) if isinstance(body.get("error", body), dict) else body


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110 - most of it has no event
            await asyncio.sleep(0.005)


@run
async def test_a_whole_answer_gives_its_place_back() -> None:
    backend, watched = ScriptedBackend(said("a", "b", "c")), Watched()
    subject = service(backend, observer=watched)
    reply = await subject.answer(incoming(chat()))
    assert reply.status == 200
    assert json.loads(reply.body)["choices"][0]["message"]["content"] == "abc"
    assert (subject.in_flight, backend.running) == (0, 0)
    assert (watched.admitted, len(watched.first_tokens), len(watched.gaps), watched.errors) == (1, 1, 2, [])
    facts = reply.facts
    assert facts is not None
    assert watched.finished == [facts]
    assert (facts.status, facts.prompt_tokens, facts.image_tokens, facts.completion_tokens) == (200, 7, 4, 3)
    assert (facts.finish_reason, facts.error, facts.stream) == ("stop", None, False)
    assert facts.first_token is not None
    assert facts.total is not None
    assert facts.total >= facts.first_token >= 0


@run
async def test_a_full_queue_answers_429_at_once_and_recovers() -> None:
    go_on = asyncio.Event()
    backend, watched = ScriptedBackend([go_on.wait, *said("a", "b")]), Watched()
    subject = service(backend, job_queue_size=1, max_rolling_batch_size=2, observer=watched)
    busy = [asyncio.create_task(subject.answer(incoming(chat()))) for _ in range(3)]
    await until(lambda: subject.in_flight == 3)
    refused = await subject.answer(incoming(chat()))
    assert not any(asked.done() for asked in busy), "it did not wait"
    assert refused.status == 429
    assert int(refused.headers["Retry-After"]) >= 1
    assert error_of(refused)["code"] == "overloaded"
    for body, route in (
        (chat(stream=True), "/v1/chat/completions"),
        ({"prompt": "x"}, "/v1/completions"),
        ({"inputs": "x", "stream": True}, "/invocations"),
        ({"inputs": "x"}, "/generate"),
    ):
        refused = await subject.answer(incoming(body, route))
        assert (refused.status, "Retry-After" in refused.headers) == (429, True), route
    go_on.set()
    assert [reply.status for reply in await asyncio.gather(*busy)] == [200] * 3
    assert watched.admitted == 3
    assert watched.errors == ["overloaded"] * 5
    assert (await subject.answer(incoming(chat()))).status == 200


@run
async def test_every_prompt_of_a_list_takes_a_place() -> None:
    subject = service(ScriptedBackend(said("x")), job_queue_size=1, max_rolling_batch_size=2)
    reply = await subject.answer(incoming({"inputs": ["1", "2", "3"]}, "/invocations"))
    assert json.loads(reply.body) == [{"generated_text": "x"}] * 3
    reply = await subject.answer(incoming({"inputs": ["1", "2", "3", "4"]}, "/invocations"))
    assert reply.status == 400
    assert "at most 3" in json.loads(reply.body)["message"]
    assert subject.in_flight == 0


@run
async def test_a_stream_keeps_its_place_until_it_has_ended() -> None:
    backend = ScriptedBackend(said("a", "b", pause=0.05))
    subject = service(backend)
    reply = await subject.answer(incoming(chat(stream=True)))
    assert reply.status == 200
    assert subject.in_flight == 1
    assert (await everything(reply)).endswith(b"data: [DONE]\n\n")
    assert (subject.in_flight, backend.running) == (0, 0)
    assert reply.facts is not None
    assert reply.facts.completion_tokens == 2


@run
async def test_a_closed_stream_aborts_and_frees_its_place() -> None:
    for read_first in (True, False):
        backend, watched = ScriptedBackend(said(*"abcdefgh", pause=0.1)), Watched()
        subject = service(backend, observer=watched)
        reply = await subject.answer(incoming(chat(stream=True)))
        assert reply.chunks is not None
        if read_first:
            assert b'"a"' in await anext(reply.chunks)
        await reply.chunks.aclose()  # type: ignore[attr-defined]
        await reply.chunks.aclose()  # type: ignore[attr-defined]
        assert (subject.in_flight, backend.running) == (0, 0)
        assert [facts.finish_reason for facts in watched.finished] == ["abort"]


@run
async def test_a_cancelled_reader_can_close_the_stream() -> None:
    backend = ScriptedBackend([*said("a", "b")[:1], 60.0])
    subject = service(backend)
    reply = await subject.answer(incoming(chat(stream=True)))
    reading = asyncio.create_task(everything(reply))
    await asyncio.sleep(0.05)
    reading.cancel()
    await asyncio.wait([reading])
    await reply.chunks.aclose()  # type: ignore[union-attr]
    assert (subject.in_flight, backend.running) == (0, 0)


@run
async def test_a_disconnect_while_an_image_is_fetched_aborts_at_once() -> None:
    backend, images, watched = ScriptedBackend(said("a")), ScriptedImages(60), Watched()
    subject = service(backend, images, observer=watched)
    asked = asyncio.create_task(subject.answer(incoming(chat(IMAGE))))
    await until(lambda: images.asked)
    assert subject.in_flight == 1
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert images.cancelled
    assert (subject.in_flight, backend.requests) == (0, [])
    assert len(watched.finished) == 1


@run
async def test_a_disconnect_before_the_first_token_aborts_in_the_engine() -> None:
    for fields in ({}, {"stream": True}, {"n": 2}):
        backend = ScriptedBackend([60.0])
        subject = service(backend)
        asked = asyncio.create_task(subject.answer(incoming(chat(**fields))))
        await until(lambda b=backend: b.running == 1)  # type: ignore[misc]
        asked.cancel()
        await asyncio.wait([asked])
        assert asked.cancelled()
        assert (subject.in_flight, backend.running) == (0, 0)


@run
async def test_the_deadline_holds_for_fetching_waiting_and_generating() -> None:
    slow: list[tuple[ScriptedBackend, ScriptedImages, Any]] = [
        (ScriptedBackend(said("a")), ScriptedImages(60), chat(IMAGE)),
        (ScriptedBackend([60.0]), ScriptedImages(), chat()),
        (ScriptedBackend([60.0]), ScriptedImages(), chat(stream=True)),
        (ScriptedBackend(said(*"ab", pause=0.15)), ScriptedImages(), chat()),
    ]
    for backend, images, body in slow:
        subject = service(backend, images, predict_timeout=0.2)
        async with asyncio.timeout(30):  # half of what the work would take
            reply = await subject.answer(incoming(body))
        assert reply.status == 408
        assert "predict_timeout" in error_of(reply)["message"]
        assert (subject.in_flight, backend.running) == (0, 0)


@run
async def test_a_deadline_within_a_stream_is_an_event_and_the_end() -> None:
    backend, watched = ScriptedBackend([*said("a", "b")[:1], 60.0]), Watched()
    subject = service(backend, predict_timeout=1.0, observer=watched)
    reply = await subject.answer(incoming(chat(stream=True)))
    events = (await everything(reply)).decode().split("\n\n")
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert "[DONE]" not in "".join(events)
    assert (subject.in_flight, backend.running) == (0, 0)
    assert watched.errors == ["deadline_exceeded"]
    assert watched.finished[0].error == "deadline_exceeded"


@run
async def test_errors_before_the_first_token_have_their_own_status() -> None:
    failures = [(InvalidRequest("too long"), 400), (Unavailable("restarting", retry_after=2), 503)]
    for error, status in failures:
        for stream in (False, True):
            backend = ScriptedBackend([error])
            subject = service(backend)
            reply = await subject.answer(incoming(chat(stream=stream)))
            assert (reply.status, error_of(reply)["message"]) == (status, error.message)
            assert reply.headers.get("Retry-After") == (None if status == 400 else "2")
            assert (subject.in_flight, backend.running) == (0, 0)


@run
async def test_an_error_after_the_first_token_is_an_event() -> None:
    steps = said("a", "b")[:1]
    backend = ScriptedBackend([*steps, EngineFailed("the engine died")])
    subject = service(backend)
    data = await everything(await subject.answer(incoming(chat(stream=True))))
    assert b'"a"' in data
    assert b'"message":"the engine died"' in data
    assert b"[DONE]" not in data
    lines = await everything(await subject.answer(incoming({"inputs": "x", "stream": True}, "/invocations")))
    assert json.loads(lines.splitlines()[-1])["code"] == 500
    assert subject.in_flight == 0


@run
async def test_unexpected_exceptions_reach_the_log_and_not_the_client() -> None:
    with logged() as records:
        error = KeyError("/opt/secret/path")
        first = said("a", "b")[0]
        for body, steps in (
            (chat(), [error]),
            (chat(stream=True), [error]),
            (chat(stream=True), [first, error]),
        ):
            reply = await service(ScriptedBackend(steps)).answer(incoming(body))
            data = await everything(reply)
            assert reply.status == (200 if len(steps) == 2 else 500)
            assert b"internal error" in data
            assert b"req-1" in data
            assert b"secret" not in data
            assert b"Traceback" not in data
    assert len(records) == 3
    for record in records:
        assert "req-1" in record.getMessage()
        assert "secret" in logging.Formatter().format(record)


@run
async def test_a_clients_mistake_is_one_line_in_the_log_without_what_it_sent() -> None:
    with logged() as records:
        reply = await service(ScriptedBackend(said("a"))).answer(incoming(chat(temperature="very secret")))
    assert reply.status == 400
    (record,) = records
    line = logging.Formatter().format(record)
    assert "req-1: invalid_request (400) at " in line
    assert ".py:" in line
    assert "\n" not in line
    assert "secret" not in line


@run
async def test_an_engine_that_stops_early_is_an_error() -> None:
    for body in (chat(), chat(stream=True)):
        data = await everything(await service(ScriptedBackend(said("a", "b")[:1])).answer(incoming(body)))
        assert b"too early" in data
    reply = await service(ScriptedBackend([])).answer(incoming(chat(stream=True)))
    assert reply.status == 500
    reply = await service(ScriptedBackend(said("a", reason="abort"))).answer(incoming(chat()))
    assert reply.status == 500


@run
async def test_images_are_counted_loaded_in_order_and_limited() -> None:
    images = ScriptedImages()
    backend = ScriptedBackend(said("a"))
    subject = service(backend, images, limit_mm_per_prompt={"image": 2})
    urls = [f"https://images.example/{i}.png" for i in range(3)]
    parts = [{"type": "image_url", "image_url": url} for url in urls]
    turns = [{"role": "user", "content": [parts[0]]}, {"role": "user", "content": [parts[1]]}]
    reply = await subject.answer(incoming({"messages": turns}))
    assert images.loaded == urls[:2]
    assert reply.facts is not None
    assert reply.facts.images == 2
    reply = await subject.answer(incoming(chat(parts)))
    assert reply.status == 400
    assert "3 images" in error_of(reply)["message"]
    assert "limit_mm_per_prompt" in error_of(reply)["message"]
    texts = [f"![]({url})" for url in urls]
    reply = await subject.answer(incoming({"inputs": texts}, "/invocations"))
    assert reply.status == 200
    assert images.loaded[2:] == urls


@run
async def test_an_image_that_fails_is_the_clients_error() -> None:
    class Broken(ScriptedImages):
        async def load(self, parts: Any, deadline: float | None = None, first_index: int = 0) -> None:
            raise ImageFetchFailed(0, "its host answered 404")

    subject = service(ScriptedBackend(said("a")), Broken())
    reply = await subject.answer(incoming(chat(IMAGE, stream=True)))
    assert (reply.status, error_of(reply)["code"]) == (422, "image_fetch_failed")
    assert subject.in_flight == 0


@run
async def test_images_that_the_engine_has_lost_are_sent_again() -> None:
    def script(lost: int) -> Any:
        def steps(_: GenerationRequest) -> Any:
            if len(backend.requests) <= lost:
                raise ImagesLost("the engine has lost an image of this request; try again")
            return said("a")

        return steps

    for lost, status in ((1, 200), (2, 200), (9, 500)):
        backend, images = ScriptedBackend(script(lost)), ScriptedImages()
        subject = service(backend, images)
        reply = await subject.answer(incoming(chat(IMAGE)))
        assert reply.status == status
        assert len(images.loaded) == len(backend.requests) == min(lost + 1, 3)
        assert subject.in_flight == 0


@run
async def test_a_long_reply_is_not_written_on_the_event_loop() -> None:
    threads = []
    whole = ChatWriter.whole

    def watched(self: ChatWriter, answered: Any) -> bytes:
        threads.append(threading.current_thread())
        return whole(self, answered)

    position = PositionLogprobs(token(1, "a"), tuple(token(number, "b", rank=number) for number in range(20)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChatWriter, "whole", watched)
        for positions in (10, 1000):
            script = [Delta(0, [1] * positions, "a", [position] * positions, "stop")]
            asked = incoming(chat(logprobs=True, top_logprobs=20))
            reply = await service(ScriptedBackend(script)).answer(asked)
            assert len(json.loads(reply.body)["choices"][0]["logprobs"]["content"]) == positions
    assert [thread is threading.main_thread() for thread in threads] == [True, False]


@run
async def test_lists_are_bounded_for_all_answers_together() -> None:
    subject = service(ScriptedBackend(said("a")))
    most = list(range(2**17))
    fits = await subject.answer(incoming(chat(allowed_token_ids=[*most, *most], n=1)))
    assert fits.status == 200
    refused = await subject.answer(incoming(chat(allowed_token_ids=most, n=9)))
    assert (refused.status, error_of(refused)["param"]) == (400, "allowed_token_ids")
    prompts = {"prompt": ["a"] * 17, "bad_words": [f"word {number}" for number in range(1000)]}
    refused = await subject.answer(incoming(prompts, "/v1/completions"))
    assert (refused.status, error_of(refused)["param"]) == (400, "bad_words")


@run
async def test_text_models_refuse_images_and_missing_adapters_are_404() -> None:
    subject = service(ScriptedBackend(said("a"), images=False))
    assert (await subject.answer(incoming(chat(IMAGE)))).status == 400
    adapter = {"x_amzn_sagemaker_adapter_identifier": "sql"}
    assert (await subject.answer(incoming(chat(), **adapter))).status == 404
    backend = ScriptedBackend(said("a"), adapters=True)
    assert (await service(backend).answer(incoming(chat(), **adapter))).status == 200
    assert backend.requests[0].adapter == "sql"


@run
async def test_answers_are_interleaved_by_index() -> None:
    steps = [d for pair in zip(said("a", "b"), said("x", "y", index=1, reason="length"), strict=True) for d in pair]
    subject = service(ScriptedBackend(steps))
    whole = json.loads((await subject.answer(incoming(chat(n=2)))).body)
    assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in whole["choices"]] == [
        (0, "ab", "stop"),
        (1, "xy", "length"),
    ]
    assert whole["usage"]["completion_tokens"] == 4
    data = (await everything(await subject.answer(incoming(chat(n=2, stream=True))))).decode()
    choices = [json.loads(event[6:])["choices"][0] for event in data.split("\n\n")[:-2]]
    assert [(c["index"], c["delta"]["content"]) for c in choices] == [(0, "a"), (1, "x"), (0, "b"), (1, "y")]
    assert ["role" in c["delta"] for c in choices] == [True, True, False, False]


@run
async def test_prompts_of_a_list_are_answered_in_order_however_long_they_take() -> None:
    def script(request: GenerationRequest) -> list[Any]:
        number = int(request.request_id.rpartition("-")[2])
        return said(str(number), pause=0.05 * (3 - number))

    reply = await service(ScriptedBackend(script)).answer(incoming({"inputs": ["a", "b", "c"]}, "/invocations"))
    assert [one["generated_text"] for one in json.loads(reply.body)] == ["0", "1", "2"]


@run
async def test_one_failed_prompt_fails_the_list_and_aborts_the_others() -> None:
    def script(request: GenerationRequest) -> list[Any]:
        return [EngineFailed("no")] if request.request_id.endswith("1") else [60.0]

    backend = ScriptedBackend(script)
    subject = service(backend)
    assert (await subject.answer(incoming({"inputs": ["a", "b", "c"]}, "/invocations"))).status == 500
    assert (subject.in_flight, backend.running) == (0, 0)


@run
async def test_silence_is_filled_with_comments() -> None:
    backend = ScriptedBackend([0.3, *said("a", "b", pause=0.3)[1:]])
    reply = await service(backend, keep_alive=0.1).answer(incoming(chat(stream=True)))
    chunks = [chunk async for chunk in reply.chunks]  # type: ignore[union-attr]
    assert b'"a"' in chunks[0]
    assert 1 <= chunks.count(b": keep-alive\n\n") <= 3
    assert KEEP_ALIVE_SECONDS == 15.0
    lines = incoming({"inputs": "x", "stream": True}, "/invocations")
    data = await everything(await service(backend, keep_alive=0.01).answer(lines))
    assert b"keep-alive" not in data


@run
async def test_a_slow_reader_finds_everything_that_waited() -> None:
    backend = ScriptedBackend(said(*"abcdefgh"))
    subject = service(backend)
    reply = await subject.answer(incoming(chat(stream=True)))
    await until(lambda: backend.running == 0)
    assert subject.in_flight == 1
    chunks = [chunk async for chunk in reply.chunks]  # type: ignore[union-attr]
    assert subject.in_flight == 0
    assert len(chunks) == 1
    assert chunks[0].count(b"data: ") == 9


@run
async def test_a_reader_that_is_too_slow_holds_the_engine_back() -> None:
    long = "x" * 100_000
    given: list[int] = []

    def steps() -> Iterator[Step]:
        for step in said(*[long] * 40):
            given.append(1)
            yield step

    backend = ScriptedBackend(lambda _: steps())  # type: ignore[arg-type,return-value]
    subject = service(backend)
    reply = await subject.answer(incoming(chat(stream=True)))
    await asyncio.sleep(0.05)
    assert len(given) <= 12
    data = await everything(reply)
    assert data.count(b'"content":"x') == 40
    assert data.endswith(b"data: [DONE]\n\n")
    assert (subject.in_flight, backend.running) == (0, 0)


@run
async def test_a_reader_that_stops_is_given_up() -> None:
    backend = ScriptedBackend(said(*["x" * 100_000] * 40))
    subject = service(backend, chunked_read_timeout=0.05)
    reply = await subject.answer(incoming(chat(stream=True)))
    await until(lambda: backend.running == 0)
    assert subject.in_flight == 1
    data = await everything(reply)
    assert len(data) < 2**20 + 200_000
    assert b"chunked_read_timeout" in data.splitlines()[-2]
    assert subject.in_flight == 0


@run
async def test_what_a_stopping_server_cancels_is_answered_503() -> None:
    """As executors do with what waits in them; nobody cancelled the request."""
    for steps in ([asyncio.CancelledError()], [said("a", "b")[0], asyncio.CancelledError()]):
        for body in (chat(), chat(stream=True), {"inputs": ["a", "b"]}):
            backend = ScriptedBackend(steps)
            subject = service(backend)
            reply = await subject.answer(incoming(body))
            streamed = reply.chunks is not None
            data = await everything(reply)
            assert reply.status == (200 if streamed else 503)
            assert b"the server is stopping" in data
            assert (subject.in_flight, backend.running) == (0, 0)


@run
async def test_a_cancellation_under_an_image_is_answered_503() -> None:
    class Stopping(ScriptedImages):
        async def load(self, parts: Any, deadline: float | None = None, first_index: int = 0) -> None:
            raise asyncio.CancelledError

    subject = service(ScriptedBackend(said("a")), Stopping())
    reply = await subject.answer(incoming(chat(IMAGE)))
    assert (reply.status, reply.headers["Retry-After"]) == (503, "5")
    assert reply.facts is not None
    assert reply.facts.error == "unavailable"
    assert subject.in_flight == 0


@run
async def test_images_are_let_go_with_their_answer() -> None:
    """Whether the backend lets go of them itself or not."""
    released: list[str] = []

    class Held(ScriptedImages):
        async def load(self, parts: Any, deadline: float | None = None, first_index: int = 0) -> None:
            indices.append(first_index)
            for part in parts:
                part.share = SimpleNamespace(release=lambda url=part.url: released.append(url))

    urls = [f"https://images.example/{i}.png" for i in range(2)]
    for body in (
        chat([{"type": "image_url", "image_url": urls[0]}]),
        chat([{"type": "image_url", "image_url": urls[0]}], stream=True),
        {"inputs": [f"![]({url})" for url in urls]},
    ):
        for steps in (said("a"), [EngineFailed("no")]):
            indices: list[int] = []
            released.clear()
            await everything(await service(ScriptedBackend(steps), Held()).answer(incoming(body)))
            assert set(released) >= {urls[i] for i in indices}
    assert indices == [0, 1]


@run
async def test_images_have_the_time_that_the_request_has() -> None:
    deadlines: list[float | None] = []

    class ImagesNotingDeadlines(ScriptedImages):
        async def load(self, parts: Any, deadline: float | None = None, first_index: int = 0) -> None:
            deadlines.append(deadline)

    asked = chat([{"type": "image_url", "image_url": "https://images.example/0.png"}])
    before = time.monotonic()
    await service(ScriptedBackend(said("a")), ImagesNotingDeadlines(), predict_timeout=5.0).answer(incoming(asked))
    assert deadlines[0] is not None
    assert before + 5.0 <= deadlines[0] <= time.monotonic() + 5.0


@run
async def test_text_that_lags_behind_its_tokens_is_not_lost() -> None:
    steps = [
        Delta(0, [1], ""),
        Delta(0, [2], "é"),
        Delta(0, [3], ""),
        Delta(0, [4], "!", finish_reason="length"),
    ]
    subject = service(ScriptedBackend(steps, stats=lambda: PromptStats(1)))
    asked = chat(stream=True, stream_options={"include_usage": True})
    data = (await everything(await subject.answer(incoming(asked)))).decode()
    events = [json.loads(event[6:]) for event in data.split("\n\n")[:-2]]
    texts = [e["choices"][0]["delta"]["content"] for e in events if e["choices"]]
    assert texts == ["", "é", "!"]
    assert events[-1]["usage"]["completion_tokens"] == 4


@run
async def test_no_place_is_lost_whenever_a_client_leaves() -> None:
    draw = random.Random(7)
    steps = said(*"abcd", pause=0.003)
    backend, watched = ScriptedBackend(steps), Watched()
    subject = service(backend, ScriptedImages(0.003), observer=watched, keep_alive=0.002)

    async def visit() -> None:
        many = {"inputs": [f"![]({IMAGE[0]['image_url']['url']})", "x", "y"]}
        body = draw.choice([chat(IMAGE), chat(IMAGE, stream=True), chat(IMAGE, stream=True), many])
        reply = await subject.answer(incoming(body))
        assert reply.status == 200
        if reply.chunks is not None:
            try:
                async for _ in reply.chunks:
                    pass
            finally:
                await reply.chunks.aclose()  # type: ignore[attr-defined]

    for number in range(150):
        visiting = asyncio.create_task(visit())
        if number % 10:  # the others stay to the end
            await asyncio.sleep(draw.uniform(0, 0.02))
            visiting.cancel()
        await asyncio.wait([visiting])
        assert visiting.cancelled() or visiting.exception() is None
        assert (subject.in_flight, backend.running) == (0, 0)
    assert watched.admitted == len(watched.finished)
    assert {facts.finish_reason for facts in watched.finished} == {"stop", "abort"}
