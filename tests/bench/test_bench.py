"""The load generator: the same load for the same seed, and a true account of what came back."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable

import pytest

from bench import load, overhead, report
from bench.client import Reply
from bench.servers import Server
from tests.support.pace import too_long

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


def event(content: str | None) -> bytes:
    body = json.dumps({"choices": [{"index": 0, "delta": {"role": "assistant", "content": content}}]})
    return f"data: {body}\n\n".encode()


USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}\n\n'
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


async def speak(writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + chunk(event("")))
    await asyncio.sleep(0.05)
    writer.write(chunk(event("one")[:20]) + chunk(event("one")[20:]))
    await asyncio.sleep(0.02)
    writer.write(chunk(event("two") + event("three")))
    writer.write(chunk(USAGE) + chunk(b"data: [DONE]\n\n") + chunk(b""))


async def refuse(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 4\r\n\r\nfull")


async def break_off(writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + chunk(event("one")))
    writer.close()


async def fail_late(writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + chunk(event("one")) + chunk(b'data: {"error": {"message": "lost"}}\n\n') + chunk(b""))


def run(answer: Answer, one: load.Load) -> load.Run:
    """Run a load against a server that reads each request whole and then answers it in that way."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
            json.loads(await reader.readexactly(length))
            await answer(writer)
            if writer.is_closing():
                return

    async def both() -> load.Run:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        result = await asyncio.to_thread(load.run, one, Server("", "127.0.0.1", port, "model"))
        server.close()
        return result

    return asyncio.run(both())


SMALL = load.Load(requests=6, streams=2, width=32, height=24, warmup=2)


def test_a_seed_always_gives_the_same_load_and_no_image_twice() -> None:
    made = load.bodies(SMALL, "model")
    assert made == load.bodies(SMALL, "model")
    urls = [json.loads(body)["messages"][0]["content"][0]["image_url"]["url"] for body in made]
    assert len(set(urls)) == len(urls) == 8
    assert base64.b64decode(urls[0].split(",")[1]).startswith(b"\xff\xd8")


def test_shared_images_are_the_same_in_every_request() -> None:
    made = load.bodies(load.Load(requests=3, warmup=0, images=2, width=16, height=16, shared=True), "model")
    shown = [[part for part in json.loads(body)["messages"][0]["content"] if "image_url" in part] for body in made]
    assert shown[0] == shown[1] == shown[2]
    assert len(shown[0]) == 2


def test_the_first_token_is_the_first_chunk_with_content() -> None:
    result = run(speak, SMALL)
    numbers = report.summary(result, [])
    assert numbers["outcomes"] == {"200": 6}
    assert [len(reply.contents) for reply in result.replies] == [3] * 6
    assert numbers["ttft_ms"]["p50"] >= 50
    assert numbers["tokens_per_chunk"] == 1.0
    assert numbers["prompt_tokens"] == 9
    assert numbers["tokens_per_s"] == pytest.approx(3 * numbers["requests_per_s"])


@pytest.mark.parametrize(
    ("answer", "outcome", "error"),
    [
        (refuse, "429", "full"),
        (break_off, "broken stream", "connection closed"),
        (fail_late, "broken stream", '{"message": "lost"}'),
    ],
)
def test_what_fails_is_counted_by_how_it_failed(answer: Answer, outcome: str, error: str) -> None:
    numbers = report.summary(run(answer, SMALL), [])
    assert numbers["outcomes"] == {outcome: 6}
    assert numbers["errors"] == [error]
    assert numbers["requests_per_s"] == 0.0
    assert report.failed(numbers) == 6


def test_at_a_rate_latency_counts_from_when_the_request_was_due() -> None:
    one = load.Load(requests=20, rate=200.0, width=16, height=16, warmup=0)
    result = run(speak, one)
    starts = sorted(reply.start for reply in result.replies)
    assert 0.02 < starts[-1] - starts[0] < 0.5
    assert all(reply.ok for reply in result.replies)


def test_nothing_answers_where_no_server_listens() -> None:
    result = load.run(SMALL, Server("", "127.0.0.1", 9, "model"))
    assert {reply.outcome for reply in result.replies} == {"connection"}


def test_the_time_per_token_leaves_out_the_first() -> None:
    reply = Reply(0.0, 200, [1.0, 1.5, 2.0], 2.0, 9, 5)
    numbers = report.summary(load.Run(SMALL, [reply], 0.0, 2.0, 0.0), [])
    assert numbers["tpot_ms"]["p50"] == pytest.approx(250)
    assert numbers["itl_ms"]["p50"] == pytest.approx(500)


def test_every_api_costs_less_than_its_bounds() -> None:
    """Processor time, not the clock's; thrice the bounds, for a machine that has more to do."""
    costs = overhead.measured()
    assert len(costs) == 6
    for name, cost in costs.items():
        assert cost.request_ms > 0, name
        assert cost.token_us > 0, name
        assert not too_long(cost.request_ms, 3 * overhead.REQUEST_MS), name
        assert not too_long(cost.token_us, 3 * overhead.TOKEN_US), name
    assert "| TGI |" in overhead.table(costs)
