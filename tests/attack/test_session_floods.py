"""Sessions of a live server: a flood of them is bounded, their ids cannot be guessed, and a name is never a path."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from handlers.errors import InvalidRequest, Overloaded
from handlers.protocols.lmi.sessions import MOST_SESSIONS, Sessions
from tests.support.scripted import incoming
from tests.support.scripted_server import ServerProcess

ID = "x-amzn-sagemaker-session-id"
OPEN = {"requestType": "NEW_SESSION"}
CALL = incoming(OPEN, "/invocations")
FLOOD = 3000


class Server(ServerProcess):
    http: httpx.Client


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("m"), "--option", "sessions_expiration=1200")
    with running:
        running.ready()
        with httpx.Client(base_url=running.url, timeout=60) as running.http:
            yield running


def ask(server: Server, body: object, session: str | bytes | None = None) -> httpx.Response:
    headers = {} if session is None else {ID: session}
    return server.http.post("/invocations", json=body, headers=headers)


def opened(server: Server) -> str:
    return ask(server, OPEN).headers[ID].partition(";")[0]


def test_ids_are_random_and_all_different(server: Server) -> None:
    names = [uuid.UUID(opened(server)) for _ in range(FLOOD)]
    assert len(set(names)) == FLOOD
    assert {name.version for name in names} == {4}, "122 bits of the system's random numbers"


def test_a_flood_costs_little_memory_and_no_file(server: Server, tmp_path: Path) -> None:
    process = psutil.Process(server._process.pid)
    opened(server)
    before, files = process.memory_info().rss, process.num_fds()
    for _ in range(FLOOD):
        opened(server)
    assert process.memory_info().rss - before < FLOOD * 2048
    assert process.num_fds() <= files + 1


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd", "/etc/passwd", "..%2f..%2fetc%2fpasswd", "file:///etc/passwd", "NEW_SESSION/../x",
        "x" * 6000, "*", "%s%n", "'; drop table sessions;--", b"\xff\xfe",
        "00000000-0000-0000-0000-000000000000", "\u0130".encode(),
    ],
    ids=lambda name: repr(name)[:24],
)  # fmt: skip
def test_a_name_that_was_not_given_out_is_refused(server: Server, name: str | bytes) -> None:
    for body in ({"messages": [{"role": "user", "content": "{}"}]}, {"requestType": "CLOSE"}):
        refused = ask(server, body, name)
        assert refused.status_code == 400
        assert len(refused.content) < 500
        assert "root:" not in refused.text
    assert opened(server)


def test_a_closed_session_is_closed_for_good(server: Server) -> None:
    name = opened(server)
    assert ask(server, {"requestType": "CLOSE"}, name).status_code == 200
    assert ask(server, {"requestType": "CLOSE"}, name).status_code == 400
    for kind in ("close", ["CLOSE"], {"a": 1}, None, 7, "NEW_SESSION" * 1000):
        refused = ask(server, {"requestType": kind}, opened(server))
        assert refused.status_code == 400
        assert len(refused.content) < 500


def test_the_number_is_bounded_and_time_makes_room() -> None:
    now = [0.0]
    kept = Sessions(expiration=100, clock=lambda: now[0])
    for number in range(MOST_SESSIONS):
        now[0] = number / MOST_SESSIONS
        kept.answer(OPEN, CALL)
    with pytest.raises(Overloaded) as refused:
        kept.answer(OPEN, CALL)
    assert refused.value.status == 429
    assert refused.value.retry_after
    (first,) = list(kept._ends)[:1]
    now[0] = 100.0
    with pytest.raises(InvalidRequest, match="expired"):
        kept.answer({}, incoming({}, **{ID: first}))
    reply = kept.answer(OPEN, CALL)
    assert reply is not None
    assert reply.status == 200, "the first has ended"
    now[0] = 300.0
    reply = kept.answer(OPEN, CALL)
    assert reply is not None
    assert json.loads(reply.body)["result"].endswith("created")
    assert len(kept._ends) == 1, "those that ended are forgotten"
    assert MOST_SESSIONS == 100_000
