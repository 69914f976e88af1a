"""A server under load whose engine is killed, again and again, and whose clients leave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest

from tests.backend import BACK
from tests.live import LiveServer, chat_body
from tests.test_end_to_end import until_idle
from tests.test_shapes_live import SHAPES, circle

WHAT = "What is this an image of?"
LONG = {"max_tokens": 3000, "ignore_eos": True}


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with LiveServer(SHAPES, "job_queue_size=8", "max_rolling_batch_size=8") as live:
        yield live


def test_killed_under_load_everybody_is_told_at_once_and_service_returns(server: LiveServer) -> None:
    """Twice: the second engine is watched as the first was."""

    async def ask(client: httpx.AsyncClient, number: int) -> tuple[int, str]:
        body = chat_body(circle("red"), WHAT, stream=number % 2 == 0, **LONG)
        reply = await client.post("/v1/chat/completions", json=body)
        return reply.status_code, reply.text

    async def load() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            asking = [asyncio.create_task(ask(client, number)) for number in range(8)]
            async with asyncio.timeout(60):
                while " 8.0" not in (await client.get("/metrics?name[]=lmi_requests_running")).text:
                    pass
            (engine,) = server.engines
            engine.kill()
            killed = time.monotonic()
            replies = await asyncio.gather(*asking)
            assert time.monotonic() - killed < 2
            for number, (status, text) in enumerate(replies):
                assert status == (200 if number % 2 == 0 else 500)
                assert "the engine process died" in text
                assert "Traceback" not in text
            ping = await client.get("/ping")
            assert ping.status_code == 503
            assert time.monotonic() - killed < 2
            assert (await client.post("/v1/chat/completions", json=chat_body("hello"))).status_code == 503

    for restarts in (1, 2):
        asyncio.run(load())
        server.wait_for(BACK)
        assert server.http.get("/ping").status_code == 200
        answer = server.chat(circle("red"), WHAT).json()["choices"][0]["message"]["content"]
        assert answer == "a red circle"
        assert server.metrics()["lmi_engine_restarts_total"] == restarts


def test_clients_that_leave_under_load_leave_nothing_behind(server: LiveServer) -> None:
    async def leave(client: httpx.AsyncClient, number: int) -> None:
        body = chat_body(
            circle("blue"), WHAT, stream=number % 2 == 0, n=1 + number % 3, temperature=1.0, **LONG
        )
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3 + 0.05 * number):
                await client.post("/v1/chat/completions", json=body)

    async def crowd() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            await asyncio.gather(*(leave(client, number) for number in range(8)))

    asyncio.run(crowd())
    until_idle(server, 1.0)


def test_a_full_queue_is_answered_429_and_drains(server: LiveServer) -> None:
    async def crowd() -> list[int]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            body = chat_body("hello", max_tokens=300, ignore_eos=True)
            posts = (client.post("/v1/chat/completions", json=body) for _ in range(48))
            return [reply.status_code for reply in await asyncio.gather(*posts)]

    statuses = asyncio.run(crowd())
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 16
    until_idle(server, 1.0)


def test_a_killed_server_leaves_no_engine_behind() -> None:
    with LiveServer(SHAPES) as server:
        family = psutil.Process(server.process.pid).children(recursive=True)
        assert len(family) > 1
        server.process.kill()
        server.wait()
        _, alive = psutil.wait_procs(family, timeout=15)
        assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_vllms_own_series_stand_beside_ours(server: LiveServer) -> None:
    server.chat("hello")
    page = server.http.get("/metrics").text
    assert 'vllm:generation_tokens_total{engine="0",model_name="shapes"}' in page
    assert "vllm:time_to_first_token_seconds_bucket" in page
    assert "lmi_generation_tokens_total" in page
    assert str(SHAPES) not in page
